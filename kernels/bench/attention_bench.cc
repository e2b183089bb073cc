// Times dense attention over windows, 192/128 heads in bf16: Baleen's kernels on tensor cores and
// cuDNN's (what the op calls for other widths) over the shapes of training, beside a bf16 GEMM of
// 8192^3 in the same process.
//
//   attention_bench [--repeats=N] [group ...]   groups: causal chunks documents heads short
//
// "written": the same backward with dk and dv in bf16, written instead of added to fp32 sums.
//
// FLOP: 2 (Q + V) forward and 2 (3 Q + 2 V) backward for each pair of a row and a key that it sees.
// Times are medians of event-timed calls, launches and small host work included. Before a case is
// timed, the results of the two are compared.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/attention_cudnn.h"
#include "kernels/ops/attention/attention_segments.h"
#include "kernels/ops/attention/masked_attention_gpu.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"

namespace baleen {
namespace {

constexpr int64_t kQ = 192, kV = 128;
constexpr double kScale = 0.07;

double MedianMs(const Context& context, int repeats, const std::function<void()>& work) {
  const auto stream = static_cast<cudaStream_t>(context.stream());
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess);
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
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Values in [-1, 1] that repeat with a period that fits no tile.
Tensor Values(const Context& context, const Shape& shape, uint32_t state = 12345) {
  const Context host = Context::Cpu();
  constexpr int64_t kPeriod = 1 << 20;
  const Tensor all = context.Empty(DType::kBF16, shape);
  const Tensor period = host.Empty(DType::kBF16, {kPeriod - 3});
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

double GemmTflops(const Context& context) {
  constexpr int64_t kSize = 8192;
  const Tensor a = Values(context, {kSize, kSize}), b = Values(context, {kSize, kSize});
  const Tensor c = context.Empty(DType::kBF16, {kSize, kSize});
  const auto multiply = [&] {
    Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kYes, AsMatrix(c));
  };
  MedianMs(context, 20, multiply);
  return 2.0 * kSize * kSize * kSize / MedianMs(context, 10, multiply) * 1e-9;
}

// --- Cases.

struct Case {
  const char* group;
  std::string name;
  int64_t heads = 128, keys = 0;
  std::vector<int32_t> begin, end;  // of the rows

  int64_t rows() const { return static_cast<int64_t>(begin.size()); }
  double pairs() const {
    double sum = 0;
    for (size_t i = 0; i < begin.size(); ++i) sum += end[i] - begin[i];
    return sum * static_cast<double>(heads);
  }
  // Rows [first, last) of a document that begins at key `document`.
  Case& Add(int64_t document, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      begin.push_back(static_cast<int32_t>(document));
      end.push_back(static_cast<int32_t>(t + 1));
    }
    return *this;
  }
};

Case LastRows(const char* group, int64_t rows, int64_t keys, int64_t heads) {
  Case c = {group, "last " + std::to_string(rows) + " of " + std::to_string(keys), heads, keys};
  if (rows == keys) c.name = "causal " + std::to_string(keys);
  return c.Add(0, keys - rows, keys);
}

// Documents of these lengths, over and over, till there are `rows` rows.
Case Documents(int64_t rows, const std::vector<int64_t>& lengths, int64_t heads) {
  Case c = {"documents", std::to_string(rows) + " in documents of", heads, rows};
  for (const int64_t length : lengths) c.name += " " + std::to_string(length);
  for (int64_t first = 0, n = 0; first < rows; ++n) {
    const int64_t last = std::min<int64_t>(rows, first + lengths[n % lengths.size()]);
    c.Add(first, first, last);
    first = last;
  }
  return c;
}

// Rank 0 of `size` under context parallelism: the first and the last of 2 * size chunks.
Case Zigzag(int64_t keys, int64_t size, int64_t heads) {
  const int64_t chunk = keys / (2 * size);
  Case c = {"chunks", "zigzag rank 0 of " + std::to_string(size) + ", " + std::to_string(keys),
            heads, keys};
  return c.Add(0, 0, chunk).Add(0, keys - chunk, keys);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const int64_t length : {4096, 8192, 16384, 32768}) {
    cases.push_back(LastRows("causal", length, length, 128));
  }
  cases.push_back(LastRows("chunks", 4096, 12288, 128));
  cases.push_back(LastRows("chunks", 4096, 32768, 128));
  cases.push_back(LastRows("chunks", 16384, 32768, 128));
  cases.push_back(LastRows("chunks", 1024, 16384, 128));
  cases.push_back(Zigzag(32768, 4, 128));
  cases.push_back(Zigzag(32768, 4, 16));
  cases.push_back(Documents(8192, {256}, 128));
  cases.push_back(Documents(8192, {300, 260, 700, 1000}, 128));
  cases.push_back(Documents(8192, {1024}, 128));
  cases.push_back(Documents(16384, {4000, 1500}, 128));
  cases.push_back(Documents(8192, {300, 260, 700, 1000}, 16));
  for (const int64_t heads : {64, 32, 16, 8, 1}) {
    for (const int64_t length : {2048, 8192}) {
      cases.push_back(LastRows("heads", length, length, heads));
    }
  }
  cases.push_back(LastRows("heads", 4096, 4096, 8));
  cases.push_back(LastRows("heads", 32768, 32768, 1));
  for (const int64_t length : {64, 128, 256, 512, 1024, 2048}) {
    cases.push_back(LastRows("short", length, length, 128));
    cases.push_back(LastRows("short", length, length, 16));
  }
  return cases;
}

