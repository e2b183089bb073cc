// Checks and times the matrix products: cuBLASLt as Matmul calls it, and the grouped GEMM of the
// experts beside the cuBLASLt product of the same size.
//
// Usage: gemm_bench check|grouped|dense... [--cluster=1|2] [--json=FILE] (words run in turn). The
// grouped GEMM runs with one block a tile and with two that share B, or only as --cluster says.
// Checks compare with sums in double on the device, on fresh random inputs and poisoned outputs,
// every call twice for equal bits; the exit code is 1 if one fails.
#include <cublasLt.h>

#include <cstring>
#include <ctime>
#include <type_traits>

#include "kernels/bench/gemm_reference.cuh"
#include "kernels/bench/harness.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "kernels/ops/linear/matmul_cuda.h"

namespace baleen::bench {
namespace {

int failures = 0;
std::vector<int> clusters = {1, 2};

void Expect(bool good, const std::string& what, double value) {
  std::printf("  %-76s %-10.3g %s\n", what.c_str(), value, good ? "ok" : "FAILED");
  if (!good) ++failures;
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
constexpr CudaElement kElement = std::is_same_v<T, float> ? CudaElement::kF32 : CudaElement::kBF16;

// ||error|| / ||result|| of sums of K products of T, kept as C. bf16 (8 bits) rounds once, by 2^-8
// at most. fp32 sums of fp32 products: K roundings of 2^-24 that do not line up. The tensor cores
// cut the running sum off at each 16 products instead of rounding, so theirs may line up: 2^-23
// each.
template <typename T, typename C>
double Tolerance(int64_t k) {
  if (!std::is_same_v<C, float>) return 0x1p-8;
  return std::is_same_v<T, float> ? 0x1p-24 * (4 + std::sqrt(double(k))) : 0x1p-23 * (4 + k / 16);
}

constexpr GroupedProduct kProducts[] = {GroupedProduct::kForward, GroupedProduct::kBackwardInput,
                                        GroupedProduct::kBackwardWeight};

// --- Matmul -----------------------------------------------------------------------------------

MatmulCudaLibrary OpenLibrary() {
  cublasLtHandle_t handle = nullptr;
  if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS) std::exit(1);
  static DeviceBuffer<uint8_t>* const workspace = new DeviceBuffer<uint8_t>(32 << 20);
  return {handle, workspace->get(), static_cast<int64_t>(workspace->bytes())};
}

struct MatmulCase {
  int64_t batch, m, n, k;
  bool transpose_a, transpose_b, add;
  float alpha;
  int pad;        // elements between rows and between matrices; 0: dense
  bool per_head;  // the batch runs inside the rows
  bool shared_b;  // one B for all of the batch
};

// Rows of `cols` elements with gaps, or the heads of [rows, batch, cols].
struct Strides {
  int64_t row, batch, elements;
  Strides(const MatmulCase& c, int64_t rows, int64_t cols) {
    if (c.per_head) {
      batch = cols;
      row = c.batch * cols;
      elements = rows * row;
    } else {
      row = cols + c.pad;
      batch = rows * row + c.pad;
      elements = c.batch * batch;
    }
  }
};

template <typename T, typename C>
void CheckMatmul(const MatmulCudaLibrary& library, const MatmulCase& c, uint64_t seed) {
  const Strides a_at(c, c.transpose_a ? c.k : c.m, c.transpose_a ? c.m : c.k);
  const Strides b_at(c, c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n);
  const Strides c_at(c, c.m, c.n);
  DeviceBuffer<T> a(a_at.elements), b(b_at.elements);
  DeviceBuffer<C> result(c_at.elements);
  DeviceBuffer<double> reference(c_at.elements);
  FillNormal(a, 1.0f, seed);
  FillNormal(b, 1.0f, seed + 1);
  FillNormal(result, 1.0f, seed + 2);
  const std::vector<C> before = result.Download();

  MatmulCudaArgs args;
  args.element = kElement<T>;
  args.result_element = kElement<C>;
  args.batch = c.batch;
  args.m = c.m;
  args.n = c.n;
  args.k = c.k;
  args.a = {a.get(), a_at.batch, a_at.row, c.transpose_a};
  args.b = {b.get(), c.shared_b ? 0 : b_at.batch, b_at.row, c.transpose_b};
  args.c = result.get();
  args.c_batch_stride = c_at.batch;
  args.c_row_stride = c_at.row;
  args.alpha = c.alpha;
  args.add = c.add;

  // The reference works in place too: what it does not write keeps the value from before.
  reference.Upload(ToDouble(before));
  MatmulReference<T><<<dim3((c.n + 63) / 64, c.m, c.batch), 64>>>(args, reference.get());
  CheckLaunch("reference");
  MatmulCuda(args, library, nullptr);
  CheckLaunch("matmul");
  const std::vector<C> once = result.Download();
  result.Upload(before);
  MatmulCuda(args, library, nullptr);
  CheckLaunch("matmul");
  const bool same = SameBits(once, result.Download());
  const std::vector<double> expected = reference.Download();
  const double error = RelativeError(ToDouble(once), expected);
  char text[128];
  std::snprintf(
      text, sizeof text, "matmul %s->%s %lldx %lldx%lldx%lld %c%c%s pad %d%s%s",
      std::is_same_v<T, float> ? "f32" : "bf16", std::is_same_v<C, float> ? "f32" : "bf16",
      static_cast<long long>(c.batch), static_cast<long long>(c.m), static_cast<long long>(c.n),
      static_cast<long long>(c.k), c.transpose_a ? 'T' : 'N', c.transpose_b ? 'T' : 'N',
      c.add ? " add" : "", c.pad, c.per_head ? " heads" : "", c.shared_b ? " shared B" : "");
  Expect(same && error < Tolerance<T, C>(c.k), text, same ? error : NAN);
}

void CheckMatmuls(const MatmulCudaLibrary& library, uint64_t seed) {
  std::vector<MatmulCase> cases;
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      cases.push_back({1, 256, 512, 384, ta, tb, false, 1.0f, 0, false, false});
      cases.push_back({1, 129, 77, 333, ta, tb, true, 1.0f, 0, false, false});
      cases.push_back({3, 65, 130, 51, ta, tb, false, 0.5f, 5, false, false});
      cases.push_back({16, 200, 128, 64, ta, tb, true, 0.125f, 0, true, false});
      cases.push_back({4, 40, 72, 96, ta, tb, false, 1.0f, 8, false, true});
    }
  }
  cases.push_back({1, 1, 2048, 7168, false, true, false, 1.0f, 0, false, false});
  cases.push_back({1, 64, 48, 30000, true, false, true, 1.0f, 0, false, false});  // split K tempts
  cases.push_back({1, 3, 1, 1, false, false, false, 1.0f, 0, false, false});
  cases.push_back({2, 7, 9, 0, false, false, false, 1.0f, 3, false, false});
  for (const MatmulCase& c : cases) {
    CheckMatmul<__nv_bfloat16, __nv_bfloat16>(library, c, seed += 10);
    CheckMatmul<__nv_bfloat16, float>(library, c, seed += 10);
    CheckMatmul<float, float>(library, c, seed += 10);
  }
}

