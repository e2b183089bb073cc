// The barrier operations of barrier.cuh by 32-bit shared address, for inner loops: converting a
// pointer costs a few dependent instructions on every use.
#pragma once

#include <cstdint>

namespace baleen::cuda {

__device__ __forceinline__ void BarrierArriveAt(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void BarrierWaitAt(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace baleen::cuda
