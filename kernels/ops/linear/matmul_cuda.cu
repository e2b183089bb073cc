// cuBLASLt counts matrices by columns, so a row-major C [M, N] is its C^T [N, M]:
//
//   C^T = op(B)^T op(A)^T      B as its first operand, A as its second, each with its own transpose
//   flag
//
// A shape's plan (descriptors and the chosen kernel) is made at its first call, about 50 us of host
// time, and kept for the process. The kernel is the first that cuBLASLt suggests, or for shapes of
// a measured table (matmul_choices_cuda.h) the configuration named there. The choice is a function
// of the shape, the strides and the alignment of the pointers up to 16 bytes: no more than that,
// since how far an allocation happens to be aligned beyond it must not change a run's bits.
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/linear/matmul_choices_cuda.h"
#include "kernels/ops/linear/matmul_cuda.h"

namespace baleen {
namespace {

void CheckBlas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "matmul: %s: cuBLASLt says %s\n", what, cublasLtGetStatusString(status));
  std::abort();
}

static_assert(k128x152.tile == CUBLASLT_MATMUL_TILE_128x152 &&
              k128x160.tile == CUBLASLT_MATMUL_TILE_128x160 &&
              k128x176.tile == CUBLASLT_MATMUL_TILE_128x176 &&
              k128x216.tile == CUBLASLT_MATMUL_TILE_128x216 &&
              k128x288.tile == CUBLASLT_MATMUL_TILE_128x288 &&
              k176x128.tile == CUBLASLT_MATMUL_TILE_176x128 &&
              k192x128.tile == CUBLASLT_MATMUL_TILE_192x128 &&
              k224x128.tile == CUBLASLT_MATMUL_TILE_224x128 &&
              k256x112.tile == CUBLASLT_MATMUL_TILE_256x112 &&
              kMatmulStages == CUBLASLT_MATMUL_STAGES_64xAUTO);

constexpr uint32_t kAlignmentCap = 16;

uint32_t AlignmentOf(const void* pointer) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(pointer) | kAlignmentCap;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

int64_t ElementBytes(CudaElement element) { return element == CudaElement::kBF16 ? 2 : 4; }
cudaDataType_t BlasType(CudaElement element) {
  return element == CudaElement::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
}

// A matrix as stored: rows of `cols` elements.
struct Stored {
  CudaElement element;
  int64_t rows, cols, row_stride, batch_stride;
  uint32_t alignment;
};

// What a plan depends on.
using Key = std::array<int64_t, 22>;

struct Problem {
  int64_t batch;
  Stored a, b, c;
  bool transpose_a, transpose_b, add;
  const MatmulCudaLibrary* library;

  Key MakeKey() const {
    Key key = {};
    size_t i = 0;
    for (const Stored* matrix : {&a, &b, &c}) {
      key[i++] = static_cast<int64_t>(matrix->element);
      key[i++] = matrix->rows;
      key[i++] = matrix->cols;
      key[i++] = matrix->row_stride;
      key[i++] = matrix->batch_stride;
      key[i++] = matrix->alignment;
    }
    key[i++] = batch;
    key[i++] = transpose_a + 2 * transpose_b + 4 * add;
    key[i++] = reinterpret_cast<int64_t>(library->handle);
    key[i++] = library->workspace_bytes;
    return key;
  }
};

// Handles of a plan live as long as the process.
struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
};

cublasLtMatrixLayout_t MakeLayout(const Stored& matrix, int64_t batch) {
  cublasLtMatrixLayout_t layout = nullptr;
  // A matrix of one row may have any row stride.
  CheckBlas(cublasLtMatrixLayoutCreate(
                &layout, BlasType(matrix.element), static_cast<uint64_t>(matrix.cols),
                static_cast<uint64_t>(matrix.rows), std::max(matrix.row_stride, matrix.cols)),
            "layout");
  const int32_t count = static_cast<int32_t>(batch);
  CheckBlas(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                             sizeof count),
            "batch");
  CheckBlas(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                             &matrix.batch_stride, sizeof matrix.batch_stride),
            "batch stride");
  return layout;
}

void Prefer(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
            const void* value, size_t bytes) {
  CheckBlas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes),
            "preference");
}

void SetTranspose(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t operand, bool yes) {
  const cublasOperation_t operation = yes ? CUBLAS_OP_T : CUBLAS_OP_N;
  CheckBlas(cublasLtMatmulDescSetAttribute(product, operand, &operation, sizeof operation),
            "transpose");
}

