// cuDNN's attention through the frontend's graphs: one translation unit, the headers are heavy.
#include "kernels/ops/attention/attention_cudnn.h"

#include <utility>

#ifdef BALEEN_HAVE_CUDNN_FRONTEND
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

#include "kernels/core/cuda_context.h"
#include "kernels/core/shared_library.h"
#include "kernels/ops/attention/attention_cudnn_cuda.h"
#include "kernels/ops/cuda_element.h"

// Through which the frontend calls the library.
namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}
#endif

namespace baleen {

bool CudnnTakesHeads(DType dtype, int64_t q_dim, int64_t v_dim) {
  const auto fits = [](int64_t dim) { return dim > 0 && dim <= 256 && dim % 8 == 0; };
  return dtype == DType::kBF16 && fits(q_dim) && fits(v_dim);
}

#ifndef BALEEN_HAVE_CUDNN_FRONTEND

struct CudnnAttention::Plan {};
CudnnAttention::CudnnAttention(void* handle, std::string version)
    : handle_(handle), version_(std::move(version)) {}
CudnnAttention::~CudnnAttention() = default;

absl::StatusOr<CudnnAttention*> CudnnAttention::Of(const Context&) {
  return EnvironmentError(
      "this build has no cuDNN attention: the headers of the cuDNN frontend (cudnn_frontend.h, "
      "Python package nvidia-cudnn-frontend) or cudnn.h were not found when it was configured; "
      "launch/setup.sh --optional gets them");
}
absl::Status CudnnAttention::Forward(const Context& context, const AttentionSegment&, const Tensor&,
                                     const Tensor&, const Tensor&, double, const Tensor&,
                                     const Tensor&) {
  return Of(context).status();
}
absl::Status CudnnAttention::Backward(const Context& context, const AttentionSegment&,
                                      const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, double, const Gradients&,
                                      int64_t) {
  return Of(context).status();
}

#else

namespace {

namespace fe = cudnn_frontend;
using fe::graph::Graph;
using fe::graph::Tensor_attributes;

// Names of the graphs' tensors.
enum Uid : int64_t { kQ = 1, kK, kV, kO, kLse, kDOut, kDq, kDk, kDv };

// [1, heads, rows, width] of an array [rows, all_heads, width].
Tensor_attributes Rows(Uid uid, int64_t rows, int64_t heads, int64_t all_heads, int64_t width) {
  return Tensor_attributes()
      .set_uid(uid)
      .set_data_type(fe::DataType_t::BFLOAT16)
      .set_dim({1, heads, rows, width})
      .set_stride({rows * all_heads * width, width, all_heads * width, 1});
}

// [heads, rows], packed.
Tensor_attributes Lse(int64_t rows, int64_t heads) {
  return Tensor_attributes()
      .set_uid(kLse)
      .set_data_type(fe::DataType_t::FLOAT)
      .set_dim({1, heads, rows, 1})
      .set_stride({heads * rows, rows, 1, 1});
}

void SetOutput(const std::shared_ptr<Tensor_attributes>& tensor, const Tensor_attributes& like) {
  tensor->set_output(true)
      .set_uid(like.get_uid())
      .set_data_type(like.get_data_type())
      .set_dim(like.get_dim())
      .set_stride(like.get_stride());
}

// The frontend's result as ours. What it does not support is another kernel's work.
absl::Status AsStatus(fe::error_t error, const char* what) {
  if (error.is_good()) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(what, ": ", error.get_message()));
}

}  // namespace

struct CudnnAttention::Plan {
  Graph graph;
  int64_t workspace_bytes = 0;
};

