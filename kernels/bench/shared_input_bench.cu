// Checks and times the gradient of an input that two layers of the experts share,
//   dx[n] = Wa[l(n)]^T dya[n] + Wb[l(n)]^T dyb[n],
// as one grouped product over both pairs, beside the two products and the sum that it stands for.
//
// Usage: shared_input_bench [--check] [--json=FILE]. Checks compare with sums in double on the
// device, on fresh random inputs and poisoned outputs, every call twice for equal bits; the exit
// code is 1 if one fails.
#include <cstring>
#include <ctime>
#include <type_traits>

#include "kernels/bench/gemm_reference.cuh"
#include "kernels/bench/harness.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/ops/elementwise_cuda.h"
#include "kernels/ops/linear/grouped_matmul_cuda.h"

namespace baleen::bench {
namespace {

constexpr GroupedProduct kOne = GroupedProduct::kBackwardInput,
                         kTwo = GroupedProduct::kBackwardInputOfTwo;

template <typename T>
struct TwoLayers {
  TwoLayers(const std::vector<int32_t>& host_offsets, int in_width, int out_width, uint64_t seed)
      : offsets(host_offsets),
        rows(host_offsets.back()),
        experts(static_cast<int>(host_offsets.size()) - 1),
        in(in_width),
        out(out_width),
        dya(size_t(rows) * out),
        dyb(dya.size()),
        weight_a(size_t(experts) * in * out),
        weight_b(weight_a.size()),
        dx(size_t(rows) * in) {
    FillNormal(dya, 1.0f, seed);
    FillNormal(dyb, 1.0f, seed + 1);
    FillNormal(weight_a, 1.0f, seed + 2);
    FillNormal(weight_b, 1.0f, seed + 3);
    dx.Poison();
  }
  GroupedMatmulCudaArgs Args() const {
    GroupedMatmulCudaArgs args;
    args.element = std::is_same_v<T, float> ? CudaElement::kF32 : CudaElement::kBF16;
    args.num_rows = rows;
    args.num_experts = experts;
    args.in = in;
    args.out = out;
    args.offsets_L1 = offsets.get();
    args.left = dya.get(), args.right = weight_a.get(), args.result = dx.get();
    args.second_left = dyb.get(), args.second_right = weight_b.get();
    return args;
  }

  DeviceBuffer<int32_t> offsets;
  int rows, experts, in, out;
  DeviceBuffer<T> dya, dyb, weight_a, weight_b, dx;
};

// --- Checks -----------------------------------------------------------------------------------

int failures = 0;

void Run(const GroupedMatmulCudaArgs& args, int cluster) {
  static const int num_sms = cuda::NumMultiprocessors();
  LaunchGroupedMatmul(kTwo, args, PlanGroupedMatmul(kTwo, args, num_sms, cluster), nullptr);
  CheckLaunch("grouped");
}

template <typename T>
void CheckCase(const std::vector<int32_t>& offsets, int in, int out, uint64_t seed) {
  TwoLayers<T> c(offsets, in, out, seed);
  DeviceBuffer<double> reference(c.dx.size());
  reference.Poison();
  if (c.dx.size() > 0) {
    GroupedReference<T><<<static_cast<unsigned>((c.dx.size() + 255) / 256), 256>>>(
        kTwo, c.Args(), reference.get(), c.dx.size());
    CheckLaunch("reference");
  }
  const std::vector<double> expected = reference.Download();
  // One rounding to bf16; sums of fp32 products have 2^-24 a product, which do not line up.
  const double tolerance = std::is_same_v<T, float> ? 0x1p-24 * (4 + std::sqrt(2.0 * out)) : 0x1p-8;
  for (const int cluster : {1, 2}) {
    c.dx.Poison();
    Run(c.Args(), cluster);
    const std::vector<T> once = c.dx.Download();
    c.dx.Poison();
    Run(c.Args(), cluster);
    const std::vector<T> again = c.dx.Download();
    const bool same = std::memcmp(once.data(), again.data(), c.dx.bytes()) == 0;
    const double error = RelativeError(ToDouble(once), expected);
    const bool good = same && error < tolerance;
    std::printf("  %s cluster %d, %d experts, %d rows, %d -> %d: %-10.3g %s\n",
                std::is_same_v<T, float> ? "f32 " : "bf16", cluster, c.experts, c.rows, in, out,
                same ? error : NAN, good ? "ok" : "FAILED");
    if (!good) ++failures;
  }
}

void CheckAll(uint64_t seed) {
  const std::vector<std::vector<int32_t>> cases = {{0, 1},
                                                   {0, 0, 0, 5, 5},
                                                   {0, 128, 256, 512},
                                                   {0, 64, 193, 193, 320},
                                                   {0, 63, 127, 700},
                                                   {0, 0, 1000, 1000},
                                                   {0, 1, 2, 3, 4, 5, 6, 7, 8},
                                                   {0, 0}};
  for (const std::vector<int32_t>& offsets : cases) {
    CheckCase<__nv_bfloat16>(offsets, 200, 328, seed += 10);
    CheckCase<__nv_bfloat16>(offsets, 264, 8, seed += 10);
    CheckCase<__nv_bfloat16>(offsets, 37, 19, seed += 10);
    CheckCase<float>(offsets, 72, 130, seed += 10);
  }
  // Many tiles a block: the stages of one tile run into the next one's.
  CheckCase<__nv_bfloat16>({0, 2100, 2100, 4000, 4513, 9001}, 1032, 520, seed += 10);
  std::printf("%d checks failed\n", failures);
}

// --- Times ------------------------------------------------------------------------------------

// Median milliseconds of each, all in turns: what the card's heat does, it does to all.
std::vector<double> MedianInTurns(Timer& timer, const std::vector<std::function<void()>>& works,
                                  int rounds) {
  std::vector<std::vector<double>> times(works.size());
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < works.size(); ++i) {
      times[i].push_back(timer.MedianMs(works[i], 1));
    }
  }
  std::vector<double> medians;
  for (std::vector<double>& of_one : times) {
    std::sort(of_one.begin(), of_one.end());
    medians.push_back(of_one[of_one.size() / 2]);
  }
  return medians;
}

