// Checks and times block FP8: the quantisers beside a device copy, the dense products by cuBLASLt
// and the experts' kernel beside an FP8 product with one scale an operand and beside bf16.
//
// Usage: fp8_bench [--check] [--json=FILE]. "product" times the product alone, "with codes" also
// the quantisers that a call needs: of rows (or columns), of W. Checks compare the experts' kernel
// in all its variants with cuBLASLt's product for each expert; both with scales that differ. The
// exit code is 1 if one fails. (tests/cuda/ops_fp8_linear_test.cc compares all of it with the
// definition.)
#include <cublasLt.h>

#include "kernels/bench/harness.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/ops/linear/fp8_grouped_cuda.h"
#include "kernels/ops/linear/fp8_linear_cuda.h"
#include "kernels/ops/linear/fp8_quantise_cuda.h"
#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "kernels/ops/linear/matmul_cuda.h"

namespace baleen::bench {
namespace {

using Bf16 = __nv_bfloat16;
using Bytes = DeviceBuffer<uint8_t>;

constexpr int kRepeats = 7;

MatmulCudaLibrary OpenLibrary() {
  cublasLtHandle_t handle = nullptr;
  if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS) std::exit(1);
  static Bytes* const workspace = new Bytes(32 << 20);
  return {handle, workspace->get(), static_cast<int64_t>(workspace->bytes())};
}

// TFLOP/s of cuBLASLt e4m3 -> bf16, 8192^3, one scale an operand, fast accumulation: the ceiling.
double Fp8GemmTflops(Timer& timer, const MatmulCudaLibrary& library) {
  constexpr int kSize = 8192;
  Bytes a(size_t{kSize} * kSize), b(a.size());
  DeviceBuffer<Bf16> c(a.size()), values(a.size());
  FillNormal(values, 1.0f, 1);
  DeviceBuffer<float> scales(a.size() / 128);
  Fp8QuantiseCudaArgs quantise{1,     kSize, kSize,   values.get(), kSize,
                               kSize, kSize, a.get(), scales.get()};
  Fp8QuantiseRowsCuda(quantise, nullptr);
  quantise.codes = b.get();
  Fp8QuantiseRowsCuda(quantise, nullptr);
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t layout, result;
  cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const int8_t fast = 1;
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                 sizeof transposed);
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast);
  cublasLtMatrixLayoutCreate(&layout, CUDA_R_8F_E4M3, kSize, kSize, kSize);
  cublasLtMatrixLayoutCreate(&result, CUDA_R_16BF, kSize, kSize, kSize);
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulPreferenceCreate(&preference);
  const size_t workspace = static_cast<size_t>(library.workspace_bytes);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                       &workspace, sizeof workspace);
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  const auto handle = static_cast<cublasLtHandle_t>(library.handle);
  cublasLtMatmulAlgoGetHeuristic(handle, product, layout, layout, result, result, preference, 1,
                                 &best, &found);
  if (found == 0) return 0;
  const float one = 1, zero = 0;
  const double ms = timer.MedianMs([&] {
    cublasLtMatmul(handle, product, &one, a.get(), layout, b.get(), layout, &zero, c.get(), result,
                   c.get(), result, &best.algo, library.workspace, workspace, nullptr);
  });
  return 2.0 * kSize * kSize * kSize / (ms * 1e9);
}

// An operand in its codes; `Make` runs the quantiser again.
struct Operand {
  enum Kind { kRows, kColumns, kWeight, kWeightTransposed };
  Operand(Kind kind, const Bf16* values, int64_t batch, int64_t rows, int64_t columns)
      : kind(kind),
        outer(kind == kColumns || kind == kWeightTransposed ? columns : rows),
        depth(kind == kColumns || kind == kWeightTransposed ? rows : columns),
        depth_stored((depth + 127) / 128 * 128),
        stride(kind == kRows || kind == kColumns ? outer : (depth_stored / 128 + 3) / 4 * 4),
        codes(batch * outer * depth_stored),
        scales(kind == kRows || kind == kColumns ? depth_stored / 128 * stride
                                                 : batch * ((outer + 127) / 128) * stride) {
    args = {batch, rows, columns, values, outer, depth_stored, stride, codes.get(), scales.get()};
    Make();
  }
  void Make() const {
    if (kind == kRows) return Fp8QuantiseRowsCuda(args, nullptr);
    if (kind == kColumns) return Fp8QuantiseColumnsCuda(args, nullptr);
    Fp8QuantiseBlocksCuda(args, kind == kWeightTransposed, nullptr);
  }
  Fp8MatmulCudaOperand ForProduct() const {
    return {codes.get(), scales.get(), kind == kWeight || kind == kWeightTransposed};
  }
  Kind kind;
  int64_t outer, depth, depth_stored, stride;
  Bytes codes;
  DeviceBuffer<float> scales;
  Fp8QuantiseCudaArgs args;
};

