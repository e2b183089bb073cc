// Barriers of a thread block or cluster: mbarriers (phases counted by arrivals and bytes), named
// barriers (bar.sync over some warps), cluster barriers.
//
// An mbarrier completes phase n when its expected arrivals came and all announced bytes landed. A
// waiter names the parity of the phase it waits for: 0 for the first, 1 for the second, 0 for the
// third... Waiting for parity 1 on a fresh barrier returns at once (how producers start).
#pragma once

#include <cstdint>

namespace baleen::cuda {

// The 32-bit shared-window address that PTX instructions take.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The address of the same shared variable in another block of the cluster.
__device__ __forceinline__ uint32_t PeerAddress(uint32_t shared_address, uint32_t cluster_rank) {
  uint32_t peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(shared_address), "r"(cluster_rank));
  return peer;
}

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// After BarrierInit, before the copy engine or another block of the cluster may arrive.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// One arrival that also announces bytes which the copy engine will deliver in this phase.
__device__ __forceinline__ void BarrierArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives on the same barrier of another block in the cluster, for handing its own reads of shared
// memory back. Not .release.cluster: that costs a memory barrier of the whole chip. Data goes with
// StorePeer16 or BulkCopyToPeer, which complete on the receiver's barrier themselves.
__device__ __forceinline__ void BarrierArrivePeer(uint64_t* barrier, uint32_t cluster_rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(
                   PeerAddress(SharedAddress(barrier), cluster_rank))
               : "memory");
}

// Waits until the phase of the given parity has completed (acquire at block scope).
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// Named barriers 1..15 (0 is __syncthreads): `threads` counts those that sync and those that
// arrive.
__device__ __forceinline__ void NamedSync(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedArrive(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterSync() {
  ClusterArrive();
  ClusterWait();
}

}  // namespace baleen::cuda