// Of single bf16 products in the model's three forms.
std::optional<MatmulKernelChoice> WantedKernel(const Problem& problem) {
  const bool bf16 =
      problem.a.element == CudaElement::kBF16 && problem.b.element == CudaElement::kBF16;
  // Whether C is added to or overwritten is no part of what cuBLASLt chooses a kernel by.
  const bool sum = problem.c.element == CudaElement::kF32;
  const bool plain = problem.c.element == CudaElement::kBF16;
  if (!bf16 || problem.batch != 1) return std::nullopt;
  // The table's kernels copy whole tiles, which takes 16-byte rows. A suggestion needs no such
  // question: it was asked for with the alignment.
  for (const Stored* matrix : {&problem.a, &problem.b, &problem.c}) {
    if (matrix->alignment < 16 || matrix->row_stride * ElementBytes(matrix->element) % 16 != 0) {
      return std::nullopt;
    }
  }
  MatmulShape shape = {MatmulPass::kForward, problem.c.rows, problem.c.cols, 0};
  if (plain && !problem.transpose_a) {
    shape.pass = problem.transpose_b ? MatmulPass::kForward : MatmulPass::kInput;
    shape.k = problem.a.cols;
  } else if (sum && problem.transpose_a && !problem.transpose_b) {
    shape.pass = MatmulPass::kWeight;
    shape.k = problem.a.rows;
  } else {
    return std::nullopt;
  }
  return ChooseMatmulKernel(shape);
}

template <typename T>
bool Configure(cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute,
               T value) {
  return cublasLtMatmulAlgoConfigSetAttribute(&algorithm, attribute, &value, sizeof value) ==
         CUBLAS_STATUS_SUCCESS;
}

// Nothing where the library in use has no such kernel.
std::optional<cublasLtMatmulAlgo_t> TableKernel(const Problem& problem, const Plan& plan,
                                                const MatmulKernelChoice& choice) {
  const auto handle = static_cast<cublasLtHandle_t>(problem.library->handle);
  const cudaDataType_t operand = BlasType(problem.a.element), result = BlasType(problem.c.element);
  cublasLtMatmulAlgo_t algorithm = {};
  const bool known =
      cublasLtMatmulAlgoInit(handle, CUBLAS_COMPUTE_32F, CUDA_R_32F, operand, operand, result,
                             result, kMatmulAlgorithm, &algorithm) == CUBLAS_STATUS_SUCCESS &&
      Configure(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, choice.tile) &&
      Configure(algorithm, CUBLASLT_ALGO_CONFIG_STAGES_ID, kMatmulStages) &&
      Configure(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, choice.cluster) &&
      Configure(algorithm, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, choice.custom);
  if (!known) return std::nullopt;
  cublasLtMatmulHeuristicResult_t checked = {};
  const cublasStatus_t status = cublasLtMatmulAlgoCheck(handle, plan.product, plan.b, plan.a,
                                                        plan.c, plan.c, &algorithm, &checked);
  const auto workspace = static_cast<size_t>(problem.library->workspace_bytes);
  if (status != CUBLAS_STATUS_SUCCESS || checked.workspaceSize > workspace) return std::nullopt;
  return algorithm;
}

// Suggested by cuBLASLt for the shapes, strides and alignments.
cublasLtMatmulAlgo_t FirstSuggestion(const Problem& problem, const Plan& plan) {
  cublasLtMatmulPreference_t preference = nullptr;
  CheckBlas(cublasLtMatmulPreferenceCreate(&preference), "preference");
  const size_t workspace = static_cast<size_t>(problem.library->workspace_bytes);
  // No split of K, or one whose parts lie in the workspace and are added in order.
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  Prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
  Prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions);
  const auto prefer_alignment = [&](cublasLtMatmulPreferenceAttributes_t attribute,
                                    const Stored& matrix) {
    Prefer(preference, attribute, &matrix.alignment, sizeof matrix.alignment);
  };
  prefer_alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, problem.b);
  prefer_alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, problem.a);
  prefer_alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, problem.c);
  prefer_alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, problem.c);

  cublasLtMatmulHeuristicResult_t suggested = {};
  int found = 0;
  CheckBlas(cublasLtMatmulAlgoGetHeuristic(static_cast<cublasLtHandle_t>(problem.library->handle),
                                           plan.product, plan.b, plan.a, plan.c, plan.c, preference,
                                           1, &suggested, &found),
            "choice of a kernel");
  CheckBlas(found > 0 ? suggested.state : CUBLAS_STATUS_NOT_SUPPORTED, "choice of a kernel");
  CheckBlas(cublasLtMatmulPreferenceDestroy(preference), "preference");
  return suggested.algo;
}