void TimeQuantisers(Timer& timer, Report& report, double copy) {
  const auto time = [&](const char* name, Operand::Kind kind, int64_t batch, int64_t rows,
                        int64_t columns) {
    DeviceBuffer<Bf16> values(batch * rows * columns);
    FillNormal(values, 1.0f, 1);
    const Operand operand(kind, values.get(), batch, rows, columns);
    const double ms = timer.MedianMs([&] { operand.Make(); }, kRepeats);
    const double bytes = values.bytes() + operand.codes.bytes() + operand.scales.bytes();
    report.Add({{"quantiser", name},
                {"values", std::to_string(batch) + " x " + std::to_string(rows) + " x " +
                               std::to_string(columns)},
                {"us", Number(ms * 1e3)},
                {"GB/s", Number(bytes / (ms * 1e6))},
                {"% copy", Number(bytes / (ms * 1e9) / copy * 100)}});
  };
  time("rows", Operand::kRows, 1, 8192, 7168);
  time("columns", Operand::kColumns, 1, 8192, 7168);
  time("rows", Operand::kRows, 1, 8192, 1536);
  time("columns", Operand::kColumns, 1, 8192, 1536);
  time("weight", Operand::kWeight, 1, 18432, 7168);
  time("weight^T", Operand::kWeightTransposed, 1, 18432, 7168);
  time("weight", Operand::kWeight, 1, 2048, 7168);
  time("weight", Operand::kWeight, 8, 2048, 7168);
  time("weight^T", Operand::kWeightTransposed, 8, 2048, 7168);
}

// C [m, n] over k: `a` and `b` in codes, their values in bf16 for the product beside.
struct Dense {
  const char* name;
  const Operand &a, &b;
  MatmulCudaOperand bf16_a, bf16_b;
  bool gradient;
};

void TimeProduct(Timer& timer, Report& report, const MatmulCudaLibrary& library, const Dense& c,
                 int64_t in, int64_t out, void* result, double ceiling) {
  Fp8MatmulCudaArgs args;
  args.m = c.a.outer;
  args.n = c.b.outer;
  args.k = c.a.depth_stored;
  args.a = c.a.ForProduct();
  args.b = c.b.ForProduct();
  args.result_element = c.gradient ? CudaElement::kF32 : CudaElement::kBF16;
  args.c = result;
  args.add = c.gradient;
  MatmulCudaArgs bf16;
  bf16.result_element = args.result_element;
  bf16.batch = 1;
  bf16.m = args.m;
  bf16.n = args.n;
  bf16.k = args.k;
  bf16.a = c.bf16_a;
  bf16.b = c.bf16_b;
  bf16.c = result;
  bf16.c_row_stride = args.n;
  bf16.add = args.add;
  const double flops = 2e-9 * args.m * args.n * args.k;
  const double product =
      flops / timer.MedianMs([&] { Fp8MatmulCuda(args, library, nullptr); }, kRepeats);
  const double all = flops / timer.MedianMs(
                                 [&] {
                                   c.a.Make();
                                   c.b.Make();
                                   Fp8MatmulCuda(args, library, nullptr);
                                 },
                                 kRepeats);
  const double beside =
      flops / timer.MedianMs([&] { MatmulCuda(bf16, library, nullptr); }, kRepeats);
  report.Add({{"dense", c.name},
              {"rows", "8192"},
              {"in", std::to_string(in)},
              {"out", std::to_string(out)},
              {"product TF", Number(product)},
              {"% fp8 GEMM", Number(100 * product / ceiling)},
              {"with codes", Number(all)},
              {"bf16 TF", Number(beside)},
              {"gain", Number(all / beside, 2)}});
}

