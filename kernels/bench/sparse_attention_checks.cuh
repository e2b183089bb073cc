// What the benches of sparse attention share: their options, the widths, inputs that bf16 holds
// exactly, and the check of a forward against the definition.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/bench/harness.cuh"
#include "kernels/bench/sparse_attention_reference.h"
#include "kernels/ops/attention/sparse_attention_forward_plan_cuda.h"

namespace baleen::bench {

constexpr float kScale = 0.1352337788608801f;
constexpr int kC = kLatentAndRope, kV = kLatent;
constexpr double kForwardFlopsPerPair = 2.0 * (kC + kV);

// --check, --quick, --case=N and so on; a bench reads those that it has.
struct Options {
  bool check = false, quick = false;
  int only_case = -1;        // of the checks; -1 = all
  int heads = 0, keys = 0;   // time only these; 0 = all
  size_t budget_mib = 2560;  // of the backward's workspace; what the op gives
  std::string which;         // "forward" or "backward"; empty = both
  std::string json;
};

inline Options ReadOptions(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--check") options.check = true;
    if (arg == "--quick") options.quick = true;
    if (arg.rfind("--case=", 0) == 0) options.only_case = std::stoi(arg.substr(7));
    if (arg.rfind("--heads=", 0) == 0) options.heads = std::stoi(arg.substr(8));
    if (arg.rfind("--keys=", 0) == 0) options.keys = std::stoi(arg.substr(7));
    if (arg.rfind("--budget=", 0) == 0) options.budget_mib = std::stoul(arg.substr(9));
    if (arg.rfind("--only=", 0) == 0) options.which = arg.substr(7);
    if (arg.rfind("--json=", 0) == 0) options.json = arg.substr(7);
  }
  return options;
}

inline std::vector<__nv_bfloat16> ToBf16(const std::vector<double>& values) {
  std::vector<__nv_bfloat16> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = __float2bfloat16(float(values[i]));
  return out;
}
inline std::vector<double> RandomBf16(size_t count, uint64_t seed) {
  std::vector<double> out(count);
  for (size_t i = 0; i < count; ++i) {
    out[i] = __bfloat162float(__float2bfloat16(float(NormalAt(seed, i))));
  }
  return out;
}

// Room for the parts of a forward's last works.
inline size_t ForwardPartFloats(int tokens, int heads, int queries_a_pack, int selected) {
  return size_t(SparseAttentionForwardPartFloats(PlanSparseAttentionForward(
      SparseAttentionForwardWorks(tokens, heads, queries_a_pack), selected)));
}

// The largest difference of finite values; those of rows without keys must be -inf exactly.
inline double LseError(const std::vector<float>& lse, const std::vector<double>& expected) {
  double error = 0;
  for (size_t i = 0; i < lse.size(); ++i) {
    const double difference = std::isinf(expected[i]) ? (lse[i] == expected[i] ? 0.0 : 1e9)
                                                      : std::abs(lse[i] - expected[i]);
    error = difference <= error ? error : difference;  // keeps a NaN
  }
  return error;
}

// Three runs into poisoned outputs: right, and the same bits each time.
template <typename Run>
bool CheckForwardThrice(const char* label, DeviceBuffer<__nv_bfloat16>& o, DeviceBuffer<float>& lse,
                        const SparseAttentionForwardResult& expected, Run run) {
  bool good = true;
  std::vector<__nv_bfloat16> first;
  for (int repeat = 0; repeat < 3; ++repeat) {
    o.Poison();
    lse.Poison();
    run();
    CheckLaunch(label);
    const std::vector<__nv_bfloat16> found = o.Download();
    const double o_error = RelativeError(ToDouble(found), expected.o_THV);
    const double lse_error = LseError(lse.Download(), expected.lse_TH);
    if (repeat == 0) first = found;
    const bool same = std::memcmp(found.data(), first.data(), found.size() * 2) == 0;
    const bool pass = o_error < 8e-3 && lse_error < 1e-3 && same;
    if (repeat == 0 || !pass) {
      std::printf("check %s: o %.2e lse %.2e %s%s\n", label, o_error, lse_error,
                  pass ? "ok" : "FAILED", same ? "" : " (not reproducible)");
    }
    good = good && pass;
  }
  return good;
}

}  // namespace baleen::bench