Plan MakePlan(const Problem& problem) {
  Plan plan;
  // COMPUTE_32F is plain fp32 for fp32 operands; TF32 would have a name of its own.
  CheckBlas(cublasLtMatmulDescCreate(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product");
  SetTranspose(plan.product, CUBLASLT_MATMUL_DESC_TRANSA, problem.transpose_b);
  SetTranspose(plan.product, CUBLASLT_MATMUL_DESC_TRANSB, problem.transpose_a);
  plan.a = MakeLayout(problem.a, problem.batch);
  plan.b = MakeLayout(problem.b, problem.batch);
  plan.c = MakeLayout(problem.c, problem.batch);

  if (const std::optional<MatmulKernelChoice> wanted = WantedKernel(problem)) {
    if (const auto kernel = TableKernel(problem, plan, *wanted)) {
      plan.algorithm = *kernel;
      return plan;
    }
    std::fprintf(
        stderr,
        "matmul: cuBLASLt %zu refuses tile %u, cluster %u, option %u for [%lld, %lld]; its "
        "own first choice runs, which may be slower\n",
        cublasLtGetVersion(), wanted->tile, unsigned{wanted->cluster}, wanted->custom,
        static_cast<long long>(problem.c.rows), static_cast<long long>(problem.c.cols));
  }
  plan.algorithm = FirstSuggestion(problem, plan);
  return plan;
}

// A memo of a pure function, not state: what it returns depends on the key alone.
const Plan& PlanOf(const Problem& problem) {
  static std::mutex* const mutex = new std::mutex;
  static std::map<Key, Plan>* const plans = new std::map<Key, Plan>;
  const Key key = problem.MakeKey();
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto found = plans->find(key);
  if (found != plans->end()) return found->second;
  return plans->emplace(key, MakePlan(problem)).first->second;
}

Stored StoredOperand(const MatmulCudaArgs& args, const MatmulCudaOperand& operand, int64_t rows,
                     int64_t cols) {
  if (operand.transposed) std::swap(rows, cols);
  return {args.element,
          rows,
          cols,
          operand.row_stride,
          operand.batch_stride,
          AlignmentOf(operand.data)};
}

// K = 0: an empty sum.
void Clear(const MatmulCudaArgs& args, cudaStream_t stream) {
  const int64_t bytes = ElementBytes(args.result_element);
  for (int64_t b = 0; b < args.batch; ++b) {
    cuda::CheckCuda(
        cudaMemset2DAsync(static_cast<char*>(args.c) + b * args.c_batch_stride * bytes,
                          static_cast<size_t>(std::max(args.c_row_stride, args.n) * bytes), 0,
                          static_cast<size_t>(args.n * bytes), static_cast<size_t>(args.m), stream),
        "matmul: zeros");
  }
}

}  // namespace

void MatmulCuda(const MatmulCudaArgs& args, const MatmulCudaLibrary& library, void* stream) {
  if (args.batch == 0 || args.m == 0 || args.n == 0) return;
  if (args.k == 0) {
    if (!args.add) Clear(args, cuda::AsStream(stream));
    return;
  }
  const Problem problem = {args.batch,
                           StoredOperand(args, args.a, args.m, args.k),
                           StoredOperand(args, args.b, args.k, args.n),
                           {args.result_element, args.m, args.n, args.c_row_stride,
                            args.c_batch_stride, AlignmentOf(args.c)},
                           args.a.transposed,
                           args.b.transposed,
                           args.add,
                           &library};
  const Plan& plan = PlanOf(problem);
  const float beta = args.add ? 1.0f : 0.0f;
  CheckBlas(cublasLtMatmul(static_cast<cublasLtHandle_t>(library.handle), plan.product, &args.alpha,
                           args.b.data, plan.b, args.a.data, plan.a, &beta, args.c, plan.c, args.c,
                           plan.c, &plan.algorithm, library.workspace,
                           static_cast<size_t>(library.workspace_bytes), cuda::AsStream(stream)),
            "product");
}

}  // namespace baleen