void TimeDense(Timer& timer, Report& report, const MatmulCudaLibrary& library, double ceiling) {
  const int64_t rows = 8192;
  const int64_t widths[][2] = {
      {7168, 1536}, {7168, 2048}, {7168, 4096}, {16384, 7168}, {7168, 18432}};
  for (const auto& [in, out] : widths) {
    DeviceBuffer<Bf16> x(rows * in), dy(rows * out), w(in * out);
    DeviceBuffer<float> result(std::max(in * out, rows * std::max(in, out)));
    FillNormal(x, 1.0f, 1);
    FillNormal(dy, 1.0f, 2);
    FillNormal(w, 0.02f, 3);
    result.Zero();
    {
      const Operand a(Operand::kRows, x.get(), 1, rows, in),
          b(Operand::kWeight, w.get(), 1, out, in);
      TimeProduct(timer, report, library,
                  {"forward", a, b, {x.get(), 0, in, false}, {w.get(), 0, in, true}, false}, in,
                  out, result.get(), ceiling);
    }
    {
      const Operand a(Operand::kRows, dy.get(), 1, rows, out),
          b(Operand::kWeightTransposed, w.get(), 1, out, in);
      TimeProduct(timer, report, library,
                  {"dgrad", a, b, {dy.get(), 0, out, false}, {w.get(), 0, in, false}, false}, in,
                  out, result.get(), ceiling);
    }
    const Operand a(Operand::kColumns, dy.get(), 1, rows, out),
        b(Operand::kColumns, x.get(), 1, rows, in);
    TimeProduct(timer, report, library,
                {"wgrad", a, b, {dy.get(), 0, out, true}, {x.get(), 0, in, false}, true}, in, out,
                result.get(), ceiling);
  }
}

Fp8GroupedCudaArgs GroupedArgs(const Operand& a, const Operand& b,
                               const DeviceBuffer<int32_t>& offsets, Bf16* result) {
  Fp8GroupedCudaArgs args;
  args.num_rows = a.outer;
  args.num_experts = static_cast<int64_t>(offsets.size()) - 1;
  args.columns = b.outer;
  args.depth = a.depth_stored;
  args.offsets_L1 = offsets.get();
  args.a_codes = a.codes.get();
  args.a_scales = a.scales.get();
  args.a_scale_stride = a.stride;
  args.b_codes = b.codes.get();
  args.b_scales = b.scales.get();
  args.b_scale_stride = b.stride;
  args.result = result;
  return args;
}

constexpr int kVariants[][2] = {{1, 128}, {1, 192}, {2, 128}, {2, 192}};  // cluster, columns

int CheckGrouped(const MatmulCudaLibrary& library) {
  const int64_t in = 1168, out = 976;
  const std::vector<int32_t> host = {0, 160, 160, 1200, 2000};
  const int64_t rows = host.back(), experts = static_cast<int64_t>(host.size()) - 1;
  DeviceBuffer<Bf16> x(rows * in), w(experts * in * out), result(rows * out), expected(rows * out);
  FillNormal(x, 1.0f, 5);
  FillNormal(w, 0.02f, 6);
  const DeviceBuffer<int32_t> offsets(host);
  const Operand a(Operand::kRows, x.get(), 1, rows, in),
      b(Operand::kWeight, w.get(), experts, out, in);
  for (int64_t l = 0; l < experts; ++l) {
    const int64_t begin = host[l], count = host[l + 1] - begin;
    if (count == 0) continue;
    const Operand part(Operand::kRows, x.get() + begin * in, 1, count, in),
        weight(Operand::kWeight, w.get() + l * in * out, 1, out, in);
    Fp8MatmulCudaArgs args;
    args.m = count;
    args.n = out;
    args.k = part.depth_stored;
    args.a = part.ForProduct();
    args.b = weight.ForProduct();
    args.c = expected.get() + begin * out;
    Fp8MatmulCuda(args, library, nullptr);
    CheckLaunch("expected");
  }
  int failures = 0;
  for (const auto& [cluster, tile_n] : kVariants) {
    result.Poison();
    const Fp8GroupedCudaArgs args = GroupedArgs(a, b, offsets, result.get());
    LaunchFp8Grouped(args, PlanFp8Grouped(args, cuda::NumMultiprocessors(), cluster, tile_n),
                     nullptr);
    CheckLaunch("grouped");
    const double error = RelativeError(ToDouble(result.Download()), ToDouble(expected.Download()));
    const bool good = error < 0x1p-8;
    std::printf("  grouped, %d blocks, %d columns: %-10.3g %s\n", cluster, tile_n, error,
                good ? "ok" : "FAILED");
    failures += !good;
  }
  return failures;
}

