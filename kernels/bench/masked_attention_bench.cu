// Bench of masked dense attention (192/128 heads): checked against the double reference on small
// odd shapes (fresh random inputs, windows that begin late, rows without keys, tiles without a
// selected key, poisoned outputs), then timed, with and without a selection.
//
// FLOP are counted as everywhere: pairs of a row and a key of its window, times heads, times 2 (192
// + 128) forward and 2 (3 * 192 + 2 * 128) backward, whatever is executed and selected. Times hold
// every launch: the schedule with its bits, delta, target.
//
//   masked_attention_bench [--check] [--only=check] [--keys=S] [--json=PATH]
#include <cstring>

#include "kernels/bench/harness.cuh"
#include "kernels/bench/masked_attention_reference.h"
#include "kernels/ops/attention/masked_attention_backward_cuda.h"
#include "kernels/ops/attention/masked_attention_forward_cuda.h"
#include "kernels/ops/attention/masked_attention_schedule_cuda.h"
#include "kernels/ops/attention/masked_attention_target_cuda.h"

namespace baleen::bench {
namespace {

constexpr float kScale = 0.1352337788608801f;

// --- Shapes -------------------------------------------------------------------------------------

enum class Window { kNone, kCausal, kDocuments, kRandom, kLate };
enum class Choice { kNone, kRandom, kNear, kRuns };
const char* Name(Window window) {
  constexpr const char* kNames[] = {"full", "causal", "documents", "random", "late"};
  return kNames[static_cast<int>(window)];
}
const char* Name(Choice choice) {
  constexpr const char* kNames[] = {"-", "rand", "near", "runs"};
  return kNames[static_cast<int>(choice)];
}

struct Shape {
  Window window;
  Choice choice;
  int rows, keys, heads;
  int selected = 0;
};

void WindowOf(const Shape& shape, int t, uint64_t seed, int32_t* begin, int32_t* end) {
  *begin = 0;
  *end = shape.keys;
  const int position = shape.keys - shape.rows + t;
  if (shape.window == Window::kCausal) *end = position + 1;
  if (shape.window == Window::kDocuments) {
    const int length = 1 + shape.keys / 5;
    *begin = position / length * length;
    *end = position + 1;
  }
  if (shape.window == Window::kLate && t < shape.rows / 2) *end = 0;  // whole tiles without keys
  if (shape.window == Window::kRandom) {
    const int a = Mix(seed + 5, t) % (shape.keys + 1), b = Mix(seed + 6, t) % (shape.keys + 1);
    *begin = t % 11 == 3 ? b : std::min(a, b);  // some are empty or reversed
    *end = t % 11 == 3 ? std::min(a, b) : std::max(a, b);
  }
}

// Row t's ids: `selected` distinct keys of its window, -1 behind them. kRandom: one of each of
// `selected` equal parts. kNear: the same parts' picks for 32 rows in turn, so neighbours agree.
// kRuns: one run of keys, so that most tiles hold none. Every 13th row has none at all in a check.
__global__ void FillIdsKernel(int32_t* ids, const int32_t* begin, const int32_t* end, int rows,
                              int selected, Choice choice, uint64_t seed, bool with_empty_rows) {
  const int t = blockIdx.x;
  const int first = begin[t], length = max(0, end[t] - first);
  const int count = with_empty_rows && t % 13 == 5 ? 0 : min(length, selected);
  for (int i = threadIdx.x; i < selected; i += blockDim.x) {
    int id = -1;
    if (i < count) {
      const int64_t low = int64_t{length} * i / count, high = int64_t{length} * (i + 1) / count;
      const int row = choice == Choice::kNear ? t / 32 : t;
      id = static_cast<int>(low + Mix(seed + row, i) % (high - low));
      if (choice == Choice::kRuns)
        id = static_cast<int>(Mix(seed, t / 40) % (length - count + 1)) + i;
      id += first;
    }
    // Not sorted: odd rows backwards.
    ids[size_t(t) * selected + (t % 2 && i < count ? count - 1 - i : i)] = id;
  }
}

struct Buffers {
  Buffers(const Shape& shape, uint64_t seed, bool with_empty_rows)
      : q(size_t(shape.rows) * shape.heads * kQueryDim),
        k(size_t(shape.keys) * shape.heads * kQueryDim),
        v(size_t(shape.keys) * shape.heads * kValueDim),
        d_o(size_t(shape.rows) * shape.heads * kValueDim),
        o(d_o.size()),
        dq(q.size()),
        lse(size_t(shape.rows) * shape.heads),
        dk(k.size()),
        dv(v.size()),
        target(size_t(shape.rows) * shape.selected),
        begin(shape.rows),
        end(shape.rows),
        ids(size_t(shape.rows) * shape.selected) {
    FillNormal(q, 1.0f, seed);
    FillNormal(k, 0.6f, seed + 1);
    FillNormal(v, 1.0f, seed + 2);
    FillNormal(d_o, 1.0f, seed + 3);
    std::vector<int32_t> begins(shape.rows), ends(shape.rows);
    for (int t = 0; t < shape.rows; ++t) WindowOf(shape, t, seed, &begins[t], &ends[t]);
    begin.Upload(begins);
    end.Upload(ends);
    if (shape.choice != Choice::kNone) {
      FillIdsKernel<<<shape.rows, 256>>>(ids.get(), begin.get(), end.get(), shape.rows,
                                         shape.selected, shape.choice, seed, with_empty_rows);
      CheckLaunch("FillIds");
    }
    keys.num_rows = shape.rows;
    keys.num_keys = shape.keys;
    if (shape.window != Window::kNone) {
      keys.key_begin_T = begin.get();
      keys.key_end_T = end.get();
    }
    if (shape.choice != Choice::kNone) {
      keys.ids_TK = ids.get();
      keys.num_selected = shape.selected;
    }
  }
  size_t Workspace(const Shape& shape, MaskedAttentionPass pass) const {
    return LayOutMaskedAttention(keys, pass, shape.heads).bytes;
  }
  MaskedAttentionForwardArgs Forward(const Shape& shape, void* workspace) const {
    return {keys, q.get(), k.get(), v.get(), shape.heads, kScale, o.get(), lse.get(), workspace};
  }
  MaskedAttentionBackwardArgs Backward(const Shape& shape, void* workspace) const {
    MaskedAttentionBackwardArgs args;
    args.keys = keys;
    args.q_THQ = q.get();
    args.k_SHQ = k.get();
    args.v_SHV = v.get();
    args.o_THV = o.get();
    args.lse_TH = lse.get();
    args.do_THV = d_o.get();
    args.num_heads = shape.heads;
    args.scale = kScale;
    args.dq_THQ = dq.get();
    args.dk_SHQ = dk.get();
    args.dv_SHV = dv.get();
    args.target_TK = shape.choice == Choice::kNone ? nullptr : target.get();
    args.workspace = workspace;
    return args;
  }

