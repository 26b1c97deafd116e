// Merges two attention states over disjoint keys: one warp per row.
//
//   lse = log(exp lse_a + exp lse_b),   out = exp(lse_a − lse) · out_a + exp(lse_b − lse) · out_b
//
// A state that saw nothing (lse = -inf) is not read; where neither saw anything, out = 0 and lse = -inf.
#include "../../cuda/launch.cuh"
#include "../numbers.h"
#include "../tile/reduce.cuh"
#include "common.h"

namespace flashcore::common {
namespace {

using detail::MergeParams;
using detail::RowParams;
using detail::TensorParams;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / tile::kWarpSize;

struct Row {
  std::int64_t batch;
  std::int64_t head;
  std::int64_t i;
};

template <class P>
__device__ std::int64_t offset_of(const P& t, const Row& row) {
  return row.batch * t.batch + row.head * t.head + row.i * t.seq;
}

template <class T>
__device__ void merge_row(const MergeParams& p, const Row& row) {
  using Acc = typename detail::Accumulator<T>::type;
  const int lane = static_cast<int>(threadIdx.x) % tile::kWarpSize;
  const Acc none = -Acc(INFINITY);
  const Acc lse_a = static_cast<const Acc*>(p.lse_a.data)[offset_of(p.lse_a, row)];
  const Acc lse_b = static_cast<const Acc*>(p.lse_b.data)[offset_of(p.lse_b, row)];
  const Acc top = tile::Max::combine(lse_a, lse_b);
  const Acc lse = top == none ? none : top + log(exp(lse_a - top) + exp(lse_b - top));
  const Acc weight_a = lse_a == none ? Acc(0) : exp(lse_a - lse);
  const Acc weight_b = lse_b == none ? Acc(0) : exp(lse_b - lse);

  const T* a = static_cast<const T*>(p.out_a.data) + offset_of(p.out_a, row);
  const T* b = static_cast<const T*>(p.out_b.data) + offset_of(p.out_b, row);
  T* out = static_cast<T*>(p.out.data) + offset_of(p.out, row);
  for (int d = lane; d < p.size.head_dim_v; d += tile::kWarpSize) {
    Acc sum = 0;
    if (lse_a != none) sum += weight_a * detail::load(a[d]);
    if (lse_b != none) sum += weight_b * detail::load(b[d]);
    detail::store(out[d], sum);
  }
  __syncwarp();  // lse may be lse_a or lse_b itself: every lane has read it by now
  if (lane == 0) static_cast<Acc*>(p.lse.data)[offset_of(p.lse, row)] = lse;
}

template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeParams p) {
  const std::int64_t rows = p.size.batch * p.size.heads_q * p.size.seqlen_q;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * kWarps;
  for (std::int64_t index = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / tile::kWarpSize; index < rows;
       index += warps) {
    const std::int64_t i = index % p.size.seqlen_q;
    const std::int64_t head = index / p.size.seqlen_q % p.size.heads_q;
    merge_row<T>(p, {index / p.size.seqlen_q / p.size.heads_q, head, i});
  }
}

template <class T>
void launch_as(const MergeParams& p, Stream stream) {
  const std::int64_t rows = p.size.batch * p.size.heads_q * p.size.seqlen_q;
  cuda::launch("starting the merge kernel", merge_kernel<T>, cuda::blocks_for(rows, kWarps), kThreads, stream, p);
}

}  // namespace

void merge_states(const MergeParams& params, int index, Stream stream) {
  const cuda::DeviceGuard guard(index);
  switch (params.dtype) {
    case DType::float16:
      return launch_as<detail::Float16>(params, stream);
    case DType::bfloat16:
      return launch_as<detail::BFloat16>(params, stream);
    case DType::float64:
      return launch_as<double>(params, stream);
    default:
      return launch_as<float>(params, stream);
  }
}

}  // namespace flashcore::common