void TimeGrouped(Timer& timer, Report& report, double ceiling) {
  constexpr int64_t kExperts = 8;
  const int64_t widths[][2] = {{7168, 4096}, {2048, 7168}};  // gate and up together; down
  for (const auto& [in, out] : widths) {
    DeviceBuffer<Bf16> w(kExperts * in * out);
    FillNormal(w, 0.02f, 2);
    const Operand b(Operand::kWeight, w.get(), kExperts, out, in);
    for (const int64_t per_expert : {1024, 2048, 4096, 8192}) {
      const int64_t rows = kExperts * per_expert;
      DeviceBuffer<Bf16> x(rows * in), result(rows * out);
      FillNormal(x, 1.0f, 1);
      std::vector<int32_t> host;
      for (int64_t l = 0; l <= kExperts; ++l) host.push_back(static_cast<int32_t>(l * per_expert));
      const DeviceBuffer<int32_t> offsets(host);
      const Operand a(Operand::kRows, x.get(), 1, rows, in);
      const Fp8GroupedCudaArgs args = GroupedArgs(a, b, offsets, result.get());
      const double flops = 2e-9 * rows * in * out;
      Report::Row row = {{"grouped", "8 x " + std::to_string(per_expert)},
                         {"in", std::to_string(in)},
                         {"out", std::to_string(out)}};
      for (const auto& [cluster, tile_n] : kVariants) {
        const Fp8GroupedPlan plan =
            PlanFp8Grouped(args, cuda::NumMultiprocessors(), cluster, tile_n);
        row.push_back({std::to_string(cluster) + " x " + std::to_string(tile_n),
                       Number(flops / timer.MedianMs([&] { LaunchFp8Grouped(args, plan, nullptr); },
                                                     kRepeats))});
      }
      const double product =
          flops / timer.MedianMs([&] { Fp8GroupedCuda(args, nullptr); }, kRepeats);
      const double all = flops / timer.MedianMs(
                                     [&] {
                                       a.Make();
                                       b.Make();
                                       Fp8GroupedCuda(args, nullptr);
                                     },
                                     kRepeats);
      GroupedMatmulCudaArgs bf16;
      bf16.num_rows = rows;
      bf16.num_experts = kExperts;
      bf16.in = in;
      bf16.out = out;
      bf16.offsets_L1 = offsets.get();
      bf16.left = x.get();
      bf16.right = w.get();
      bf16.result = result.get();
      const double beside =
          flops /
          timer.MedianMs([&] { GroupedMatmulCuda(GroupedProduct::kForward, bf16, nullptr); },
                         kRepeats);
      row.push_back({"chosen TF", Number(product)});
      row.push_back({"% fp8 GEMM", Number(100 * product / ceiling)});
      row.push_back({"with codes", Number(all)});
      row.push_back({"bf16 TF", Number(beside)});
      row.push_back({"gain", Number(all / beside, 2)});
      report.Add(row);
    }
  }
}

int Main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was found before a hang is seen
  std::string json;
  bool check = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--check") {
      check = true;
    } else if (word.rfind("--json=", 0) == 0) {
      json = word.substr(7);
    } else {
      std::fprintf(stderr, "fp8_bench: unknown word %s\n", argv[i]);
      return 2;
    }
  }
  const MatmulCudaLibrary library = OpenLibrary();
  const int failures = check ? CheckGrouped(library) : 0;
  Timer timer;
  Report report;
  const double copy = CopyTbs(timer), ceiling = Fp8GemmTflops(timer, library);
  TimeQuantisers(timer, report, copy);
  TimeGrouped(timer, report, ceiling);
  TimeDense(timer, report, library, ceiling);
  std::printf("copy %.2f TB/s; fp8 GEMM 8192^3 %.0f TF before, %.0f after; bf16 GEMM %.0f TF\n",
              copy, ceiling, Fp8GemmTflops(timer, library), GemmTflops(timer));
  report.Print();
  if (!json.empty()) report.WriteJson(json);
  return failures > 0 ? 1 : 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) { return baleen::bench::Main(argc, argv); }