// --- The two ways to run a case.

struct Operands {
  Operands(const Context& context, const Case& c)
      : q(Values(context, {c.rows(), c.heads, kQ}, 1)),
        k(Values(context, {c.keys, c.heads, kQ}, 2)),
        v(Values(context, {c.keys, c.heads, kV}, 3)),
        d_out(Values(context, {c.rows(), c.heads, kV}, 4)),
        dk(context.Zeros(DType::kF32, k.shape())),
        dv(context.Zeros(DType::kF32, v.shape())) {
    const auto on_host = [](const std::vector<int32_t>& values) {
      const Tensor tensor =
          Context::Cpu().Empty(DType::kI32, {static_cast<int64_t>(values.size())});
      std::copy(values.begin(), values.end(), tensor.data<int32_t>());
      return tensor;
    };
    windows.host_begin_T = on_host(c.begin);
    windows.host_end_T = on_host(c.end);
    windows.begin_T = CopyToDevice(context, windows.host_begin_T);
    windows.end_T = CopyToDevice(context, windows.host_end_T);
  }
  Tensor q, k, v, d_out, dk, dv;
  KeyWindows windows;
};

// Forward and backward of the two; false where it has no kernel for the case.
class Way {
 public:
  Way(const Context& context, const Case& c, const Operands& in)
      : context_(context),
        in_(in),
        result{context.Empty(DType::kBF16, {c.rows(), c.heads, kV}),
               context.Empty(DType::kF32, {c.rows(), c.heads})},
        dq(context.Empty(DType::kBF16, {c.rows(), c.heads, kQ})) {}
  virtual ~Way() = default;
  virtual const char* name() const = 0;
  virtual bool Forward() = 0;
  virtual bool Backward() = 0;

 protected:
  const Context& context_;
  const Operands& in_;

 public:
  AttentionResult result;
  Tensor dq;
};

class OnTensorCores : public Way {
 public:
  using Way::Way;
  const char* name() const override { return "baleen"; }
  bool Forward() override {
    result =
        AttentionForwardOnTensorCores(context_, in_.q, in_.k, in_.v, {in_.windows, {}}, kScale);
    return true;
  }
  bool Backward() override {
    dq = AttentionBackwardOnTensorCores(context_, in_.d_out, in_.q, in_.k, in_.v, result,
                                        {in_.windows, {}}, kScale, in_.dk, in_.dv, {});
    return true;
  }
};

class WithCudnn : public Way {
 public:
  WithCudnn(const Context& context, const Case& c, const Operands& in, CudnnAttention* cudnn)
      : Way(context, c, in),
        cudnn_(cudnn),
        segments_(SplitIntoSegments(c.begin.data(), c.end.data(), c.rows())) {
    // Short ones too, which the op would not give to the library.
    if (segments_.size() == 1 && segments_[0].kind == AttentionSegment::Kind::kGeneral) {
      segments_ = {{AttentionSegment::Kind::kCausal, 0, c.rows(), 0, c.keys}};
    }
  }
  const char* name() const override { return "cudnn"; }
  bool Forward() override {
    return ForEach([&](const AttentionSegment& segment) {
      return cudnn_->Forward(context_, segment, in_.q, in_.k, in_.v, kScale, result.o_THV,
                             result.lse_TH);
    });
  }
  bool Backward() override {
    return ForEach([&](const AttentionSegment& segment) {
      return cudnn_->Backward(context_, segment, in_.d_out, in_.q, in_.k, in_.v, result.o_THV,
                              result.lse_TH, kScale, {dq, in_.dk, in_.dv});
    });
  }

 private:
  template <typename Body>
  bool ForEach(Body body) {
    return cudnn_ != nullptr &&
           std::all_of(segments_.begin(), segments_.end(), [&](const AttentionSegment& segment) {
             return segment.kind == AttentionSegment::Kind::kCausal && body(segment).ok();
           });
  }
  CudnnAttention* cudnn_;
  std::vector<AttentionSegment> segments_;
};

