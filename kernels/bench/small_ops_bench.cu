// Memory-bound ops at the model's widths: TB/s of the bytes that each must move, beside the device
// copy measured in the same call. That they are right is checked by tests/cuda/ops_*_test.cc.
//
// Timed twice: behind a memset that empties the L2 (as in every bench here), and behind one whose
// lines are driven out by reads. The first leaves lines in the L2 that are written back in the op's
// time, which is fair for an op that leaves as many behind; one that only reads pays for memset.
//
//   small_ops_bench [--json=FILE] [--check]     (--check is there for run_kernel_benches.sh)
#include <cstring>

#include "kernels/bench/harness.cuh"
#include "kernels/ops/adamw_cuda.h"
#include "kernels/ops/cross_entropy_cuda.h"
#include "kernels/ops/elementwise_cuda.h"
#include "kernels/ops/embedding_cuda.h"
#include "kernels/ops/hadamard_cuda.h"
#include "kernels/ops/indexer/fp8_simulate_cuda.h"
#include "kernels/ops/indexer/selection_hash_cuda.h"
#include "kernels/ops/layer_norm_cuda.h"
#include "kernels/ops/linear/fp8_quantise_cuda.h"
#include "kernels/ops/moe/permute_cuda.h"
#include "kernels/ops/moe/router_balance_cuda.h"
#include "kernels/ops/moe/router_cuda.h"
#include "kernels/ops/reduce_cuda.h"
#include "kernels/ops/rms_norm_cuda.h"
#include "kernels/ops/rope_cuda.h"
#include "kernels/ops/stable_sort_cuda.h"
#include "kernels/ops/strided_cuda.h"
#include "kernels/ops/swiglu_cuda.h"

namespace baleen::bench {
namespace {

using Bf16 = __nv_bfloat16;
constexpr CudaElement kBf16 = CudaElement::kBF16;
constexpr int64_t kTokens = 8192, kHidden = 7168, kExperts = 256, kSlots = 8;

__global__ void ReadKernel(const uint4* words, size_t count, uint32_t* found) {
  uint32_t bits = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint4 word = words[i];
    bits |= word.x | word.y | word.z | word.w;
  }
  if (bits != 0) *found = bits;  // never: they are zeros
}

// Median milliseconds behind an L2 full of lines that nobody has to write back.
class CleanTimer {
 public:
  CleanTimer() : written_(size_t{256} << 20), read_(written_.size()), found_(1) {
    read_.Zero();
    Check(cudaEventCreate(&begin_), "event");
    Check(cudaEventCreate(&end_), "event");
  }
  ~CleanTimer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  CleanTimer(const CleanTimer&) = delete;
  CleanTimer& operator=(const CleanTimer&) = delete;

