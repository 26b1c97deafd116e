// Reductions whose neighbouring elements belong to neighbouring results, which are called columns.
#pragma once

#include "../../cuda/launch.cuh"
#include "reduce.cuh"

namespace flashcore::common {

constexpr int kMostAcross = 8;  // threads side by side: 128 bytes of a row, a line of the cache

/// What threads hold of their columns becomes one value a column: thread c < `across` gets that of column c. By all
/// threads of a block; `s_value` holds `across` numbers a warp.
template <class T, class Op, class Acc>
__device__ Acc meet_in_columns(const Places<T, Op>& places, int group, Acc* s_value) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kWarp = tile::kWarpSize;
  const int across = group * kSize;
  const int thread = static_cast<int>(threadIdx.x);
  Acc value[kSize];
#pragma unroll
  for (int n = 0; n < kSize; ++n) value[n] = places.at(n);
  for (int lanes = group; lanes < kWarp; lanes *= 2)
#pragma unroll
    for (int n = 0; n < kSize; ++n)
      value[n] = Op::template combine<Acc>(value[n], __shfl_xor_sync(0xffffffffu, value[n], lanes));
  __syncthreads();  // s_value may still be read from the last call
  if (thread % kWarp < group)
#pragma unroll
    for (int n = 0; n < kSize; ++n) s_value[thread / kWarp * across + thread % kWarp * kSize + n] = value[n];
  __syncthreads();
  Acc column = Op::template identity<Acc>();
  if (thread < across)
    for (int warp = 0; warp < kThreads / kWarp; ++warp)
      column = Op::template combine<Acc>(column, s_value[warp * across + thread]);
  return column;
}

/// The chunks of a strip, `across` numbers each. Thread c < `across` gets the value of column c.
template <class Op, class Acc>
__device__ Acc combine_chunks(const Meeting<Acc>& meeting, const Cut& cut, std::int64_t strip, int across,
                              Acc* s_value) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % across;
  const int chunk = thread / across;     // the thread's first
  const int chunks = kThreads / across;  // at once
  Acc value = meeting.template combine<Op>((chunk * cut.strips + strip) * across + column, kThreads * cut.strips,
                                           (cut.chunks - chunk + chunks - 1) / chunks);
  __syncthreads();  // s_value may still be read
  s_value[thread] = value;
  __syncthreads();
  if (thread < across)
    for (int other = thread + across; other < kThreads; other += across)
      value = Op::template combine<Acc>(value, s_value[other]);
  return value;
}

/// Blocks take strips of neighbouring columns, or chunks of them: threads 0 … group − 1 stand side by side, a vector
/// each, the others behind them, further down.
template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce_columns_kernel(const __grid_constant__ ReduceParams p, const Cut cut, const Meeting<Acc> meeting) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kNumbers = kThreads / tile::kWarpSize * kMostAcross * kSize;
  __shared__ Acc s_value[kNumbers > kThreads ? kNumbers : kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & (cut.group() - 1);
  const int depth = thread >> cut.group_log2;
  const int down_log2 = kThreadsLog2 - cut.group_log2;
  const int across = kSize << cut.group_log2;
  const std::int64_t stride = p.reduced.stride[0];
  const std::uint32_t flip = flip_of<T, Op>(p);
  const int chunk = cut.chunks > 1 ? static_cast<int>(blockIdx.x / static_cast<unsigned>(cut.strips)) : 0;
  const std::int64_t strip = blockIdx.x - chunk * cut.strips;
  const std::int64_t row = p.outer.rank > 1 ? strip / cut.sections : 0;
  const std::int64_t column = (strip - row * cut.sections) * across;
  const std::int64_t first = row * cut.columns + column;  // result

  const T* x = static_cast<const T*>(p.outer.data) + offset_of(p.outer, first) + lane * kSize;
  const std::int64_t left = cut.columns - column - lane * kSize;
  const std::int64_t begin = chunk * cut.length;
  const std::int64_t end = begin + cut.length < p.inner ? begin + cut.length : p.inner;
  ptx::keep(x);  // worked out while the kernel before this one ends
  meeting.expect(across);
  cuda::wait_for_previous_kernel();
  cuda::let_next_kernel_start();
  Places<T, Op> places = Places<T, Op>::identity();
  if (cut.vectors && left >= kSize)
    accumulate(places, Aligned<T>{x, stride}, begin + depth, end, down_log2, flip);
  else if (left > 0)
    accumulate(places, Ragged<T>{x, stride, static_cast<int>(left < kSize ? left : kSize), fill_of<T, Op>(flip)},
               begin + depth, end, down_log2, flip);
  Acc value = meet_in_columns<T, Op>(places, cut.group(), s_value);
  if (cut.chunks > 1) {
    if (thread < across) meeting.leave(std::int64_t{blockIdx.x} * across + thread, value);
    if (chunk < cut.chunks - 1) return;
    value = combine_chunks<Op>(meeting, cut, strip, across, s_value);
  }
  if (thread < across && column + thread < cut.columns) store_result<T, Op>(p, first + thread, value);
}

}  // namespace flashcore::common
