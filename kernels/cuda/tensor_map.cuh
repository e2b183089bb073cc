// Two-dimensional tiles by the copy engine (TMA): a tensor map made on the host says where a matrix
// lies and how large a tile is; one thread then asks for the tile at (column, row), which lands in
// shared memory with the 128-byte swizzle of wgmma.cuh. Parts of a tile outside the matrix arrive
// as zeros and count in the announced bytes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/barrier.cuh"

namespace baleen::cuda {

// A row-major matrix [rows, row_bytes] of `type`, rows dense; tiles of box_rows x 128 bytes.
inline cudaError_t MakeTensorMap(CUtensorMap* map, CUtensorMapDataType type, int element_bytes,
                                 const void* base, int64_t rows, int64_t row_bytes, int box_rows) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes / element_bytes),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / element_bytes),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, type, 2, const_cast<void*>(base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Tile whose first element is (column, row), in elements; its bytes land on `barrier`. The column
// lies at a multiple of 16 bytes: from elsewhere the copy engine ends with an illegal instruction.
__device__ __forceinline__ void TensorLoad(uint32_t shared, const CUtensorMap* map, int column,
                                           int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(SharedAddress(barrier))
      : "memory");
}

}  // namespace baleen::cuda