// ||a - b|| / ||b|| over the first and the last rows.
double Difference(const Context& context, const Tensor& a, const Tensor& b) {
  double error = 0, squares = 0;
  const int64_t rows = std::min<int64_t>(64, a.dim(0));
  for (const int64_t first : {int64_t{0}, a.dim(0) - rows}) {
    const Tensor x = CopyToHost(context, a.Rows(first, first + rows));
    const Tensor y = CopyToHost(context, b.Rows(first, first + rows));
    for (int64_t i = 0; i < x.num_elements(); ++i) {
      const double want = y.data<BFloat16>()[i].ToFloat();
      const double off = x.data<BFloat16>()[i].ToFloat() - want;
      error += off * off;
      squares += want * want;
    }
  }
  return std::sqrt(error / squares);
}

struct Times {
  double forward = 0, backward = 0;
};

// Baleen's backward with key gradients in bf16.
double WrittenMs(const Context& context, const Operands& in, const AttentionResult& forward,
                 int repeats) {
  const Tensor dk = context.Empty(DType::kBF16, in.k.shape());
  const Tensor dv = context.Empty(DType::kBF16, in.v.shape());
  const auto backward = [&] {
    AttentionBackwardOnTensorCores(context, in.d_out, in.q, in.k, in.v, forward, {in.windows, {}},
                                   kScale, dk, dv, {});
  };
  backward();
  return MedianMs(context, repeats, backward);
}

Times Run(const Context& context, Way& way, int repeats) {
  if (!way.Forward() || !way.Backward()) return {};  // the first ones make the library's plans
  return {MedianMs(context, repeats, [&] { way.Forward(); }),
          MedianMs(context, repeats, [&] { way.Backward(); })};
}

bool RunCase(const Context& context, const Case& c, int repeats) {
  const Operands in(context, c);
  const absl::StatusOr<CudnnAttention*> cudnn = CudnnAttention::Of(context);
  OnTensorCores own(context, c, in);
  WithCudnn library(context, c, in, cudnn.ok() ? *cudnn : nullptr);
  const double forward = 2e-9 * c.pairs() * (kQ + kV);
  const double backward = 2e-9 * c.pairs() * (3 * kQ + 2 * kV);
  const Times ours = Run(context, own, repeats), theirs = Run(context, library, repeats);
  const double written = WrittenMs(context, in, own.result, repeats);
  const auto rate = [](double flop, double ms) { return ms > 0 ? flop / ms : 0.0; };
  std::printf("%-9s %-44s %4lld %8.3f %6.0f %8.3f %6.0f %6.2f %9.3f %6.0f %9.3f %6.0f %6.2f %9.3f",
              c.group, c.name.c_str(), static_cast<long long>(c.heads), ours.forward,
              rate(forward, ours.forward), theirs.forward, rate(forward, theirs.forward),
              theirs.forward / ours.forward, ours.backward, rate(backward, ours.backward),
              theirs.backward, rate(backward, theirs.backward), theirs.backward / ours.backward,
              written);
  bool agree = true;
  if (theirs.backward > 0) {
    const double o = Difference(context, own.result.o_THV, library.result.o_THV);
    const double dq = Difference(context, own.dq, library.dq);
    agree = o < 1e-2 && dq < 2e-2;
    std::printf("  %.1e %.1e%s", o, dq, agree ? "" : " WRONG");
  }
  std::printf("\n");
  std::fflush(stdout);
  return agree;
}

int Main(int argc, char** argv) {
  int repeats = 5;
  std::vector<std::string> groups;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--repeats=", 10) == 0) {
      repeats = std::max(1, std::atoi(argv[i] + 10));
    } else {
      groups.emplace_back(argv[i]);
    }
  }
  const absl::StatusOr<Context> made = MakeCudaContext(0);
  CHECK_OK(made.status());
  const Context& context = *made;
  const absl::StatusOr<CudnnAttention*> cudnn = CudnnAttention::Of(context);
  std::printf("%s, bf16 GEMM 8192^3: %.1f TF; cuDNN %s\n", context.cuda().properties().name.c_str(),
              GemmTflops(context),
              cudnn.ok() ? (*cudnn)->version().c_str() : cudnn.status().ToString().c_str());
  std::printf("%-9s %-44s %4s %8s %6s %8s %6s %6s %9s %6s %9s %6s %6s %9s  differences o, dq\n",
              "group", "case", "H", "fwd ms", "TF", "cudnn", "TF", "ratio", "bwd ms", "TF", "cudnn",
              "TF", "ratio", "written");
  bool agree = true;
  for (const Case& c : Cases()) {
    if (!groups.empty() && std::find(groups.begin(), groups.end(), c.group) == groups.end()) {
      continue;
    }
    agree &= RunCase(context, c, repeats);
  }
  std::printf("bf16 GEMM 8192^3 after: %.1f TF\n", GemmTflops(context));
  return agree ? 0 : 1;
}

}  // namespace
}  // namespace baleen

int main(int argc, char** argv) { return baleen::Main(argc, argv); }
