// cuBLASLt counts matrices by columns and multiplies FP8 as A^T B only, both operands dense along
// K:
//
//   C^T [N, M] = B [N, K] A^T [K, M]      B its first operand (transposed), A its second
//
// Which is how both are stored: rows of K codes. Plans are kept as in matmul_cuda.cu, and their
// choice is a function of the shape alone: everything here is aligned to 16 bytes.
#include <cublasLt.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/linear/fp8_linear_cuda.h"

namespace baleen {
namespace {

void CheckBlas(cublasStatus_t status, const char* what, const Fp8MatmulCudaArgs& args) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "fp8 matmul: %s of [%lld, %lld] over %lld: cuBLASLt says %s\n", what,
               static_cast<long long>(args.m), static_cast<long long>(args.n),
               static_cast<long long>(args.k), cublasLtGetStatusString(status));
  std::abort();
}

// Handles of a plan live as long as the process.
struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
};

template <typename Value>
void Set(const Plan& plan, cublasLtMatmulDescAttributes_t attribute, const Value& value,
         const Fp8MatmulCudaArgs& args) {
  CheckBlas(cublasLtMatmulDescSetAttribute(plan.product, attribute, &value, sizeof value),
            "attribute", args);
}

void SetScales(const Plan& plan, const Fp8MatmulCudaArgs& args) {
  Set(plan, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.b.scales, args);
  Set(plan, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.a.scales, args);
}

cublasLtMatrixLayout_t MakeLayout(cudaDataType_t type, int64_t rows, int64_t columns,
                                  const Fp8MatmulCudaArgs& args) {
  cublasLtMatrixLayout_t layout = nullptr;
  CheckBlas(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(columns),
                                       static_cast<uint64_t>(rows), columns),
            "layout", args);
  return layout;
}

int32_t ScaleMode(const Fp8MatmulCudaOperand& operand) {
  return operand.blocks ? CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F
                        : CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
}

Plan MakePlan(const Fp8MatmulCudaArgs& args, const MatmulCudaLibrary& library) {
  Plan plan;
  CheckBlas(cublasLtMatmulDescCreate(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product",
            args);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  Set(plan, CUBLASLT_MATMUL_DESC_TRANSA, transposed, args);
  Set(plan, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, ScaleMode(args.b), args);
  Set(plan, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, ScaleMode(args.a), args);
  SetScales(plan, args);
  plan.a = MakeLayout(CUDA_R_8F_E4M3, args.m, args.k, args);
  plan.b = MakeLayout(CUDA_R_8F_E4M3, args.n, args.k, args);
  plan.c = MakeLayout(args.result_element == CudaElement::kBF16 ? CUDA_R_16BF : CUDA_R_32F, args.m,
                      args.n, args);

  cublasLtMatmulPreference_t preference = nullptr;
  CheckBlas(cublasLtMatmulPreferenceCreate(&preference), "preference", args);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    CheckBlas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
              "preference", args);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<size_t>(library.workspace_bytes));
  // No split of K, or one whose parts lie in the workspace and are added in order.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(alignment, uint32_t{16});
  }

  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  CheckBlas(
      cublasLtMatmulAlgoGetHeuristic(static_cast<cublasLtHandle_t>(library.handle), plan.product,
                                     plan.b, plan.a, plan.c, plan.c, preference, 1, &best, &found),
      "choice of a kernel", args);
  CheckBlas(found > 0 ? best.state : CUBLAS_STATUS_NOT_SUPPORTED, "choice of a kernel", args);
  CheckBlas(cublasLtMatmulPreferenceDestroy(preference), "preference", args);
  plan.algorithm = best.algo;
  return plan;
}

// A memo of a pure function, not state: what it returns depends on the key alone.
const Plan& PlanOf(const Fp8MatmulCudaArgs& args, const MatmulCudaLibrary& library) {
  using Key = std::array<int64_t, 6>;
  static std::mutex* const mutex = new std::mutex;
  static std::map<Key, Plan>* const plans = new std::map<Key, Plan>;
  const Key key = {args.m,
                   args.n,
                   args.k,
                   args.a.blocks + 2 * args.b.blocks + 4 * args.add +
                       8 * (args.result_element == CudaElement::kBF16),
                   reinterpret_cast<int64_t>(library.handle),
                   library.workspace_bytes};
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto found = plans->find(key);
  if (found != plans->end()) return found->second;
  return plans->emplace(key, MakePlan(args, library)).first->second;
}

}  // namespace

void Fp8MatmulCuda(const Fp8MatmulCudaArgs& args, const MatmulCudaLibrary& library, void* stream) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return;
  const Plan& plan = PlanOf(args, library);
  SetScales(plan, args);
  const float alpha = 1.0f, beta = args.add ? 1.0f : 0.0f;
  CheckBlas(cublasLtMatmul(static_cast<cublasLtHandle_t>(library.handle), plan.product, &alpha,
                           args.b.codes, plan.b, args.a.codes, plan.a, &beta, args.c, plan.c,
                           args.c, plan.c, &plan.algorithm, library.workspace,
                           static_cast<size_t>(library.workspace_bytes), cuda::AsStream(stream)),
            "product", args);
}

}  // namespace baleen
