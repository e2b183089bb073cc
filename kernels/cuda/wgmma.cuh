// Warpgroup matrix multiply: shared-memory descriptors and ordering. The instructions themselves
// are in wgmma_bf16.cuh and wgmma_fp8.cuh.
//
// Every operand tile here is built of atoms of 8 lines x 128 bytes (64 bf16) with the 128-byte
// swizzle: the 16-byte chunk c of line l lies at chunk c ^ (l % 8). Atoms start at multiples of
// 1024.
//   K-major  (line = a row of the matrix, 128 B run along the reduction): `stride` = bytes between
//            groups of 8 rows. The next 16 of the reduction: address + 32 within the 128 B.
//   MN-major (line = one reduction index, 128 B run along M or N; needs the transposed form of the
//            instruction): `stride` = bytes between groups of 8 reduction indices, `lead` = bytes
//            between runs of 64 along M or N. The next 16 of the reduction: address + 2 * stride.
#pragma once

#include <cstdint>

namespace baleen::cuda {

// Byte offset of 16-byte chunk `chunk` (0..7) of line `line` in a column of swizzled atoms.
__device__ __forceinline__ uint32_t SwizzledOffset(uint32_t line, uint32_t chunk) {
  return line * 128 + ((chunk ^ (line & 7)) << 4);
}

__device__ __forceinline__ uint64_t Descriptor(uint32_t shared, uint32_t lead_bytes,
                                               uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | (uint64_t{stride_bytes >> 4} << 32) | (uint64_t{lead_bytes >> 4} << 16) |
         ((shared & 0x3FFFF) >> 4);
}
__device__ __forceinline__ uint64_t DescriptorKMajor(uint32_t shared,
                                                     uint32_t stride_bytes = 1024) {
  return Descriptor(shared, 16, stride_bytes);
}
__device__ __forceinline__ uint64_t DescriptorMnMajor(uint32_t shared, uint32_t lead_bytes,
                                                      uint32_t stride_bytes = 1024) {
  return Descriptor(shared, lead_bytes, stride_bytes);
}
// Hides a descriptor's origin from the compiler, which otherwise keeps every sum of it in a
// register across a loop, and spills.
__device__ __forceinline__ uint64_t Opaque(uint64_t descriptor) {
  asm volatile("" : "+l"(descriptor));
  return descriptor;
}

// The descriptor of the same tile `bytes` further on.
__device__ __forceinline__ uint64_t Advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Before the first instruction that reads registers written by this warpgroup (accumulators or A).
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending groups of this warpgroup are incomplete.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses of an accumulator across a wait.
template <int kCount>
__device__ __forceinline__ void PinRegisters(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

}  // namespace baleen::cuda
