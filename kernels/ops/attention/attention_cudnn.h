// The fused attention of cuDNN for causal segments in bf16 (attention_segments.h): its graph API
// through the header-only frontend; the library is loaded when first asked for.
//
// Limits of cuDNN 9.14 to 9.19 on sm_90, which shape this: head widths are multiples of 8 up to
// 256; lse is [H, T] and packed; dk and dv come out in bf16 and are added to the fp32 sums here;
// the deterministic backward keeps dS of a call in device memory, so heads (and rows of long
// segments) go in several calls; a triangle aligned to the bottom right runs its backward at a
// third of the speed of one aligned to the top left (square segments), so a segment with more keys
// than rows is a rectangle without a mask and a square: P = exp(S - lse) and D = do.o are those of
// all keys in both. Results depend on the inputs alone, not on what ran before.
#pragma once

#include <compare>
#include <map>
#include <memory>
#include <string>

#include "kernels/core/context.h"
#include "kernels/core/status.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/attention/attention_segments.h"

namespace baleen {

// Whether the library's kernels take such heads at all: a pure function.
bool CudnnTakesHeads(DType dtype, int64_t q_dim, int64_t v_dim);

// Device memory that a call of the deterministic backward may take for dS. More heads a call fill
// the GPU better: causal, 128 heads of 4096 rows, 0.25, 1, 2 and 4 GiB: 220, 297, 313 and 319
// TFLOP/s.
inline constexpr int64_t kCudnnBackwardBytes = int64_t{2} << 30;

// What a plan of the library is made for. Rows of the arrays are `all_heads` heads apart, those of
// dq `dq_heads`.
struct CudnnShapes {
  enum class Pass : uint8_t { kForward, kBackward };
  enum class Mask : uint8_t { kNone, kTopLeft, kBottomRight };
  Pass pass;
  Mask mask;
  int64_t rows, keys, heads, all_heads, dq_heads, Q, V;
  float scale;
  auto operator<=>(const CudnnShapes&) const = default;
};

class CudnnAttention {
 public:
  // That of the context's device, made at its first call and kept to the process's end: plans hold
  // code of the library, and a rank has one device. EnvironmentError when the build lacks the
  // frontend or the machine the library.
  static absl::StatusOr<CudnnAttention*> Of(const Context& context);

  const std::string& version() const { return version_; }  // "9.19.0"

  // Writes the segment's rows of o_THV and lse_TH. UnimplementedError when the library has no
  // kernel for these shapes; nothing is written then. All tensors are those of the whole call.
  absl::Status Forward(const Context& context, const AttentionSegment& segment, const Tensor& q_THQ,
                       const Tensor& k_SHQ, const Tensor& v_SHV, double scale, const Tensor& o_THV,
                       const Tensor& lse_TH);

  struct Gradients {
    Tensor dq_THQ;  // the segment's rows are written
    Tensor dk_SHQ;  // kF32, added to
    Tensor dv_SHV;  // kF32, added to
  };
  absl::Status Backward(const Context& context, const AttentionSegment& segment,
                        const Tensor& do_THV, const Tensor& q_THQ, const Tensor& k_SHQ,
                        const Tensor& v_SHV, const Tensor& o_THV, const Tensor& lse_TH,
                        double scale, const Gradients& gradients,
                        int64_t budget_bytes = kCudnnBackwardBytes);

  struct Plan;  // a graph of the frontend with its execution plan

  CudnnAttention(void* handle, std::string version);
  ~CudnnAttention();

 private:
  absl::StatusOr<std::shared_ptr<const Plan>> PlanFor(const CudnnShapes& shapes);

  void* handle_;
  std::string version_;
  std::map<CudnnShapes, absl::StatusOr<std::shared_ptr<const Plan>>> plans_;
};

}  // namespace baleen