// --- Grouped GEMM -----------------------------------------------------------------------------

const char* Name(GroupedProduct product) {
  return product == GroupedProduct::kForward         ? "forward"
         : product == GroupedProduct::kBackwardInput ? "dgrad"
                                                     : "wgrad";
}

// `cluster` 0: as the op chooses.
void RunGrouped(GroupedProduct product, const GroupedMatmulCudaArgs& args, int cluster) {
  static const int num_sms = cuda::NumMultiprocessors();
  LaunchGroupedMatmul(product, args, PlanGroupedMatmul(product, args, num_sms, cluster), nullptr);
}

// `experts` numbers that add up to `rows`: uneven, some of them zero.
std::vector<int32_t> UnevenOffsets(int experts, int rows, uint64_t seed) {
  std::vector<double> weights(experts);
  double sum = 0;
  for (int l = 0; l < experts; ++l) {
    weights[l] = Mix(seed, l) % 5 == 0 ? 0.0 : std::exp(1.0 * NormalAt(seed, 100 + l));
    sum += weights[l];
  }
  std::vector<int32_t> offsets(experts + 1, 0);
  double running = 0;
  for (int l = 0; l < experts; ++l) {
    running += weights[l];
    offsets[l + 1] = sum > 0 ? static_cast<int32_t>(rows * (running / sum) + 0.5) : 0;
  }
  offsets[experts] = rows;
  return offsets;
}

