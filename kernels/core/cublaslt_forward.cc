// cuBLASLt's functions by their own names, each forwarding to the library that is loaded at the
// first call: kernels call them as documented, and the binary still links no cuBLASLt
// (shared_library.h). One more function of it is one more entry here.
#include <cublasLt.h>

#include <type_traits>

#include "kernels/core/shared_library.h"

namespace {

// MakeCudaContext has opened the library before and returned an error where there is none.
const baleen::SharedLibrary& Library() {
  static const baleen::SharedLibrary* const library = [] {
    auto opened = baleen::SharedLibrary::Open({"libcublasLt.so.13"}, "cuBLASLt (matrix products)");
    CHECK_OK(opened.status());
    return new baleen::SharedLibrary(*opened);
  }();
  return *library;
}

// Looks a function up once; the forwarding function names it.
template <auto kForwarder>
auto* Target(const char* name) {
  using Function = std::remove_pointer_t<decltype(kForwarder)>;
  static Function* const target = Library().Find<Function>(name);
  return target;
}

}  // namespace

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t* lightHandle) {
  return Target<&cublasLtCreate>("cublasLtCreate")(lightHandle);
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t lightHandle) {
  return Target<&cublasLtDestroy>("cublasLtDestroy")(lightHandle);
}
size_t cublasLtGetVersion() { return Target<&cublasLtGetVersion>("cublasLtGetVersion")(); }
const char* cublasLtGetStatusString(cublasStatus_t status) {
  return Target<&cublasLtGetStatusString>("cublasLtGetStatusString")(status);
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t computeDesc,
                              const void* alpha, const void* A, cublasLtMatrixLayout_t Adesc,
                              const void* B, cublasLtMatrixLayout_t Bdesc, const void* beta,
                              const void* C, cublasLtMatrixLayout_t Cdesc, void* D,
                              cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspaceSizeInBytes, cudaStream_t stream) {
  return Target<&cublasLtMatmul>("cublasLtMatmul")(lightHandle, computeDesc, alpha, A, Adesc, B,
                                                   Bdesc, beta, C, Cdesc, D, Ddesc, algo, workspace,
                                                   workspaceSizeInBytes, stream);
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* matLayout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
  return Target<&cublasLtMatrixLayoutCreate>("cublasLtMatrixLayoutCreate")(matLayout, type, rows,
                                                                           cols, ld);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t matLayout) {
  return Target<&cublasLtMatrixLayoutDestroy>("cublasLtMatrixLayoutDestroy")(matLayout);
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t matLayout,
                                                cublasLtMatrixLayoutAttribute_t attr,
                                                const void* buf, size_t sizeInBytes) {
  return Target<&cublasLtMatrixLayoutSetAttribute>("cublasLtMatrixLayoutSetAttribute")(
      matLayout, attr, buf, sizeInBytes);
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* matmulDesc,
                                        cublasComputeType_t computeType, cudaDataType_t scaleType) {
  return Target<&cublasLtMatmulDescCreate>("cublasLtMatmulDescCreate")(matmulDesc, computeType,
                                                                       scaleType);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t matmulDesc) {
  return Target<&cublasLtMatmulDescDestroy>("cublasLtMatmulDescDestroy")(matmulDesc);
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmulDesc,
                                              cublasLtMatmulDescAttributes_t attr, const void* buf,
                                              size_t sizeInBytes) {
  return Target<&cublasLtMatmulDescSetAttribute>("cublasLtMatmulDescSetAttribute")(
      matmulDesc, attr, buf, sizeInBytes);
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* pref) {
  return Target<&cublasLtMatmulPreferenceCreate>("cublasLtMatmulPreferenceCreate")(pref);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref) {
  return Target<&cublasLtMatmulPreferenceDestroy>("cublasLtMatmulPreferenceDestroy")(pref);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr,
                                                    const void* buf, size_t sizeInBytes) {
  return Target<&cublasLtMatmulPreferenceSetAttribute>("cublasLtMatmulPreferenceSetAttribute")(
      pref, attr, buf, sizeInBytes);
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t operationDesc, cublasLtMatrixLayout_t Adesc,
    cublasLtMatrixLayout_t Bdesc, cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
    cublasLtMatmulPreference_t preference, int requestedAlgoCount,
    cublasLtMatmulHeuristicResult_t heuristicResultsArray[], int* returnAlgoCount) {
  return Target<&cublasLtMatmulAlgoGetHeuristic>("cublasLtMatmulAlgoGetHeuristic")(
      lightHandle, operationDesc, Adesc, Bdesc, Cdesc, Ddesc, preference, requestedAlgoCount,
      heuristicResultsArray, returnAlgoCount);
}
cublasStatus_t cublasLtMatmulAlgoGetIds(cublasLtHandle_t lightHandle,
                                        cublasComputeType_t computeType, cudaDataType_t scaleType,
                                        cudaDataType_t Atype, cudaDataType_t Btype,
                                        cudaDataType_t Ctype, cudaDataType_t Dtype,
                                        int requestedAlgoCount, int algoIdsArray[],
                                        int* returnAlgoCount) {
  return Target<&cublasLtMatmulAlgoGetIds>("cublasLtMatmulAlgoGetIds")(
      lightHandle, computeType, scaleType, Atype, Btype, Ctype, Dtype, requestedAlgoCount,
      algoIdsArray, returnAlgoCount);
}
cublasStatus_t cublasLtMatmulAlgoInit(cublasLtHandle_t lightHandle, cublasComputeType_t computeType,
                                      cudaDataType_t scaleType, cudaDataType_t Atype,
                                      cudaDataType_t Btype, cudaDataType_t Ctype,
                                      cudaDataType_t Dtype, int algoId,
                                      cublasLtMatmulAlgo_t* algo) {
  return Target<&cublasLtMatmulAlgoInit>("cublasLtMatmulAlgoInit")(
      lightHandle, computeType, scaleType, Atype, Btype, Ctype, Dtype, algoId, algo);
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t lightHandle,
                                       cublasLtMatmulDesc_t operationDesc,
                                       cublasLtMatrixLayout_t Adesc, cublasLtMatrixLayout_t Bdesc,
                                       cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
                                       const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
  return Target<&cublasLtMatmulAlgoCheck>("cublasLtMatmulAlgoCheck")(
      lightHandle, operationDesc, Adesc, Bdesc, Cdesc, Ddesc, algo, result);
}
cublasStatus_t cublasLtMatmulAlgoCapGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                 cublasLtMatmulAlgoCapAttributes_t attr, void* buf,
                                                 size_t sizeInBytes, size_t* sizeWritten) {
  return Target<&cublasLtMatmulAlgoCapGetAttribute>("cublasLtMatmulAlgoCapGetAttribute")(
      algo, attr, buf, sizeInBytes, sizeWritten);
}
cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attr,
                                                    const void* buf, size_t sizeInBytes) {
  return Target<&cublasLtMatmulAlgoConfigSetAttribute>("cublasLtMatmulAlgoConfigSetAttribute")(
      algo, attr, buf, sizeInBytes);
}
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attr,
                                                    void* buf, size_t sizeInBytes,
                                                    size_t* sizeWritten) {
  return Target<&cublasLtMatmulAlgoConfigGetAttribute>("cublasLtMatmulAlgoConfigGetAttribute")(
      algo, attr, buf, sizeInBytes, sizeWritten);
}

}  // extern "C"
