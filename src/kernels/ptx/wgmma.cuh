// Warpgroup matrix multiply (wgmma): descriptors, ordering, and the shapes.
//
// Fragment map of a 64×N float accumulator: thread t of the warpgroup, warp w = t/32, g = t%32/4, c = t%4. Element e is
// row 16w + g + 8·((e>>1)&1), column 8·(e>>2) + 2c + (e&1). The same registers, packed in pairs, are an A operand of
// the next product: k-step j takes the pairs of columns 16j … 16j+15.
//
// Order of one batch: wgmma_fence, products, wgmma_commit, …, wgmma_wait. Between commit and the wait that covers it
// neither the accumulators nor the A registers may be touched; keep() pins them for the compiler at both ends.
#pragma once

#include <cstdint>

#include "wgmma_shapes.cuh"

namespace flashcore::ptx {

/// wgmma.fence
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// wgmma.commit_group
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// wgmma.wait_group: at most kPending groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// No instruction: the compiler must have the registers in their final state here and may assume nothing after it.
template <int N>
__device__ __forceinline__ void keep(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
__device__ __forceinline__ void keep(std::uint32_t (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

/// Shared-memory matrix descriptor of a tile with 128-byte swizzle: rows of 128 bytes, atoms of 8 rows (1024 bytes).
/// `leading_bytes`: distance between 64-wide panels for a transposed B; unused otherwise. Steps inside the tile are
/// added to the descriptor in units of 16 bytes.
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t s_tile, std::uint32_t leading_bytes) {
  constexpr std::uint64_t kAtomBytes = 1024;
  constexpr std::uint64_t kSwizzle128 = 1;
  return static_cast<std::uint64_t>((s_tile >> 4) & 0x3fff) | static_cast<std::uint64_t>(leading_bytes >> 4) << 16 |
         (kAtomBytes >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace flashcore::ptx