namespace {

template <typename Attributes>
void SetMask(CudnnShapes::Mask mask, Attributes& attributes) {
  if (mask == CudnnShapes::Mask::kNone) return;
  attributes
      .set_diagonal_alignment(mask == CudnnShapes::Mask::kTopLeft
                                  ? fe::DiagonalAlignment_t::TOP_LEFT
                                  : fe::DiagonalAlignment_t::BOTTOM_RIGHT)
      .set_diagonal_band_right_bound(0);
}

void AddForward(const CudnnShapes& s, Graph& graph) {
  const auto q = graph.tensor(Rows(kQ, s.rows, s.heads, s.all_heads, s.Q));
  const auto k = graph.tensor(Rows(kK, s.keys, s.heads, s.all_heads, s.Q));
  const auto v = graph.tensor(Rows(kV, s.keys, s.heads, s.all_heads, s.V));
  fe::graph::SDPA_attributes attributes;
  attributes.set_name("attention").set_generate_stats(true).set_attn_scale(s.scale);
  SetMask(s.mask, attributes);
  const auto [o, lse] = graph.sdpa(q, k, v, attributes);
  SetOutput(o, Rows(kO, s.rows, s.heads, s.all_heads, s.V));
  SetOutput(lse, Lse(s.rows, s.heads));
}

// dk and dv are packed by the call's heads: scratch.
void AddBackward(const CudnnShapes& s, Graph& graph) {
  const auto q = graph.tensor(Rows(kQ, s.rows, s.heads, s.all_heads, s.Q));
  const auto k = graph.tensor(Rows(kK, s.keys, s.heads, s.all_heads, s.Q));
  const auto v = graph.tensor(Rows(kV, s.keys, s.heads, s.all_heads, s.V));
  const auto o = graph.tensor(Rows(kO, s.rows, s.heads, s.all_heads, s.V));
  const auto d_out = graph.tensor(Rows(kDOut, s.rows, s.heads, s.all_heads, s.V));
  const auto lse = graph.tensor(Lse(s.rows, s.heads));
  fe::graph::SDPA_backward_attributes attributes;
  attributes.set_name("attention_backward").set_attn_scale(s.scale);
  attributes.set_deterministic_algorithm(true);
  SetMask(s.mask, attributes);
  const auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, o, d_out, lse, attributes);
  SetOutput(dq, Rows(kDq, s.rows, s.heads, s.dq_heads, s.Q));
  SetOutput(dk, Rows(kDk, s.keys, s.heads, s.heads, s.Q));
  SetOutput(dv, Rows(kDv, s.keys, s.heads, s.heads, s.V));
}

absl::Status Build(void* handle, CudnnAttention::Plan& plan) {
  Graph& graph = plan.graph;
  const auto cudnn = static_cast<cudnnHandle_t>(handle);
  RETURN_IF_ERROR(AsStatus(graph.validate(), "cuDNN attention, validate"));
  RETURN_IF_ERROR(AsStatus(graph.build_operation_graph(cudnn), "cuDNN attention, operation graph"));
  RETURN_IF_ERROR(AsStatus(graph.create_execution_plans({fe::HeurMode_t::A}),
                           "cuDNN attention, execution plans"));
  RETURN_IF_ERROR(AsStatus(graph.check_support(), "cuDNN attention, support"));
  RETURN_IF_ERROR(AsStatus(graph.build_plans(), "cuDNN attention, build"));
  return AsStatus(graph.get_workspace_size(plan.workspace_bytes), "cuDNN attention, workspace");
}

// A plan costs the host 50 ms (1 s for the first of its kind) and little memory. With so many, most
// are of documents whose lengths will not come again.
constexpr size_t kMaxPlans = 512;

// The arrays of a call begin at these elements.
template <typename T>
T* At(const Tensor& tensor, int64_t row, int64_t head) {
  return static_cast<T*>(tensor.raw()) + (row * tensor.dim(1) + head) * tensor.dim(2);
}

void Execute(void* handle, const CudnnAttention::Plan& plan, const Context& context,
             std::unordered_map<int64_t, void*> arrays) {
  const Tensor workspace = context.Empty(DType::kU8, {plan.workspace_bytes});
  fe::error_t error =
      plan.graph.execute(static_cast<cudnnHandle_t>(handle), arrays, workspace.raw());
  CHECK(error.is_good()) << "cuDNN attention: " << error.get_message();
}

}  // namespace

