// Copies that run beside the threads: cp.async (16 B a thread, for gathers; generic proxy) and
// cp.async.bulk (contiguous runs; async proxy, sizes and addresses in 16 B).
//
// Proxies: shared memory written by st/stmatrix/cp.async and read next by wgmma or a bulk copy
// needs FenceProxyAsync() between the write and the read: in each writing thread before the barrier
// (for cp.async: after its wait), or, where cp.async arrives on an mbarrier by itself, in the
// readers behind that barrier.
#pragma once

#include <cstdint>

#include "kernels/cuda/barrier.cuh"

namespace baleen::cuda {

// L2 policies for the `hint` arguments.
__device__ __forceinline__ uint64_t PolicyEvictFirst() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// --- cp.async: one 16-byte chunk per thread, past L1; `valid` false writes zeros. ---------------

__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global,
                                            bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// The barrier gets this thread's arrival when all its earlier cp.async have landed; the arrival
// counts among those given to BarrierInit (noinc).
__device__ __forceinline__ void CopyAsyncArrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// --- cp.async.bulk: one thread moves a contiguous run. -----------------------------------------

// Global to shared; `bytes` land on `barrier` (announce them with BarrierArriveExpect).
__device__ __forceinline__ void BulkLoad(uint32_t shared, const void* global, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void BulkLoadHint(uint32_t shared, const void* global, uint32_t bytes,
                                             uint64_t* barrier, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier)), "l"(hint)
      : "memory");
}

// 16 bytes of registers into another block's shared memory; they count on a barrier there (both
// addresses from PeerAddress), which the receiver armed or will arm with BarrierArriveExpect.
__device__ __forceinline__ void StorePeer16(uint32_t peer_shared, uint32_t peer_barrier, uint32_t a,
                                            uint32_t b, uint32_t c, uint32_t d) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(peer_shared),
      "r"(peer_barrier), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

__device__ __forceinline__ void BulkCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most kPending groups of this thread still *read* their shared source.
template <int kPending>
__device__ __forceinline__ void BulkWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending groups are incomplete (their writes not yet visible).
template <int kPending>
__device__ __forceinline__ void BulkWait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's ordinary shared writes before later reads by wgmma or the copy engine.
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The same for shared memory of the whole cluster and for global memory.
__device__ __forceinline__ void FenceProxyAsyncAll() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace baleen::cuda