// Inputs and outputs of the three products.
template <typename T>
struct GroupedCase {
  GroupedCase(const std::vector<int32_t>& host_offsets, int in_width, int out_width, uint64_t seed)
      : offsets(host_offsets),
        rows(host_offsets.back()),
        experts(static_cast<int>(host_offsets.size()) - 1),
        in(in_width),
        out(out_width),
        x(size_t(rows) * in),
        dy(size_t(rows) * out),
        weight(size_t(experts) * in * out),
        y(dy.size()),
        dx(x.size()),
        dweight(weight.size()) {
    FillNormal(x, 1.0f, seed);
    FillNormal(dy, 1.0f, seed + 1);
    FillNormal(weight, 1.0f, seed + 2);
    FillNormal(dweight, 1.0f, seed + 3);
  }
  GroupedMatmulCudaArgs Args(GroupedProduct product) const {
    GroupedMatmulCudaArgs args;
    args.element = kElement<T>;
    args.num_rows = rows;
    args.num_experts = experts;
    args.in = in;
    args.out = out;
    args.offsets_L1 = offsets.get();
    switch (product) {
      case GroupedProduct::kForward:
        args.left = x.get(), args.right = weight.get(), args.result = y.get();
        break;
      case GroupedProduct::kBackwardInput:
        args.left = dy.get(), args.right = weight.get(), args.result = dx.get();
        break;
      case GroupedProduct::kBackwardWeight:
        args.left = dy.get(), args.right = x.get(), args.result = dweight.get();
        break;
    }
    return args;
  }

  DeviceBuffer<int32_t> offsets;
  int rows, experts, in, out;
  DeviceBuffer<T> x, dy, weight, y, dx;
  DeviceBuffer<float> dweight;
};

// Runs a product twice from the same start; `result` is what it writes.
template <typename T, typename C>
void CheckGrouped(GroupedCase<T>& c, GroupedProduct product, DeviceBuffer<C>& result,
                  const std::string& name, int64_t depth) {
  const bool adds = product == GroupedProduct::kBackwardWeight;
  if (!adds) result.Poison();
  const std::vector<C> before = result.Download();
  DeviceBuffer<double> reference(result.size());
  if (result.size() > 0) {
    reference.Upload(adds ? ToDouble(before) : std::vector<double>(before.size(), NAN));
    GroupedReference<T><<<static_cast<unsigned>((result.size() + 255) / 256), 256>>>(
        product, c.Args(product), reference.get(), result.size());
    CheckLaunch("reference");
  }
  const std::vector<double> expected = reference.Download();
  for (const int cluster : clusters) {
    result.Upload(before);
    RunGrouped(product, c.Args(product), cluster);
    CheckLaunch("grouped");
    const std::vector<C> once = result.Download();
    result.Upload(before);
    RunGrouped(product, c.Args(product), cluster);
    CheckLaunch("grouped");
    const bool same = SameBits(once, result.Download());
    const double error = RelativeError(ToDouble(once), expected);
    Expect(same && error < Tolerance<T, C>(depth),
           std::string(Name(product)) + " " + std::to_string(cluster) + name, same ? error : NAN);
  }
}

template <typename T>
void CheckGroupedCase(const std::vector<int32_t>& offsets, int in, int out, uint64_t seed) {
  GroupedCase<T> c(offsets, in, out, seed);
  int most = 0;
  std::string name = std::string(std::is_same_v<T, float> ? " f32 " : " bf16 ") +
                     std::to_string(in) + " -> " + std::to_string(out) + " rows";
  for (int l = 0; l < c.experts; ++l) {
    const int rows = offsets[l + 1] - offsets[l];
    most = std::max(most, rows);
    if (l < 6) name += " " + std::to_string(rows);
  }
  CheckGrouped(c, GroupedProduct::kForward, c.y, name, in);
  CheckGrouped(c, GroupedProduct::kBackwardInput, c.dx, name, out);
  CheckGrouped(c, GroupedProduct::kBackwardWeight, c.dweight, name, most);
}