CudnnAttention::CudnnAttention(void* handle, std::string version)
    : handle_(handle), version_(std::move(version)) {}
CudnnAttention::~CudnnAttention() = default;

absl::StatusOr<CudnnAttention*> CudnnAttention::Of(const Context& context) {
  ASSIGN_OR_RETURN(void* const handle, context.cuda().cudnn());
  // Never destroyed, see the header. A device that is made anew has a new handle.
  static auto* const all = new std::map<std::pair<int, void*>, std::unique_ptr<CudnnAttention> >;
  static auto* const mutex = new std::mutex;
  const std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<CudnnAttention>& own = (*all)[{context.cuda().index(), handle}];
  if (own == nullptr) {
    ASSIGN_OR_RETURN(const SharedLibrary library,
                     SharedLibrary::Open({"libcudnn.so.9"}, "cuDNN (attention)"));
    cudnn_frontend::cudnn_dlhandle = dlopen(library.name().c_str(), RTLD_NOW);
    CHECK(cudnn_frontend::cudnn_dlhandle != nullptr) << library.name() << " was open before";
    // The frontend would take the runtime of CUDA 12 where both lie.
    setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", "libcudart.so.13", /*replace=*/0);
    const int64_t version = static_cast<int64_t>(library.Find<size_t()>("cudnnGetVersion")());
    own = std::make_unique<CudnnAttention>(
        handle, absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100));
  }
  return own.get();
}

absl::StatusOr<std::shared_ptr<const CudnnAttention::Plan> > CudnnAttention::PlanFor(
    const CudnnShapes& shapes) {
  auto found = plans_.find(shapes);
  if (found == plans_.end()) {
    if (plans_.size() >= kMaxPlans) plans_.clear();
    auto plan = std::make_shared<Plan>();
    plan->graph.set_sm_version(90)
        .set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    absl::Status status;
    try {  // the frontend throws where a library of CUDA lacks a function
      shapes.pass == CudnnShapes::Pass::kForward ? AddForward(shapes, plan->graph)
                                                 : AddBackward(shapes, plan->graph);
      status = Build(handle_, *plan);
    } catch (const std::exception& error) {
      status = absl::UnimplementedError(absl::StrCat("cuDNN attention: ", error.what()));
    }
    absl::StatusOr<std::shared_ptr<const Plan> > entry = std::move(plan);
    if (!status.ok()) entry = status;
    found = plans_.emplace(shapes, std::move(entry)).first;
  }
  return found->second;
}

absl::Status CudnnAttention::Forward(const Context& context, const AttentionSegment& segment,
                                     const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                                     double scale, const Tensor& o_THV, const Tensor& lse_TH) {
  const int64_t rows = segment.num_rows(), heads = q_THQ.dim(1), row = segment.row_begin;
  const bool is_square = rows == segment.num_keys();
  ASSIGN_OR_RETURN(
      const std::shared_ptr<const Plan> plan,
      PlanFor({.pass = CudnnShapes::Pass::kForward,
               .mask = is_square ? CudnnShapes::Mask::kTopLeft : CudnnShapes::Mask::kBottomRight,
               .rows = rows,
               .keys = segment.num_keys(),
               .heads = heads,
               .all_heads = heads,
               .dq_heads = 0,
               .Q = q_THQ.dim(2),
               .V = v_SHV.dim(2),
               .scale = static_cast<float>(scale)}));
  const Tensor lse_HT = CudaScratch(context, heads * rows);
  Execute(handle_, *plan, context,
          {{kQ, At<BFloat16>(q_THQ, row, 0)},
           {kK, At<BFloat16>(k_SHQ, segment.key_begin, 0)},
           {kV, At<BFloat16>(v_SHV, segment.key_begin, 0)},
           {kO, At<BFloat16>(o_THV, row, 0)},
           {kLse, lse_HT.raw()}});
  TransposeFloatsCuda(heads, rows, lse_HT.data<float>(), rows, lse_TH.data<float>() + row * heads,
                      heads, context.stream());
  return absl::OkStatus();
}

