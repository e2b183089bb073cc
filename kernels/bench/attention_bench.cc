// Times dense causal attention as the trainer calls it (attention.h): cuDNN's part, what Baleen
// adds around it, and the general kernels, beside a bf16 GEMM of 8192^3 in the same process.
//
// FLOP: 2 (Q + V) forward and 2 (3 Q + 2 V) backward for each pair of a row and a key that it sees.
// Times are medians of event-timed calls, launches and small host work included.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/attention_cudnn.h"
#include "kernels/ops/attention_cudnn_cuda.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/matmul.h"

namespace baleen {
namespace {

constexpr int64_t kHeads = 128, kQ = 192, kV = 128;
constexpr double kScale = 0.07;

double MedianMs(const Context& context, int repeats, const std::function<void()>& work) {
  const auto stream = static_cast<cudaStream_t>(context.stream());
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess);
  work();
  std::vector<float> times;
  for (int i = 0; i < repeats; ++i) {
    CHECK(cudaEventRecord(begin, stream) == cudaSuccess);
    work();
    CHECK(cudaEventRecord(end, stream) == cudaSuccess);
    CHECK(cudaEventSynchronize(end) == cudaSuccess);
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end) == cudaSuccess);
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double HostMs(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

// Values in [-1, 1] that repeat with a period that fits no tile.
Tensor Values(const Context& context, const Shape& shape) {
  const Context host = Context::Cpu();
  constexpr int64_t kPeriod = 1 << 20;
  const Tensor all = context.Empty(DType::kBF16, shape);
  const Tensor period = host.Empty(DType::kBF16, {kPeriod - 3});
  uint32_t state = 12345;
  for (int64_t i = 0; i < period.num_elements(); ++i) {
    state = state * 1664525u + 1013904223u;
    period.data<BFloat16>()[i] = BFloat16::FromFloat(static_cast<float>(state >> 8) * 0x1p-23f - 1);
  }
  const Tensor on_device = CopyToDevice(context, period);
  for (int64_t at = 0; at < all.num_elements(); at += period.num_elements()) {
    const int64_t count = std::min(period.num_elements(), all.num_elements() - at);
    Copy(context, on_device.Flat(0, count), all.Flat(at, count));
  }
  return all;
}

// The last `rows` rows of a sequence of `keys`.
KeyWindows Causal(const Context& context, int64_t rows, int64_t keys, bool host_copies) {
  const Context host = Context::Cpu();
  KeyWindows windows;
  const Tensor begin = host.Zeros(DType::kI32, {rows}), end = host.Empty(DType::kI32, {rows});
  for (int64_t t = 0; t < rows; ++t)
    end.data<int32_t>()[t] = static_cast<int32_t>(keys - rows + t + 1);
  windows.begin_T = CopyToDevice(context, begin);
  windows.end_T = CopyToDevice(context, end);
  if (host_copies) {
    windows.host_begin_T = begin;
    windows.host_end_T = end;
  }
  return windows;
}

struct Operands {
  Operands(const Context& context, int64_t length)
      : q(Values(context, {length, kHeads, kQ})),
        k(Values(context, {length, kHeads, kQ})),
        v(Values(context, {length, kHeads, kV})),
        d_out(Values(context, {length, kHeads, kV})),
        dk(context.Zeros(DType::kF32, k.shape())),
        dv(context.Zeros(DType::kF32, v.shape())) {}
  Tensor q, k, v, d_out, dk, dv;
};

double GemmTflops(const Context& context) {
  constexpr int64_t kSize = 8192;
  const Tensor a = Values(context, {kSize, kSize}), b = Values(context, {kSize, kSize});
  const Tensor c = context.Empty(DType::kBF16, {kSize, kSize});
  const double ms = MedianMs(context, 10, [&] {
    Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kYes, AsMatrix(c));
  });
  return 2.0 * kSize * kSize * kSize / ms * 1e-9;
}

void Report(const char* what, int64_t length, double ms, double flops, double gemm) {
  const double tflops = flops / ms * 1e-9;
  std::printf("%-44s %7lld %9.3f ms %8.1f TF %6.1f %% of GEMM\n", what,
              static_cast<long long>(length), ms, tflops, 100 * tflops / gemm);
  std::fflush(stdout);
}

void TimeCudnn(const Context& context, int64_t length, double gemm) {
  const Operands in(context, length);
  const KeyWindows windows = Causal(context, length, length, true);
  const double pairs = 0.5 * static_cast<double>(length) * (length + 1) * kHeads;
  const double forward = 2 * pairs * (kQ + kV), backward = 2 * pairs * (3 * kQ + 2 * kV);
  AttentionResult result;
  const double forward_plan_ms =
      HostMs([&] { result = Attention(context, in.q, in.k, in.v, windows, kScale); });
  const double backward_plan_ms = HostMs([&] {
    AttentionBackward(context, in.d_out, in.q, in.k, in.v, result, windows, kScale, in.dk, in.dv);
  });
  std::printf("%lld rows: the first calls kept the host for %.0f and %.0f ms (plans)\n",
              static_cast<long long>(length), forward_plan_ms, backward_plan_ms);
  Report(
      "Attention", length,
      MedianMs(context, 8, [&] { result = Attention(context, in.q, in.k, in.v, windows, kScale); }),
      forward, gemm);
  Report("AttentionBackward", length,
         MedianMs(context, 6,
                  [&] {
                    AttentionBackward(context, in.d_out, in.q, in.k, in.v, result, windows, kScale,
                                      in.dk, in.dv);
                  }),
         backward, gemm);
  const auto cudnn = CudnnAttention::Of(context);
  if (!cudnn.ok()) return;
  const AttentionSegment all = {AttentionSegment::Kind::kCausal, 0, length, 0, length};
  const CudnnAttention::Gradients gradients = {context.Empty(DType::kBF16, in.q.shape()), in.dk,
                                               in.dv};
  for (const int64_t mebibytes : {256, 1024, 4096, 16384}) {
    char name[64];
    std::snprintf(name, sizeof name, "  backward with %lld MiB of dS",
                  static_cast<long long>(mebibytes));
    Report(name, length,
           MedianMs(context, 4,
                    [&] {
                      CHECK_OK((*cudnn)->Backward(context, all, in.d_out, in.q, in.k, in.v,
                                                  result.o_THV, result.lse_TH, kScale, gradients,
                                                  mebibytes << 20));
                    }),
           backward, gemm);
  }
  // Baleen's own part: dk and dv into the sums, lse into cuDNN's layout.
  Report("  of it adding dk, dv", length,
         MedianMs(context, 6,
                  [&] {
                    AddBf16RowsCuda(length, kHeads * kQ, in.k.raw(), CudaElement::kF32,
                                    in.dk.data<float>(), kHeads * kQ, context.stream());
                    AddBf16RowsCuda(length, kHeads * kV, in.v.raw(), CudaElement::kF32,
                                    in.dv.data<float>(), kHeads * kV, context.stream());
                  }),
         0, gemm);
  const Tensor lse_HT = context.Empty(DType::kF32, {kHeads, length});
  Report("  of it transposing lse", length,
         MedianMs(context, 6,
                  [&] {
                    TransposeFloatsCuda(length, kHeads, result.lse_TH.data<float>(), kHeads,
                                        lse_HT.data<float>(), length, context.stream());
                  }),
         0, gemm);
}

// Rows that are a document each, over and over: where do short segments stop to pay?
void TimeShort(const Context& context, int64_t length, bool fused, double gemm) {
  const Operands in(context, length);
  const KeyWindows windows = Causal(context, length, length, fused);
  const double pairs = 0.5 * static_cast<double>(length) * (length + 1) * kHeads;
  AttentionResult result;
  Report(
      fused ? "short, cuDNN" : "short, general", length,
      MedianMs(context, 6, [&] { result = Attention(context, in.q, in.k, in.v, windows, kScale); }),
      2 * pairs * (kQ + kV), gemm);
  Report(fused ? "short, cuDNN, backward" : "short, general, backward", length,
         MedianMs(context, 6,
                  [&] {
                    AttentionBackward(context, in.d_out, in.q, in.k, in.v, result, windows, kScale,
                                      in.dk, in.dv);
                  }),
         2 * pairs * (3 * kQ + 2 * kV), gemm);
}

// The last rows of a longer sequence: a chunk of rows, or a rank's under context parallelism.
void TimeLastRows(const Context& context, int64_t rows, int64_t keys, double gemm) {
  const Operands in(context, keys);
  const KeyWindows windows = Causal(context, rows, keys, true);
  const double pairs =
      (static_cast<double>(rows) * keys - 0.5 * static_cast<double>(rows) * (rows - 1)) * kHeads;
  const Tensor q = in.q.Rows(0, rows), d_out = in.d_out.Rows(0, rows);
  AttentionResult result;
  Report("last rows of 3 times as many keys", rows,
         MedianMs(context, 6, [&] { result = Attention(context, q, in.k, in.v, windows, kScale); }),
         2 * pairs * (kQ + kV), gemm);
  Report("  backward", rows,
         MedianMs(context, 6,
                  [&] {
                    AttentionBackward(context, d_out, q, in.k, in.v, result, windows, kScale, in.dk,
                                      in.dv);
                  }),
         2 * pairs * (3 * kQ + 2 * kV), gemm);
}

int Main() {
  absl::StatusOr<Context> made = MakeCudaContext(0);
  CHECK_OK(made.status());
  const Context& context = *made;
  const double gemm = GemmTflops(context);
  std::printf("%s, bf16 GEMM 8192^3: %.1f TF; %s\n", context.cuda().properties().name.c_str(), gemm,
              AttentionKernelName(context, DType::kBF16, kQ, kV, Causal(context, 4096, 4096, true))
                  .c_str());
  for (const int64_t length : {4096, 8192, 16384}) TimeCudnn(context, length, gemm);
  TimeLastRows(context, 4096, 12288, gemm);
  for (const int64_t length : {256, 512}) {
    for (const bool fused : {false, true}) TimeShort(context, length, fused, gemm);
  }
  TimeShort(context, 4096, false, gemm);
  return 0;
}

}  // namespace
}  // namespace baleen

int main() { return baleen::Main(); }