// What one expert's rows hold does not reach another's results, be it not a number.
void CheckIsolation(int cluster, uint64_t seed) {
  const std::vector<int32_t> offsets = {0, 100, 137, 300};
  const int in = 136, out = 264;
  GroupedCase<__nv_bfloat16> c(offsets, in, out, seed);
  Check(cudaMemset(c.x.get() + 100 * in, 0xFF, 37 * in * 2), "NaN rows");
  Check(cudaMemset(c.dy.get() + 100 * out, 0xFF, 37 * out * 2), "NaN rows");
  for (const GroupedProduct product : kProducts) {
    RunGrouped(product, c.Args(product), cluster);
  }
  CheckLaunch("grouped");
  int wrong = 0;
  const auto count = [&](const auto& values, size_t width, size_t begin, size_t end) {
    for (size_t i = 0; i < values.size(); ++i) {
      const bool inside = i / width >= begin && i / width < end;
      wrong += std::isnan(static_cast<float>(values[i])) != inside;
    }
  };
  count(c.y.Download(), out, 100, 137);
  count(c.dx.Download(), in, 100, 137);
  count(c.dweight.Download(), size_t(in) * out, 1, 2);
  Expect(wrong == 0, "rows of NaN stay with their expert", wrong);
}

void CheckGroupedAll(uint64_t seed) {
  const std::vector<std::vector<int32_t>> fixed = {{0, 1},
                                                   {0, 0, 0, 5, 5},
                                                   {0, 128, 256, 512},
                                                   {0, 64, 193, 193, 320},
                                                   {0, 63, 127, 700},
                                                   {0, 0, 0, 0, 1000, 1000},
                                                   {0, 1, 2, 3, 4, 5, 6, 7, 8},
                                                   {0, 0}};
  for (const std::vector<int32_t>& offsets : fixed) {
    CheckGroupedCase<__nv_bfloat16>(offsets, 200, 328, seed += 10);
    CheckGroupedCase<__nv_bfloat16>(offsets, 37, 19, seed += 10);
  }
  CheckGroupedCase<float>(fixed[3], 72, 130, seed += 10);
  CheckGroupedCase<float>(fixed[4], 37, 65, seed += 10);
  CheckGroupedCase<__nv_bfloat16>(fixed[4], 8, 8, seed += 10);
  // Many tiles a block, many experts.
  CheckGroupedCase<__nv_bfloat16>(UnevenOffsets(7, 9001, seed), 1024, 2056, seed += 10);
  CheckGroupedCase<__nv_bfloat16>(UnevenOffsets(200, 5003, seed), 512, 256, seed += 10);
  for (const int cluster : clusters) CheckIsolation(cluster, seed);
}

// --- Times ------------------------------------------------------------------------------------

double DenseTflops(Timer& timer, const MatmulCudaLibrary& library, GroupedProduct product,
                   int64_t rows, int64_t in, int64_t out, const __nv_bfloat16* x,
                   const __nv_bfloat16* dy, const __nv_bfloat16* weight, void* result) {
  MatmulCudaArgs args;
  args.batch = 1;
  args.c = result;
  if (product == GroupedProduct::kForward) {
    args.m = rows, args.n = out, args.k = in;
    args.a = {x, 0, in, false}, args.b = {weight, 0, in, true};
  } else if (product == GroupedProduct::kBackwardInput) {
    args.m = rows, args.n = in, args.k = out;
    args.a = {dy, 0, out, false}, args.b = {weight, 0, in, false};
  } else {
    args.m = out, args.n = in, args.k = rows;
    args.a = {dy, 0, out, true}, args.b = {x, 0, in, false};
    args.result_element = CudaElement::kF32;
    args.add = true;
  }
  args.c_row_stride = args.n;
  const double ms = timer.MedianMs([&] { MatmulCuda(args, library, nullptr); }, 10);
  return 2.0 * rows * in * out / (ms * 1e9);
}

void TimeDense(Timer& timer, Report& report, const MatmulCudaLibrary& library, double gemm) {
  const int64_t rows = 8192;
  // DeepSeek-V3: q_b_proj, kv_b_proj, o_proj, dense gate or up, down.
  const int64_t widths[][2] = {
      {1536, 24576}, {512, 32768}, {16384, 7168}, {7168, 18432}, {18432, 7168}};
  for (const auto& [in, out] : widths) {
    DeviceBuffer<__nv_bfloat16> x(rows * in), dy(rows * out), weight(in * out);
    DeviceBuffer<float> result(std::max(in * out, rows * std::max(in, out)));
    FillNormal(x, 1.0f, 1);
    FillNormal(dy, 1.0f, 2);
    FillNormal(weight, 1.0f, 3);
    result.Zero();
    for (const GroupedProduct product : kProducts) {
      const double tflops = DenseTflops(timer, library, product, rows, in, out, x.get(), dy.get(),
                                        weight.get(), result.get());
      report.Add({{"dense", Name(product)},
                  {"rows", std::to_string(rows)},
                  {"in", std::to_string(in)},
                  {"out", std::to_string(out)},
                  {"TF", Number(tflops)},
                  {"% 8192^3", Number(100 * tflops / gemm)}});
    }
  }
}