absl::Status CudnnAttention::Backward(const Context& context, const AttentionSegment& segment,
                                      const Tensor& do_THV, const Tensor& q_THQ,
                                      const Tensor& k_SHQ, const Tensor& v_SHV, const Tensor& o_THV,
                                      const Tensor& lse_TH, double scale,
                                      const Gradients& gradients, int64_t budget_bytes) {
  const int64_t all_heads = q_THQ.dim(1), Q = q_THQ.dim(2), V = v_SHV.dim(2);
  const std::vector<BackwardCall> calls = BackwardCalls(segment, all_heads, budget_bytes);
  // All plans first: nothing is written unless every call can be made.
  std::vector<std::shared_ptr<const Plan> > plans;  // held: the cache may drop them meanwhile
  for (const BackwardCall& call : calls) {
    ASSIGN_OR_RETURN(
        std::shared_ptr<const Plan> plan,
        PlanFor({.pass = CudnnShapes::Pass::kBackward,
                 .mask = call.triangle ? CudnnShapes::Mask::kTopLeft : CudnnShapes::Mask::kNone,
                 .rows = call.rows,
                 .keys = call.keys,
                 .heads = call.heads,
                 .all_heads = all_heads,
                 .dq_heads = call.adds_to_dq ? call.heads : all_heads,
                 .Q = Q,
                 .V = V,
                 .scale = static_cast<float>(scale)}));
    plans.push_back(std::move(plan));
  }
  const BackwardScratch scratch = ScratchOf(calls, Q, V);
  const Tensor dk = context.Empty(DType::kBF16, {scratch.dk_elements});
  const Tensor dv = context.Empty(DType::kBF16, {scratch.dv_elements});
  const Tensor dq = context.Empty(DType::kBF16, {scratch.dq_elements});
  const Tensor lse_HT = CudaScratch(context, scratch.lse_elements);
  for (size_t n = 0; n < calls.size(); ++n) {
    const BackwardCall& call = calls[n];
    const auto& [triangle, row, key, head, rows, keys, heads, adds_to_dq] = call;
    BFloat16* const own_dq = At<BFloat16>(gradients.dq_THQ, row, head);
    TransposeFloatsCuda(rows, heads, lse_TH.data<float>() + row * all_heads + head, all_heads,
                        lse_HT.data<float>(), rows, context.stream());
    Execute(handle_, *plans[n], context,
            {{kQ, At<BFloat16>(q_THQ, row, head)},
             {kK, At<BFloat16>(k_SHQ, key, head)},
             {kV, At<BFloat16>(v_SHV, key, head)},
             {kO, At<BFloat16>(o_THV, row, head)},
             {kDOut, At<BFloat16>(do_THV, row, head)},
             {kLse, lse_HT.raw()},
             {kDq, adds_to_dq ? dq.raw() : own_dq},
             {kDk, dk.raw()},
             {kDv, dv.raw()}});
    const CudaElement f32 = CudaElement::kF32;
    AddBf16RowsCuda(keys, heads * Q, dk.raw(), f32, At<float>(gradients.dk_SHQ, key, head),
                    all_heads * Q, context.stream());
    AddBf16RowsCuda(keys, heads * V, dv.raw(), f32, At<float>(gradients.dv_SHV, key, head),
                    all_heads * V, context.stream());
    if (!adds_to_dq) continue;
    AddBf16RowsCuda(rows, heads * Q, dq.raw(), CudaElement::kBF16, own_dq, all_heads * Q,
                    context.stream());
  }
  return absl::OkStatus();
}

#endif

}  // namespace baleen
