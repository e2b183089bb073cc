// Bench of the dense indexer loss: checked against the double reference on small odd shapes (fresh
// random inputs, windows that begin late, rows without keys, chunks, poisoned outputs), then timed.
//
// FLOPs of a pair (row, key of its window), as counted everywhere: target 2 * 192 a main head;
// indexer scores, their recomputation, dq and dk 2 * 64 * 128 each: 114 688 for 128 heads, of which
// 98 304 are executed. The attention forward that gives lse (2 * (192 + 128) a head, 81 920) is not
// run here: --forward_tf=F, its speed measured in the same call, adds it to "whole".
//
//   dense_indexer_loss_bench [--check] [--only=check] [--keys=S] [--budget_mib=M]
//       [--forward_tf=F] [--json=PATH]
#include <cstring>

#include "kernels/bench/dense_indexer_loss_reference.h"
#include "kernels/bench/harness.cuh"
#include "kernels/ops/indexer/dense_indexer_loss_cuda.h"

namespace baleen::bench {
namespace {

constexpr float kSoftmaxScale = 0.1352337788608801f;
constexpr double kIndexPair = 2.0 * kIndexHeads * kIndexDim;
int64_t budget_mib = 4096;  // of the workspace

int NumSms() {
  int num_sms = 0;
  Check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
  return num_sms;
}

// --- Shapes -------------------------------------------------------------------------------------

enum class Kind { kCausal, kDocuments, kSubset, kRandom, kFull };
const char* Name(Kind kind) {
  constexpr const char* kNames[] = {"causal", "documents", "subset", "random", "full"};
  return kNames[static_cast<int>(kind)];
}

struct Shape {
  Kind kind;
  int rows, keys, main_heads;
  int rows_per_chunk = 0;  // 0: by plan
};

// The window of row t. kCausal: the last `rows` of the keys' positions. kSubset: two pieces of the
// sequence, as a rank of context parallelism has them.
void Window(const Shape& shape, int t, uint64_t seed, int32_t* begin, int32_t* end) {
  *begin = 0;
  *end = shape.keys;
  const int position = shape.keys - shape.rows + t;
  if (shape.kind == Kind::kCausal) *end = position + 1;
  if (shape.kind == Kind::kDocuments) {
    const int length = 1 + shape.keys / 5;
    *begin = position / length * length;
    *end = position + 1;
  }
  if (shape.kind == Kind::kSubset) {
    *end = t < shape.rows / 2 ? shape.keys / 10 + t + 1 : position + 1;
  }
  if (shape.kind == Kind::kRandom) {
    const int a = Mix(seed + 5, t) % (shape.keys + 1), b = Mix(seed + 6, t) % (shape.keys + 1);
    *begin = t % 11 == 3 ? b : std::min(a, b);  // some are empty or reversed
    *end = t % 11 == 3 ? std::min(a, b) : std::max(a, b);
  }
}

// Inputs and outputs of one call.
struct Buffers {
  Buffers(const Shape& shape, uint64_t seed)
      : q(size_t(shape.rows) * kIndexHeads * kIndexDim),
        k(size_t(shape.keys) * kIndexDim),
        main_q(size_t(shape.rows) * shape.main_heads * kMainDim),
        main_k(size_t(shape.keys) * shape.main_heads * kMainDim),
        dq(q.size()),
        w(size_t(shape.rows) * kIndexHeads),
        lse(size_t(shape.rows) * shape.main_heads),
        loss(shape.rows),
        dw(w.size()),
        dk(k.size()),
        begin(shape.rows),
        end(shape.rows),
        plan(MakePlan(shape)),
        workspace(plan.workspace_bytes) {
    FillNormal(q, 1.0f, seed);
    FillNormal(k, 1.0f, seed + 1);
    FillNormal(main_q, 1.0f, seed + 2);
    FillNormal(main_k, 0.6f, seed + 3);
    FillNormal(w, 0.011f, seed + 4);
    std::vector<int32_t> begins(shape.rows), ends(shape.rows);
    for (int t = 0; t < shape.rows; ++t) Window(shape, t, seed, &begins[t], &ends[t]);
    begin.Upload(begins);
    end.Upload(ends);
  }
  static DenseIndexerLossPlan MakePlan(const Shape& shape) {
    const size_t most = shape.rows_per_chunk > 0 ? 1 : size_t(budget_mib) << 20;
    return PlanDenseIndexerLoss(shape.rows, shape.keys, NumSms(), most);
  }
  DenseIndexerLossArgs Args(const Shape& shape) const {
    DenseIndexerLossArgs args;
    args.q_TIJ = q.get();
    args.k_SJ = k.get();
    args.w_TI = w.get();
    args.main_q_THQ = main_q.get();
    args.main_k_SHQ = main_k.get();
    args.lse_TH = lse.get();
    args.key_begin_T = begin.get();
    args.key_end_T = end.get();
    args.softmax_scale = kSoftmaxScale;
    args.grad_scale = 0.37f;
    args.num_rows = shape.rows;
    args.num_keys = shape.keys;
    args.num_main_heads = shape.main_heads;
    args.loss_T = loss.get();
    args.dw_TI = dw.get();
    args.dq_TIJ = dq.get();
    args.dk_SJ = dk.get();
    args.workspace = workspace.get();
    return args;
  }
  void Poison() {
    loss.Poison();
    dw.Poison();
    dq.Poison();
    FillNormal(dk, 0.01f, 99);  // added to
  }