  DeviceBuffer<__nv_bfloat16> q, k, v, d_o, o, dq;
  DeviceBuffer<float> lse, dk, dv, target;
  DeviceBuffer<int32_t> begin, end, ids;
  MaskedAttentionKeys keys;
};

// --- Checks -------------------------------------------------------------------------------------

int failures = 0;

void Expect(bool good, const char* what, double value) {
  std::printf("  %-64s %-10.3g %s\n", what, value, good ? "ok" : "FAILED");
  if (!good) ++failures;
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

MaskedProblem ToProblem(const Shape& shape, const Buffers& b) {
  MaskedProblem p;
  p.rows = shape.rows;
  p.keys = shape.keys;
  p.heads = shape.heads;
  p.num_selected = shape.choice == Choice::kNone ? 0 : shape.selected;
  p.scale = kScale;
  p.begin = b.begin.Download();
  p.end = b.end.Download();
  if (shape.choice != Choice::kNone) p.ids = b.ids.Download();
  p.q = ToDouble(b.q.Download());
  p.k = ToDouble(b.k.Download());
  p.v = ToDouble(b.v.Download());
  p.d_o = ToDouble(b.d_o.Download());
  return p;
}

// Largest difference; -inf must meet -inf.
double LseError(const std::vector<float>& lse, const std::vector<double>& reference) {
  double worst = 0;
  for (size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(reference[i]) && lse[i] == -INFINITY) continue;
    const double error = std::fabs(lse[i] - reference[i]);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

void CheckForward(const Shape& shape, const char* name, Buffers& b, const MaskedResult& reference) {
  DeviceBuffer<uint8_t> workspace(b.Workspace(shape, MaskedAttentionPass::kForward));
  const auto run = [&] {
    b.o.Poison();
    b.lse.Poison();
    LaunchMaskedAttentionForward(b.Forward(shape, workspace.get()), nullptr);
    CheckLaunch("masked attention forward");
  };
  workspace.Poison();
  run();
  const std::vector<__nv_bfloat16> o = b.o.Download();
  const std::vector<float> lse = b.lse.Download();
  workspace.Zero();
  run();
  char text[128];
  const double error = RelativeError(ToDouble(o), reference.o);
  std::snprintf(text, sizeof text, "%s o", name);
  Expect(error < 4e-3, text, error);
  const double lse_error = LseError(lse, reference.lse);
  std::snprintf(text, sizeof text, "%s lse", name);
  Expect(lse_error < 1e-4, text, lse_error);
  const bool same = SameBits(o, b.o.Download()) && SameBits(lse, b.lse.Download());
  Expect(same, "  the same bits again, whatever the workspace held", same);
}

// `before` is what dk and dv held.
double AddedError(const DeviceBuffer<float>& sum, const std::vector<double>& before,
                  const std::vector<double>& reference) {
  std::vector<double> added = ToDouble(sum.Download());
  for (size_t i = 0; i < added.size(); ++i) added[i] -= before[i];
  return RelativeError(added, reference);
}

struct Gradients {
  std::vector<__nv_bfloat16> dq;
  std::vector<float> dk, dv, target;
};

// After CheckForward, with its o and lse. `ds_bytes` of dS may be kept.
Gradients CheckBackward(const Shape& shape, const char* name, Buffers& b,
                        const MaskedResult& reference, int64_t ds_bytes) {
  b.keys.ds_bytes = ds_bytes;
  DeviceBuffer<uint8_t> workspace(b.Workspace(shape, MaskedAttentionPass::kBackward));
  const auto fill = [&] {
    b.dq.Poison();
    b.target.Poison();
    FillNormal(b.dk, 0.01f, 98);
    FillNormal(b.dv, 0.01f, 99);
  };
  const auto run = [&] {
    fill();
    LaunchMaskedAttentionBackward(b.Backward(shape, workspace.get()), nullptr);
    CheckLaunch("masked attention backward");
  };
  fill();
  const std::vector<double> dk_before = ToDouble(b.dk.Download());
  const std::vector<double> dv_before = ToDouble(b.dv.Download());
  workspace.Poison();
  run();
  const Gradients result = {b.dq.Download(), b.dk.Download(), b.dv.Download(), b.target.Download()};
  workspace.Zero();
  run();
  const std::pair<const char*, double> errors[] = {
      {"dq", RelativeError(ToDouble(result.dq), reference.dq)},
      {"dk", AddedError(b.dk, dk_before, reference.dk)},
      {"dv", AddedError(b.dv, dv_before, reference.dv)}};
  char text[128];
  for (const auto& [what, error] : errors) {
    std::snprintf(text, sizeof text, "%s %s", name, what);
    Expect(error < 6e-3, text, error);
  }
  if (shape.choice != Choice::kNone) {
    const double error = RelativeError(ToDouble(result.target), reference.target);
    std::snprintf(text, sizeof text, "%s target", name);
    Expect(error < 2e-5, text, error);
  }
  const bool same = SameBits(result.dq, b.dq.Download()) && SameBits(result.dk, b.dk.Download()) &&
                    SameBits(result.dv, b.dv.Download()) &&
                    (result.target.empty() || SameBits(result.target, b.target.Download()));
  Expect(same, "  the same bits again, whatever the workspace held", same);
  return result;
}

// dS of all heads kept, of few at a time, and none.
void CheckBackwards(const Shape& shape, const char* name, Buffers& b,
                    const MaskedResult& reference) {
  const int64_t head = MaskedTilesOfHead(b.keys) * kMaskedTileBytes;
  const Gradients all = CheckBackward(shape, name, b, reference, head * shape.heads);
  const Gradients few =
      CheckBackward(shape, "  few heads at a time", b, reference, head * (1 + shape.heads / 3));
  const Gradients none = CheckBackward(shape, "  dS made again", b, reference, 0);
  Expect(SameBits(all.dq, few.dq), "  dq does not depend on the heads at a time", 1);
  const bool same = SameBits(all.dk, few.dk) && SameBits(all.dv, few.dv) &&
                    SameBits(all.dk, none.dk) && SameBits(all.dv, none.dv);
  Expect(same, "  dk, dv of the three: the same bits", same);
  const double error = RelativeError(ToDouble(all.dq), ToDouble(none.dq));
  Expect(error < 6e-3, "  dq of a kept dS beside that of one made again", error);
}

void CheckShape(const Shape& shape, uint64_t seed) {
  char name[96];
  std::snprintf(name, sizeof name, "%s %s(%d) %dx%d heads %d", Name(shape.window),
                Name(shape.choice), shape.selected, shape.rows, shape.keys, shape.heads);
  Buffers b(shape, seed, /*with_empty_rows=*/true);
  const MaskedResult reference = ReferenceMaskedAttention(ToProblem(shape, b));
  CheckForward(shape, name, b, reference);
  CheckBackwards(shape, name, b, reference);
}

void CheckAll(uint64_t seed) {
  const Shape shapes[] = {
      {Window::kNone, Choice::kNone, 128, 128, 1},
      {Window::kNone, Choice::kNone, 1, 1, 3},
      {Window::kNone, Choice::kNone, 300, 517, 2},
      {Window::kCausal, Choice::kNone, 300, 300, 3},
      {Window::kCausal, Choice::kNone, 200, 1000, 16},
      {Window::kDocuments, Choice::kNone, 700, 700, 2},
      {Window::kRandom, Choice::kNone, 333, 450, 5},
      {Window::kLate, Choice::kNone, 400, 300, 2},
      {Window::kLate, Choice::kRandom, 400, 300, 2, 50},
      {Window::kCausal, Choice::kRandom, 256, 256, 2, 40},
      {Window::kCausal, Choice::kRandom, 700, 700, 3, 64},
      {Window::kCausal, Choice::kNear, 530, 1111, 2, 200},
      {Window::kCausal, Choice::kRuns, 640, 1300, 4, 100},
      {Window::kRandom, Choice::kRandom, 333, 450, 3, 33},
      {Window::kNone, Choice::kRandom, 97, 2000, 16, 2000},
      {Window::kDocuments, Choice::kRuns, 900, 900, 2, 150},
  };
  for (const Shape& shape : shapes) CheckShape(shape, ++seed);
}

// --- Timing -------------------------------------------------------------------------------------

void TimeShape(Timer& timer, Report& report, const Shape& shape, double gemm) {
  Buffers b(shape, 7, /*with_empty_rows=*/false);
  double pairs = 0;
  for (int t = 0; t < shape.rows; ++t) {
    int32_t begin, end;
    WindowOf(shape, t, 7, &begin, &end);
    pairs += std::max(0, end - begin);
  }
  pairs *= shape.heads;
  const int repeats = pairs > 3e9 ? 5 : 11;
  const auto add = [&](const char* pass, double ms, double flop) {
    const double tf = pairs * flop / (ms * 1e9);
    report.Add({{"masked_attention", pass},
                {"window", Name(shape.window)},
                {"selected", Name(shape.choice)},
                {"rows", std::to_string(shape.rows)},
                {"keys", std::to_string(shape.keys)},
                {"heads", std::to_string(shape.heads)},
                {"ms", Number(ms, 3)},
                {"TF", Number(tf)},
                {"% GEMM", Number(100 * tf / gemm)}});
  };
  {
    DeviceBuffer<uint8_t> workspace(b.Workspace(shape, MaskedAttentionPass::kForward));
    const MaskedAttentionForwardArgs args = b.Forward(shape, workspace.get());
    add("forward", timer.MedianMs([&] { LaunchMaskedAttentionForward(args, nullptr); }, repeats),
        2.0 * (kQueryDim + kValueDim));
  }
  // Gradients of keys written in bf16, as for all rows of a sequence. In turns, so that all of them
  // find the chip as warm.
  DeviceBuffer<__nv_bfloat16> dk(b.k.size()), dv(b.v.size());
  struct Variant {
    const char* name;
    int64_t ds_bytes;
    bool target;
    std::vector<double> ms = {};
  };
  std::vector<Variant> variants = {{"backward", kMaskedScoreGradientBytes, false},
                                   {"dS made again", 0, false}};
  if (shape.choice != Choice::kNone) {
    variants.push_back({"with target", kMaskedScoreGradientBytes, true});
    variants.push_back({"again, target", 0, true});
  }
  b.keys.ds_bytes = kMaskedScoreGradientBytes;
  DeviceBuffer<uint8_t> workspace(b.Workspace(shape, MaskedAttentionPass::kBackward));
  for (int turn = 0; turn < repeats; ++turn) {
    for (Variant& variant : variants) {
      b.keys.ds_bytes = variant.ds_bytes;
      MaskedAttentionBackwardArgs args = b.Backward(shape, workspace.get());
      args.dk_SHQ = dk.get();
      args.dv_SHV = dv.get();
      args.writes_keys = true;
      if (!variant.target) args.target_TK = nullptr;
      variant.ms.push_back(
          timer.MedianMs([&] { LaunchMaskedAttentionBackward(args, nullptr); }, 1));
    }
  }
  for (Variant& variant : variants) {
    std::sort(variant.ms.begin(), variant.ms.end());
    add(variant.name, variant.ms[variant.ms.size() / 2], 2.0 * (3 * kQueryDim + 2 * kValueDim));
  }
}

struct Options {
  bool check = false, time = true;
  int keys = 0;  // time only these; 0: all
  std::string json;
};

int Run(const Options& options) {
  if (options.check) {
    const uint64_t seed = std::random_device()();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    CheckAll(seed);
    if (failures > 0) {
      std::printf("%d FAILED\n", failures);
      return 1;
    }
  }
  if (!options.time) return 0;
  Timer timer;
  Report report;
  const double gemm = GemmTflops(timer);
  std::printf("GEMM %.1f TF\n", gemm);
  for (const int keys : {4096, 8192, 16384, 32768}) {
    if (options.keys != 0 && options.keys != keys) continue;
    for (const Choice choice : {Choice::kNone, Choice::kRandom, Choice::kNear}) {
      if (choice == Choice::kNear && keys != 8192 && keys != 16384) continue;
      TimeShape(timer, report, {Window::kCausal, choice, keys, keys, 128, 2048}, gemm);
    }
  }
  if (options.keys == 0 || options.keys == 16384) {
    TimeShape(timer, report, {Window::kDocuments, Choice::kNone, 16384, 16384, 128}, gemm);
  }
  Finish(timer, report, options.json);
  return 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) {
  baleen::bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--check") {
      options.check = true;
    } else if (word == "--only=check") {
      options.check = true;
      options.time = false;
    } else if (word.rfind("--keys=", 0) == 0) {
      options.keys = std::atoi(word.c_str() + 7);
    } else if (word.rfind("--json=", 0) == 0) {
      options.json = word.substr(7);
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      return 2;
    }
  }
  return baleen::bench::Run(options);
}