void TimeGrouped(Timer& timer, Report& report, const MatmulCudaLibrary& library,
                 const std::vector<int32_t>& offsets, const char* kind, int in, int out,
                 double gemm) {
  GroupedCase<__nv_bfloat16> c(offsets, in, out, 1);
  for (const GroupedProduct product : kProducts) {
    const GroupedMatmulCudaArgs args = c.Args(product);
    const int chosen = PlanGroupedMatmul(product, args, cuda::NumMultiprocessors()).cluster;
    double tflops[3] = {};  // by blocks that share B
    for (const int cluster : clusters) {
      const double ms = timer.MedianMs([&] { RunGrouped(product, args, cluster); }, 10);
      tflops[cluster] = 2.0 * c.rows * in * out / (ms * 1e9);
    }
    const double best = tflops[clusters.size() == 1 ? clusters[0] : chosen];
    // One product over all rows with one expert's weight.
    const double dense = DenseTflops(timer, library, product, c.rows, in, out, c.x.get(),
                                     c.dy.get(), c.weight.get(), args.result);
    report.Add({{"grouped", Name(product)},
                {"experts", std::to_string(c.experts)},
                {"rows", kind},
                {"in", std::to_string(in)},
                {"out", std::to_string(out)},
                {"chosen", std::to_string(chosen)},
                {"1 block", Number(tflops[1])},
                {"2 blocks", Number(tflops[2])},
                {"dense TF", Number(dense)},
                {"% dense", Number(100 * best / dense)},
                {"% 8192^3", Number(100 * best / gemm)}});
  }
}

void TimeAllGrouped(Timer& timer, Report& report, const MatmulCudaLibrary& library, double gemm) {
  constexpr int kRows = 32768;
  const int widths[][2] = {{7168, 4096}, {2048, 7168}};  // gate and up together; down
  for (const auto& [in, out] : widths) {
    for (const int experts : {4, 8, 32, 64}) {
      std::vector<int32_t> equal(experts + 1);
      for (int l = 0; l <= experts; ++l) equal[l] = kRows / experts * l;
      TimeGrouped(timer, report, library, equal, "equal", in, out, gemm);
    }
    TimeGrouped(timer, report, library, UnevenOffsets(8, kRows, 5), "uneven", in, out, gemm);
    TimeGrouped(timer, report, library, UnevenOffsets(32, kRows, 6), "uneven", in, out, gemm);
  }
}

int Main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was found before a hang is seen
  const MatmulCudaLibrary library = OpenLibrary();
  Timer timer;
  Report report;
  double gemm = 0;
  std::string json;
  std::vector<std::string> words;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--cluster=1" || word == "--cluster=2") {
      clusters = {word.back() - '0'};
    } else if (word.rfind("--json=", 0) == 0) {
      json = word.substr(7);
    } else if (word == "check" || word == "grouped" || word == "dense") {
      words.push_back(word);
    } else {
      std::fprintf(stderr, "gemm_bench: unknown word %s\n", argv[i]);
      return 2;
    }
  }
  for (const std::string& word : words) {
    if (word == "check") {
      const uint64_t seed = static_cast<uint64_t>(std::time(nullptr));
      std::printf("checks, seed %llu\n", static_cast<unsigned long long>(seed));
      CheckMatmuls(library, seed);
      CheckGroupedAll(seed);
      std::printf("%d checks failed\n", failures);
      continue;
    }
    if (gemm == 0) gemm = GemmTflops(timer);
    word == "grouped" ? TimeAllGrouped(timer, report, library, gemm)
                      : TimeDense(timer, report, library, gemm);
  }
  if (gemm > 0) {
    std::printf("bf16 GEMM 8192^3: %.1f TF before, %.1f TF after\n", gemm, GemmTflops(timer));
  }
  report.Print();
  if (!json.empty()) report.WriteJson(json);
  return failures > 0 ? 1 : 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) { return baleen::bench::Main(argc, argv); }