  DeviceBuffer<__nv_bfloat16> q, k, main_q, main_k, dq;
  DeviceBuffer<float> w, lse, loss, dw, dk;
  DeviceBuffer<int32_t> begin, end;
  DenseIndexerLossPlan plan;
  DeviceBuffer<uint8_t> workspace;
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

// Zero keys and zero query heads: their products are exactly 0, where the relu is closed.
void PlantZeros(Buffers& buffers) {
  std::vector<__nv_bfloat16> k = buffers.k.Download(), q = buffers.q.Download();
  for (size_t s = 0; s < k.size() / kIndexDim; s += 7) {
    std::fill_n(&k[s * kIndexDim], kIndexDim, __nv_bfloat16(s % 2 ? 0.0f : -0.0f));
  }
  for (size_t i = 5; i < q.size() / kIndexDim; i += 13) {
    std::fill_n(&q[i * kIndexDim], kIndexDim, __nv_bfloat16(0.0f));
  }
  buffers.k.Upload(k);
  buffers.q.Upload(q);
}

DenseIndexerProblem ToProblem(const Shape& shape, const Buffers& b) {
  return {shape.rows,
          shape.keys,
          shape.main_heads,
          kSoftmaxScale,
          0.37f,
          b.begin.Download(),
          b.end.Download(),
          ToDouble(b.q.Download()),
          ToDouble(b.k.Download()),
          ToDouble(b.w.Download()),
          ToDouble(b.main_q.Download()),
          ToDouble(b.main_k.Download())};
}

struct Outputs {
  std::vector<float> loss, dw, dk;
  std::vector<__nv_bfloat16> dq;
};

Outputs RunOnce(const Shape& shape, Buffers& b) {
  b.Poison();
  Check(LaunchDenseIndexerLoss(b.Args(shape), b.plan, nullptr), "LaunchDenseIndexerLoss");
  CheckLaunch("dense indexer loss");
  return {b.loss.Download(), b.dw.Download(), b.dk.Download(), b.dq.Download()};
}

void CheckShape(const Shape& shape, uint64_t seed) {
  Buffers b(shape, seed);
  PlantZeros(b);
  const DenseIndexerProblem problem = ToProblem(shape, b);
  const std::vector<double> lse = ReferenceMainLse(problem);
  b.lse.Upload(std::vector<float>(lse.begin(), lse.end()));
  const DenseIndexerResult reference = ReferenceDenseIndexerLoss(problem, lse);
  b.Poison();
  const std::vector<double> before = ToDouble(b.dk.Download());
  b.workspace.Poison();
  const Outputs first = RunOnce(shape, b);
  b.workspace.Zero();
  const Outputs second = RunOnce(shape, b);
  std::vector<double> dk = ToDouble(first.dk);
  for (size_t i = 0; i < dk.size(); ++i) dk[i] -= before[i];
  const double errors[] = {RelativeError(ToDouble(first.loss), reference.loss_T),
                           RelativeError(ToDouble(first.dw), reference.dw_TI),
                           RelativeError(ToDouble(first.dq), reference.dq_TIJ),
                           RelativeError(dk, reference.dk_SJ)};
  constexpr double kLimits[] = {5e-5, 5e-3, 5e-3, 5e-3};
  constexpr const char* kNames[] = {"loss", "dw", "dq", "dk"};
  char text[96];
  for (int i = 0; i < 4; ++i) {
    std::snprintf(text, sizeof text, "%s %dx%d heads %d chunk %d %s", Name(shape.kind), shape.rows,
                  shape.keys, shape.main_heads, b.plan.rows_per_chunk, kNames[i]);
    Expect(errors[i] < kLimits[i], text, errors[i]);
  }
  const bool same[] = {SameBits(first.loss, second.loss), SameBits(first.dw, second.dw),
                       SameBits(first.dq, second.dq), SameBits(first.dk, second.dk)};
  for (int i = 0; i < 4; ++i) {
    std::snprintf(text, sizeof text, "  %s: the same bits again, whatever the workspace held",
                  kNames[i]);
    Expect(same[i], text, same[i]);
  }
}

void CheckAll(uint64_t seed) {
  const Shape shapes[] = {
      {Kind::kRandom, 70, 333, 3},     {Kind::kCausal, 300, 300, 2},
      {Kind::kDocuments, 517, 517, 2}, {Kind::kSubset, 256, 1100, 4},
      {Kind::kRandom, 37, 1000, 128},  {Kind::kCausal, 700, 700, 1, 256},
      {Kind::kFull, 1, 1, 5},          {Kind::kRandom, 19, 5001, 16},
      {Kind::kCausal, 1300, 1300, 2},  {Kind::kDocuments, 530, 900, 3, 256},
      {Kind::kSubset, 600, 700, 128},  {Kind::kCausal, 6, 4096, 128},
  };
  for (const Shape& shape : shapes) CheckShape(shape, ++seed);
}

// --- Timing -------------------------------------------------------------------------------------

// lse of normal logits with the bench's variance: the exponentials see usual values.
__global__ void FillLseKernel(float* lse, const int32_t* begin, const int32_t* end, int rows,
                              int heads, float half_variance) {
  const size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  if (i >= size_t(rows) * heads) return;
  const int row = static_cast<int>(i / heads);
  lse[i] = logf(static_cast<float>(max(1, end[row] - begin[row]))) + half_variance;
}

void TimeShape(Timer& timer, Report& report, const Shape& shape, double gemm, double forward_tf) {
  Buffers b(shape, 7);
  const float half_variance = 0.5f * kSoftmaxScale * kSoftmaxScale * kMainDim * 0.36f;
  FillLseKernel<<<(b.lse.size() + 255) / 256, 256>>>(b.lse.get(), b.begin.get(), b.end.get(),
                                                     shape.rows, shape.main_heads, half_variance);
  CheckLaunch("FillLse");
  b.Poison();
  double pairs = 0;
  for (int t = 0; t < shape.rows; ++t) {
    int32_t begin, end;
    Window(shape, t, 7, &begin, &end);
    pairs += std::max(0, end - begin);
  }
  const DenseIndexerLossArgs args = b.Args(shape);
  const int repeats = pairs > 2e8 ? 3 : 7;
  const double ms = timer.MedianMs(
      [&] { Check(LaunchDenseIndexerLoss(args, b.plan, nullptr), "launch"); }, repeats);
  const double target = 2.0 * kMainDim * shape.main_heads, counted = target + 4 * kIndexPair,
               executed = target + 3 * kIndexPair, forward = 640.0 * shape.main_heads;
  const double tf = pairs * counted / (ms * 1e9);
  Report::Row row = {{"dense_loss", Name(shape.kind)},
                     {"rows", std::to_string(shape.rows)},
                     {"keys", std::to_string(shape.keys)},
                     {"chunk", std::to_string(b.plan.rows_per_chunk)},
                     {"ms", Number(ms, 3)},
                     {"us/token", Number(ms * 1e3 / shape.rows, 3)},
                     {"TF", Number(tf)},
                     {"% GEMM", Number(100 * tf / gemm)},
                     {"executed_TF", Number(pairs * executed / (ms * 1e9))}};
  if (forward_tf > 0) {
    const double whole = (forward + counted) / (forward / forward_tf + counted / tf);
    row.push_back({"whole_TF", Number(whole)});
    row.push_back({"whole % GEMM", Number(100 * whole / gemm)});
  }
  report.Add(row);
}

struct Options {
  bool check = false, time = true;
  int keys = 0;  // time only these; 0: all
  double forward_tf = 0;
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
  for (const Shape& shape :
       {Shape{Kind::kCausal, 8192, 8192, 128}, Shape{Kind::kCausal, 16384, 16384, 128},
        Shape{Kind::kCausal, 32768, 32768, 128}, Shape{Kind::kDocuments, 32768, 32768, 128},
        Shape{Kind::kCausal, 4096, 131072, 128}}) {
    if (options.keys == 0 || options.keys == shape.keys) {
      TimeShape(timer, report, shape, gemm, options.forward_tf);
    }
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
    } else if (word.rfind("--budget_mib=", 0) == 0) {
      baleen::bench::budget_mib = std::atoi(word.c_str() + 13);
    } else if (word.rfind("--forward_tf=", 0) == 0) {
      options.forward_tf = std::atof(word.c_str() + 13);
    } else if (word.rfind("--json=", 0) == 0) {
      options.json = word.substr(7);
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      return 2;
    }
  }
  return baleen::bench::Run(options);
}