  double MedianMs(const std::function<void()>& work) {
    std::vector<float> times(20);
    for (float& ms : times) {
      Check(cudaMemsetAsync(written_.get(), 1, written_.bytes()), "flush");
      ReadKernel<<<1024, 256>>>(reinterpret_cast<const uint4*>(read_.get()), read_.bytes() / 16,
                                found_.get());
      Check(cudaEventRecord(begin_), "event");
      work();
      Check(cudaEventRecord(end_), "event");
      CheckLaunch("timed call");
      Check(cudaEventElapsedTime(&ms, begin_, end_), "elapsed");
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

 private:
  DeviceBuffer<uint8_t> written_, read_;
  DeviceBuffer<uint32_t> found_;
  cudaEvent_t begin_, end_;
};

class SmallOps {
 public:
  SmallOps() : copy_tbs_(CopyTbs(timer_)) { std::printf("copy %.2f TB/s\n", copy_tbs_); }

  void Time(const char* name, double bytes, const std::function<void()>& work) {
    const double ms = timer_.MedianMs(work), clean_ms = clean_timer_.MedianMs(work);
    const double tbs = bytes / (ms * 1e9);
    report_.Add({{"op", name},
                 {"us", Number(ms * 1e3)},
                 {"MB", Number(bytes / 1e6)},
                 {"TB/s", Number(tbs, 2)},
                 {"% of copy", Number(100 * tbs / copy_tbs_)},
                 {"% clean L2", Number(100 * tbs * ms / clean_ms / copy_tbs_)}});
  }

  void Elementwise() {
    DeviceBuffer<Bf16> a(kTokens * kHidden), b(a.size()), c(a.size()), d(a.size()), e(a.size());
    for (auto* buffer : {&a, &b, &c}) FillNormal(*buffer, 1.0f, 1);
    const double bytes = static_cast<double>(a.bytes());
    const int64_t count = static_cast<int64_t>(a.size());
    Time("add", 3 * bytes, [&] { AddCuda(kBf16, count, a.get(), b.get(), c.get(), nullptr); });
    Time("add_in_place", 3 * bytes,
         [&] { AddCuda(kBf16, count, a.get(), b.get(), a.get(), nullptr); });
    Time("scale", 2 * bytes, [&] { ScaleCuda(kBf16, count, 1.0, a.get(), nullptr); });
    Time("copy_177MB", 2 * bytes,
         [&] { CopyCuda(static_cast<int64_t>(bytes), a.get(), b.get(), nullptr); });
    Time("swiglu", 3 * bytes,
         [&] { SwigluCuda(kBf16, count, a.get(), b.get(), c.get(), nullptr); });
    Time("swiglu_bwd", 5 * bytes, [&] {
      SwigluBackwardCuda(kBf16, count, a.get(), b.get(), c.get(), d.get(), e.get(), nullptr);
    });
    DeviceBuffer<float> f(a.size());
    Time("cast_bf16_f32", 3 * bytes,
         [&] { CastCuda(kBf16, CudaElement::kF32, count, a.get(), f.get(), nullptr); });
    Time("hadamard_128", 2 * bytes,
         [&] { HadamardCuda(kBf16, count / 128, 128, a.get(), b.get(), nullptr); });
    Time("fp8_128", 2 * bytes,
         [&] { SimulateFp8Cuda(kBf16, count / 128, 128, a.get(), b.get(), nullptr); });
    DeviceBuffer<double> workspace(ReduceWorkspaceDoubles(count)), result(1);
    result.Zero();
    Time("sum_squares_f32", 2 * bytes, [&] {
      ReduceCuda({ReduceElement::kF32, ReduceTerm::kSquare, count, f.get(), nullptr, 1,
                  workspace.get(), result.get()},
                 nullptr);
    });
  }

  void Norms(int64_t rows, int64_t D, const char* width) {
    DeviceBuffer<Bf16> x(rows * D), y(x.size()), dy(x.size()), weight(D), bias(D);
    for (auto* buffer : {&x, &dy, &weight, &bias}) FillNormal(*buffer, 1.0f, 2);
    DeviceBuffer<float> mean(rows), rstd(rows), dweight(D), dbias(D),
        workspace(LayerNormWorkspaceFloats(rows, D));
    const double bytes = static_cast<double>(x.bytes());
    const auto named = [&](const char* op) { return std::string(op) + width; };
    Time(named("rms").c_str(), 2 * bytes, [&] {
      RmsNormCuda({kBf16, rows, D, x.get(), weight.get(), 1e-6f, y.get(), rstd.get()}, nullptr);
    });
    Time(named("rms_dx").c_str(), 3 * bytes, [&] {
      RmsNormBackwardInputCuda(
          {kBf16, rows, D, dy.get(), x.get(), weight.get(), rstd.get(), y.get()}, nullptr);
    });
    Time(named("rms_dw").c_str(), 2 * bytes, [&] {
      RmsNormBackwardWeightCuda(
          {kBf16, rows, D, dy.get(), x.get(), rstd.get(), workspace.get(), dweight.get()}, nullptr);
    });
    if (D != 128) return;
    Time("ln128", 2 * bytes, [&] {
      LayerNormCuda({kBf16, rows, D, x.get(), weight.get(), bias.get(), 1e-6f, y.get(), mean.get(),
                     rstd.get()},
                    nullptr);
    });
    Time("ln128_dw", 2 * bytes, [&] {
      LayerNormBackwardWeightCuda({kBf16, rows, D, dy.get(), x.get(), mean.get(), rstd.get(),
                                   workspace.get(), dweight.get(), dbias.get()},
                                  nullptr);
    });
  }

  void Fp8() {
    constexpr int64_t kRuns = kHidden / 128, kRowRuns = kTokens / 128;
    DeviceBuffer<Bf16> x(kTokens * kHidden);
    FillNormal(x, 1.0f, 13);
    DeviceBuffer<uint8_t> codes(x.size()), turned(x.size());
    DeviceBuffer<float> scales(kRuns * kTokens), turned_scales(scales.size());
    const Fp8QuantiseCudaArgs rows{1,       kTokens, kHidden,     x.get(),     kTokens,
                                   kHidden, kTokens, codes.get(), scales.get()};
    const Fp8QuantiseCudaArgs columns{
        1, kTokens, kHidden, x.get(), kHidden, kTokens, kHidden, turned.get(), turned_scales.get()};
    const double one = static_cast<double>(codes.bytes() + scales.bytes()),
                 values = static_cast<double>(x.bytes());
    Time("fp8_rows", values + one, [&] { Fp8QuantiseRowsCuda(rows, nullptr); });
    Time("fp8_columns", values + one, [&] { Fp8QuantiseColumnsCuda(columns, nullptr); });
    Time("fp8_both", values + 2 * one, [&] { Fp8QuantiseBothCuda(rows, columns, nullptr); });
    Fp8QuantiseCudaArgs blocks = rows;
    blocks.scale_stride = kRuns;
    Time("fp8_weight", values + one, [&] { Fp8QuantiseBlocksCuda(blocks, false, nullptr); });
    blocks = columns;
    blocks.scale_stride = kRowRuns;
    Time("fp8_weight_turned", values + one, [&] { Fp8QuantiseBlocksCuda(blocks, true, nullptr); });
  }

  void Rope() {
    constexpr int64_t kHeads = 128, kWidth = 192;
    DeviceBuffer<Bf16> q(kTokens * kHeads * kWidth), k(kTokens * 64), kk(kTokens * kHeads * kWidth);
    FillNormal(q, 1.0f, 3);
    FillNormal(k, 1.0f, 3);
    DeviceBuffer<float> cos(kTokens * 32), sin(kTokens * 32);
    RopeTableCudaArgs table{kTokens, 32, {}, cos.get(), sin.get()};
    for (int i = 0; i < 32; ++i) table.frequencies[i] = std::pow(10000.0, -i / 32.0);
    RopeTableCuda(table, nullptr);
    std::vector<int32_t> places(kTokens);
    for (int64_t t = 0; t < kTokens; ++t) places[t] = static_cast<int32_t>(t);
    DeviceBuffer<int32_t> positions(places);
    const double bytes = 2.0 * kTokens * kHeads * 64 * 2;
    for (const bool interleaved : {true, false}) {
      Time(interleaved ? "rope_inter" : "rope_half", bytes, [&] {
        ApplyRopeCuda({kBf16, interleaved, 1.0f, kHeads, kTokens, 32, kWidth, kHeads * kWidth,
                       q.get() + 128, positions.get(), cos.get(), sin.get()},
                      nullptr);
      });
    }
    // One rope row to all heads, and back as a sum.
    Time("copy_view", bytes / 2, [&] {
      CopyViewCuda(
          {k.get(), kk.get() + 128, kHeads, kTokens, 128, 0, 128, kWidth * 2, kHeads * kWidth * 2},
          nullptr);
    });
    Time("batch_sum", bytes / 2, [&] {
      AddBatchSumCuda(
          {kBf16, kk.get() + 128, k.get(), kHeads, kTokens, 64, kWidth, kHeads * kWidth, 64},
          nullptr);
    });
  }

  void CrossEntropy() {
    constexpr int64_t kRows = 2048, kWords = 129280;
    DeviceBuffer<Bf16> logits(kRows * kWords);
    FillNormal(logits, 2.0f, 4);
    DeviceBuffer<int32_t> targets(std::vector<int32_t>(kRows, 7));
    DeviceBuffer<float> max(kRows), sum(kRows), target(kRows);
    const CrossEntropyCudaArgs args{
        kBf16, kRows, kWords, 0, logits.get(), targets.get(), {max.get(), sum.get(), target.get()}};
    const double bytes = static_cast<double>(logits.bytes());
    Time("ce_stats", bytes, [&] { CrossEntropyLocalStatsCuda(args, nullptr); });
    Time("ce_bwd", 2 * bytes, [&] { CrossEntropyBackwardCuda(args, 1.0f, nullptr); });
  }

  void Experts() {
    constexpr int64_t kRows = kTokens * kSlots;
    std::vector<int32_t> choice(kRows);
    for (int64_t i = 0; i < kRows; ++i) choice[i] = static_cast<int32_t>(Mix(5, i) % kExperts);
    DeviceBuffer<int32_t> ids(choice), places(kRows), rows(kRows), offsets(kExperts + 1),
        keys(kRows), items(kRows), workspace(StableSortWorkspaceInts(kRows, kExperts));
    Time("permutation", 28.0 * kRows, [&] {
      StableSortCuda({kRows, ids.get(), 0, kExperts, workspace.get(), keys.get(), items.get()},
                     nullptr);
      SortedPlacesCuda({kRows, kExperts, kSlots, kRows, keys.get(), items.get(), offsets.get(),
                        places.get(), rows.get()},
                       nullptr);
    });
    DeviceBuffer<Bf16> x(kTokens * kHidden), x_rows(kRows * kHidden), dx_rows(kRows * kHidden);
    FillNormal(x, 1.0f, 6);
    FillNormal(x_rows, 1.0f, 6);
    DeviceBuffer<float> weights(kRows);
    FillNormal(weights, 1.0f, 7);
    const double row_bytes = 2.0 * kHidden;
    Time("spread_rows", (kRows + kTokens) * row_bytes, [&] {
      SpreadRowsCuda(kTokens, kSlots, 2 * kHidden, x.get(), places.get(), dx_rows.get(), nullptr);
    });
    // What arrived from other ranks, into the order of the experts: every row from a place of its
    // own.
    Time("gather_rows", 2 * kRows * row_bytes, [&] {
      GatherRowsCuda(kRows, 2 * kHidden, x_rows.get(), places.get(), dx_rows.get(), nullptr);
    });
    Time("sum_rows", (kRows + kTokens) * row_bytes, [&] {
      SumRowsCuda({kBf16, kTokens, kSlots, kHidden, x_rows.get(), places.get(), x.get()}, nullptr);
    });
    DeviceBuffer<float> logits(kTokens * kExperts), scores(logits.size()), bias(kExperts);
    FillNormal(logits, 1.0f, 8);
    bias.Zero();
    const RouterCudaParams params{static_cast<int>(kExperts), 8, 4, 8, 2.5f, true};
    Time("route", 8.0 * logits.size(), [&] {
      RouteCuda({params, CudaElement::kF32, kTokens, logits.get(), bias.get(), scores.get(),
                 ids.get(), weights.get()},
                nullptr);
    });
    Time("route_bwd", 8.0 * logits.size(), [&] {
      RouteBackwardCuda(
          {params, kTokens, scores.get(), ids.get(), weights.get(), nullptr, logits.get()},
          nullptr);
    });
    DeviceBuffer<int64_t> counts(kExperts);
    counts.Zero();
    Time("count_experts", 4.0 * kRows,
         [&] { CountExpertsCuda(kRows, ids.get(), kExperts, counts.get(), nullptr); });
  }

  void Embedding() {
    constexpr int64_t kWords = 129280;
    std::vector<int32_t> words(kTokens);
    for (int64_t t = 0; t < kTokens; ++t) {
      // One word in twenty is the same: text looks like that.
      words[t] = static_cast<int32_t>(t % 20 == 0 ? 11 : Mix(9, t) % kWords);
    }
    DeviceBuffer<int32_t> ids(words), keys(kTokens), items(kTokens),
        workspace(StableSortWorkspaceInts(kTokens, kWords));
    DeviceBuffer<Bf16> table(kWords * kHidden), y(kTokens * kHidden);
    DeviceBuffer<float> dtable(kWords * kHidden);
    FillNormal(y, 1.0f, 10);
    const double bytes = static_cast<double>(y.bytes());
    Time("embedding", 2 * bytes, [&] {
      EmbeddingLookupCuda({kTokens, kWords, 2 * kHidden, 0, ids.get(), table.get(), y.get()},
                          nullptr);
    });
    Time("embedding_sort", 20.0 * kTokens, [&] {
      StableSortCuda({kTokens, ids.get(), 0, kWords, workspace.get(), keys.get(), items.get()},
                     nullptr);
    });
    Time("embedding_bwd", bytes * (1 + 4 * 0.95), [&] {
      RankWordsCuda({kTokens, kWords, 0, ids.get(), keys.get(), items.get()}, nullptr);
      EmbeddingBackwardCuda(
          {kBf16, kTokens, kWords, kHidden, keys.get(), items.get(), y.get(), dtable.get()},
          nullptr);
    });
  }

  void Optimizer() {
    constexpr int64_t kCount = int64_t{1} << 28;
    DeviceBuffer<float> param(kCount), grad(kCount), m(kCount), v(kCount);
    DeviceBuffer<float> control(std::vector<float>{1.0f, 0.0f});
    DeviceBuffer<Bf16> working(kCount);
    FillNormal(param, 1.0f, 11);
    FillNormal(grad, 1.0f, 12);
    m.Zero();
    v.Zero();
    AdamwCudaArgs args;
    args.count = kCount;
    args.lr = 1e-5f;
    args.beta1 = 0.9f;
    args.beta2 = 0.95f;
    args.rest1 = 0.1f;
    args.rest2 = 0.05f;
    args.correction1 = args.correction2 = 0.5f;
    args.eps = 1e-8f;
    args.param = param.get();
    args.grad = grad.get();
    args.m = m.get();
    args.v = v.get();
    args.control_2 = control.get();
    Time("adamw", 28.0 * kCount, [&] { AdamwCuda(args, nullptr); });
    args.working = working.get();
    Time("adamw_bf16", 30.0 * kCount, [&] { AdamwCuda(args, nullptr); });
    std::vector<int64_t> begins;
    for (int64_t n = 0; n <= 512; ++n) begins.push_back(n * kCount / 512);
    DeviceBuffer<int64_t> begin(begins);
    DeviceBuffer<float> decay(std::vector<float>(512, 0.1f));
    args.num_segments = 512;
    args.begin_N1 = begin.get();
    args.decay_N = decay.get();
    Time("adamw_512", 30.0 * kCount, [&] { AdamwCuda(args, nullptr); });
  }

  void SelectionHash() {
    constexpr int64_t kChosen = 2048;
    DeviceBuffer<int32_t> rows(kTokens), ids(kTokens * kChosen);
    rows.Zero();
    ids.Zero();
    DeviceBuffer<int64_t> result(1);
    result.Zero();
    Time("selection_hash", static_cast<double>(ids.bytes()), [&] {
      AddSelectionHashCuda({kTokens, kChosen, rows.get(), ids.get(), result.get()}, nullptr);
    });
  }

  const Report& report() const { return report_; }

 private:
  Timer timer_;
  CleanTimer clean_timer_;
  double copy_tbs_;
  Report report_;
};

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) {
  using namespace baleen::bench;
  std::string json;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--json=", 7) == 0) json = argv[i] + 7;
  }
  SmallOps ops;
  ops.Elementwise();
  ops.Norms(8192, 7168, "7168");
  ops.Norms(32768, 1536, "1536");
  ops.Norms(65536, 512, "512");
  ops.Norms(131072, 128, "128");
  ops.Fp8();
  ops.Rope();
  ops.CrossEntropy();
  ops.Experts();
  ops.Embedding();
  ops.Optimizer();
  ops.SelectionHash();
  ops.report().Print();
  if (!json.empty()) ops.report().WriteJson(json);
  return 0;
}