void TimeCase(Timer& timer, Report& report, int rows, int experts, int in, int out) {
  std::vector<int32_t> equal(experts + 1);
  for (int l = 0; l <= experts; ++l) equal[l] = rows / experts * l;
  TwoLayers<__nv_bfloat16> c(equal, in, out, 1);
  DeviceBuffer<__nv_bfloat16> second(c.dx.size());
  const auto two_products = [&] {
    GroupedMatmulCudaArgs args = c.Args();
    GroupedMatmulCuda(kOne, args, nullptr);
    args.left = c.dyb.get(), args.right = c.weight_b.get(), args.result = second.get();
    GroupedMatmulCuda(kOne, args, nullptr);
    AddCuda(CudaElement::kBF16, static_cast<int64_t>(c.dx.size()), c.dx.get(), second.get(),
            c.dx.get(), nullptr);
  };
  const double gemm = GemmTflops(timer);
  const std::vector<double> ms =
      MedianInTurns(timer,
                    {[&] { GroupedMatmulCuda(kOne, c.Args(), nullptr); }, two_products,
                     [&] { GroupedMatmulCuda(kTwo, c.Args(), nullptr); }},
                    9);
  const double flops = 2.0 * rows * in * out;
  report.Add({{"rows", std::to_string(rows)},
              {"experts", std::to_string(experts)},
              {"in", std::to_string(in)},
              {"out", std::to_string(out)},
              {"one pair TF", Number(flops / (ms[0] * 1e9))},
              {"two + sum ms", Number(ms[1], 3)},
              {"TF", Number(2 * flops / (ms[1] * 1e9))},
              {"of two ms", Number(ms[2], 3)},
              {"TF ", Number(2 * flops / (ms[2] * 1e9))},
              {"8192^3", Number(gemm)}});
}

int Main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was found before a hang is seen
  std::string json;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--check") {
      const uint64_t seed = static_cast<uint64_t>(std::time(nullptr));
      std::printf("checks, seed %llu\n", static_cast<unsigned long long>(seed));
      CheckAll(seed);
    } else if (word.rfind("--json=", 0) == 0) {
      json = word.substr(7);
    } else {
      std::fprintf(stderr, "shared_input_bench: unknown word %s\n", argv[i]);
      return 2;
    }
  }
  Timer timer;
  Report report;
  for (const int rows : {65536, 262144}) TimeCase(timer, report, rows, 8, 7168, 2048);
  TimeCase(timer, report, 65536, 64, 7168, 2048);
  report.Print();
  if (!json.empty()) report.WriteJson(json);
  return failures > 0 ? 1 : 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) { return baleen::bench::Main(argc, argv); }
