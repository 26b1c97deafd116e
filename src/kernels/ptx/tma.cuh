// The bulk tensor copy engine (TMA): tiles between global and shared memory, addressed through tensor maps.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace flashcore::ptx {

/// L2 cache hints, as createpolicy makes them.
inline constexpr std::uint64_t kEvictFirst = 0x12F0000000000000ull;
inline constexpr std::uint64_t kEvictLast = 0x14F0000000000000ull;

/// prefetch.tensormap: the map will be needed soon.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// cp.async.bulk.tensor.4d, global to shared: completes its bytes (a full box, also where it is clipped and filled with
/// zeros) on `barrier`.
__device__ __forceinline__ void tma_load(std::uint32_t s_target, const CUtensorMap* map, std::uint32_t barrier, int c0,
                                         int c1, int c2, int c3, std::uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(s_target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
      : "memory");
}

/// cp.async.bulk.prefetch.tensor.4d: the box into the L2 cache. A hint: nobody waits for it.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

/// cp.async.bulk.tensor.4d, shared to global, in the thread's bulk group. What lies outside the tensor is not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, std::uint32_t s_source, int c0, int c1, int c2,
                                          int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(s_source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

/// cp.async.bulk.commit_group
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// cp.async.bulk.wait_group: at most kPending of the thread's groups are not done yet, their writes included.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

/// cp.async.bulk.wait_group.read: at most kPending of the thread's groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace flashcore::ptx
