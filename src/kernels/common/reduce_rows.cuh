// Reductions whose neighbouring elements belong to one result, which is called a row.
#pragma once

#include "../../cuda/launch.cuh"
#include "reduce.cuh"

namespace flashcore::common {

/// Many rows of a few whole vectors, on one axis. A group takes kAtOnce neighbouring rows and reads a vector of each
/// before it waits for the first; its lanes store the results side by side. The order within a row is that of
/// reduce_rows_kernel, which takes rows that do not lie on 16 bytes.
template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce_short_rows_kernel(const __grid_constant__ ReduceParams p, const Cut cut) {
  constexpr int kSize = Vector<T>::kSize;
  cuda::wait_for_previous_kernel();
  cuda::let_next_kernel_start();
  const int group = cut.group();
  const int lane = static_cast<int>(threadIdx.x) & (group - 1);
  const std::int64_t first =
      (std::int64_t{blockIdx.x} * cut.groups() + static_cast<int>(threadIdx.x >> cut.group_log2)) * kAtOnce;
  const std::int64_t left = cut.results - first;
  const int rows = static_cast<int>(left < kAtOnce ? left : kAtOnce);  // below 1: none
  const int vectors = static_cast<int>(cut.length);
  const std::int64_t row_stride = p.outer.rank > 0 ? p.outer.stride[0] : 0;
  const T* x = static_cast<const T*>(p.outer.data) + first * row_stride;
  const std::uint32_t flip = flip_of<T, Op>(p);

  Whole<T, Op> row[kAtOnce];
  for (int i = lane; i < vectors; i += group) {
    Words given[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (n < rows) given[n] = *reinterpret_cast<const Words*>(x + n * row_stride + i * kSize);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (n < rows) row[n].add(Places<T, Op>::of(given[n], flip));
  }
  for (int lanes = group / 2; lanes > 0; lanes /= 2)
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      row[n].value = Op::template combine<Acc>(row[n].value, __shfl_xor_sync(0xffffffffu, row[n].value, lanes));
  for (int own = lane; own < rows; own += group) {
    Acc mine = row[0].value;
#pragma unroll
    for (int n = 1; n < kAtOnce; ++n) mine = n == own ? row[n].value : mine;
    store_result<T, Op>(p, first + own, mine);
  }
}

/// This thread's part of a chunk. `lane` counts through the group.
template <bool kAligned, class T, class Op>
__device__ __forceinline__ typename Places<T, Op>::Acc reduce_chunk(const ReduceParams& p, const Cut& cut, const T* x,
                                                                    std::int64_t begin, int lane) {
  constexpr int kSize = Vector<T>::kSize;
  const std::uint32_t flip = flip_of<T, Op>(p);
  const T fill = fill_of<T, Op>(flip);
  const std::int64_t whole = kAligned ? p.inner / kSize : (p.inner + kSize - 1) / kSize;  // vectors of the row
  const std::int64_t end = begin + cut.length < whole ? begin + cut.length : whole;
  Whole<T, Op> row;
  if constexpr (kAligned) {
    accumulate(row, Aligned<T>{x, kSize}, begin + lane, end, cut.group_log2, flip);
    const int rest = static_cast<int>(p.inner % kSize);
    const bool has_rest = rest != 0 && whole >= begin && whole < begin + cut.length;
    if (has_rest && (static_cast<int>(whole - begin) & (cut.group() - 1)) == lane)
      row.add(Places<T, Op>::of(Ragged<T>{x, kSize, rest, fill}.vector(whole), flip));
  } else {
    accumulate(row, Scattered<T>{x, p.reduced, p.inner, fill}, begin + lane, end, cut.group_log2, flip);
  }
  return row.value;
}

/// Groups take a row each, or, where rows are cut into chunks, blocks a chunk.
template <bool kAligned, class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce_rows_kernel(const __grid_constant__ ReduceParams p, const Cut cut, const Meeting<Acc> meeting) {
  __shared__ Acc s_partial[kThreads / tile::kWarpSize];
  const int group = cut.group();
  const int lane = static_cast<int>(threadIdx.x) & (group - 1);
  const int chunk = cut.chunks > 1 ? static_cast<int>(blockIdx.x / static_cast<unsigned>(cut.results)) : 0;
  const std::int64_t row =
      (blockIdx.x - chunk * cut.results) * cut.groups() + static_cast<int>(threadIdx.x >> cut.group_log2);
  const T* x = static_cast<const T*>(p.outer.data) + offset_of(p.outer, row < cut.results ? row : 0);
  ptx::keep(x);  // worked out while the kernel before this one ends
  cuda::wait_for_previous_kernel();
  cuda::let_next_kernel_start();
  Acc value = Op::template identity<Acc>();
  if (row < cut.results) value = reduce_chunk<kAligned, T, Op>(p, cut, x, chunk * cut.length, lane);
  value = reduce_group<Op>(value, group, s_partial);
  if (cut.chunks > 1) {
    if (threadIdx.x == 0) meeting.leave(blockIdx.x, value);
    const std::int64_t last = (cut.chunks - 1) * cut.results;  // chunk's first block
    if (blockIdx.x < last) return;
    const int thread = static_cast<int>(threadIdx.x);
    value = meeting.template combine<Op>(blockIdx.x - last + thread * cut.results, kThreads * cut.results,
                                         (cut.chunks - thread + kThreads - 1) / kThreads);
    value = reduce_group<Op>(value, kThreads, s_partial);
  }
  if (lane == 0 && row < cut.results) store_result<T, Op>(p, row, value);
}

}  // namespace flashcore::common
