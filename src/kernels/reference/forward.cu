// The scalar forward kernel: online softmax, one block per query row.
//
//   q_i -> shared memory, in float
//   max = -inf, sum = 0, out = 0
//   for each tile of 128 visible keys:
//     thread t:  score_t  = s(i, t)                    one dot product a thread; -inf where excluded
//     block:     new_max  = max(max, score_0 … score_127)
//                rescale  = exp(max - new_max)         what was summed so far was relative to the old max
//     thread t:  weight_t = exp(score_t - new_max)
//     block:     sum      = sum · rescale + Σ weight_t
//     thread d:  out_d    = out_d · rescale + Σ_t weight_t · v[t][d]
//   the sink joins the sum as one more logit, without a value
//   out / sum -> memory, rounded once;  lse = max + log(sum)
//
// The scores are never stored: the row's memory is that of one tile, whatever the number of keys.
#include "../../cuda/launch.cuh"
#include "../tile/reduce.cuh"
#include "reference.h"
#include "rows.cuh"

namespace flashcore::reference {
namespace {

template <class Acc>
struct ForwardStorage {
  Acc q[kMaxHeadDim];
  Acc out[kMaxHeadDim];
  Acc weight[kThreads];
  std::int64_t v_offset[kThreads];  // of the tile's rows of v; kExcluded
  Acc partial[kThreads / tile::kWarpSize];
};

/// The running state of online softmax.
template <class Acc>
struct Softmax {
  Acc max = -Acc(INFINITY);
  Acc sum = 0;
};

/// q_i, rotated to its position where rotary embedding is on.
template <class T>
__device__ void load_query(const Params& p, const Row& row, AccOf<T>* s_q) {
  const T* q = static_cast<const T*>(p.q.data) + detail::q_offset(p.q, row.sequence, row.head, row.i);
  const std::int64_t position = detail::query_position(row.sequence, row.i);
  for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim; d += kThreads)
    s_q[d] = detail::rotated(q, d, position, p.rotary);
}

/// The score of key j, or -inf where it is excluded: then nothing of k or v was read.
template <class T>
__device__ AccOf<T> score_key(const Params& p, const Row& row, std::int64_t j, const Factors<AccOf<T>>& factors,
                              const AccOf<T>* s_q) {
  using Acc = AccOf<T>;
  if (!detail::kept_by_mask(p.mask, row.sequence, row.head, row.i, j)) return -Acc(INFINITY);
  const std::int64_t offset = detail::k_offset(p, p.k, row.sequence, head_of_keys(p, row.head), j);
  if (p.page.block_table && offset == -1) return -Acc(INFINITY);
  const Acc product = dot(s_q, static_cast<const T*>(p.k.data) + offset, p.size.head_dim);
  return detail::score_of<Acc>(p, row.sequence, row.head, row.i, j, product, factors.scale, factors.alibi_slope).value;
}

/// One tile of at most kThreads keys, the first of them `first`. Every thread keeps the same `softmax`.
template <class T>
__device__ void attend_tile(const Params& p, const Row& row, std::int64_t first, std::int64_t end,
                            const Factors<AccOf<T>>& factors, Softmax<AccOf<T>>& softmax, ForwardStorage<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t j = first + t;
  const Acc score = j < end ? score_key<T>(p, row, j, factors, s.q) : -Acc(INFINITY);
  const Acc tile_max = tile::block_reduce<tile::Max, kThreads>(score, s.partial);
  const Acc new_max = tile::Max::combine(softmax.max, tile_max);
  if (new_max == -Acc(INFINITY)) return;  // nothing seen yet; the same for the whole block

  const Acc rescale = exp(softmax.max - new_max);
  const Acc weight = exp(score - new_max);
  s.weight[t] = weight;
  s.v_offset[t] = kExcluded;
  if (score != -Acc(INFINITY)) {
    // Dropout takes weights from the values only, never from the sum.
    const Acc kept = detail::dropout_factor<Acc>(p.dropout, row.sequence, row.head, row.i, j);
    s.weight[t] = weight * kept;
    if (kept != Acc(0)) s.v_offset[t] = detail::k_offset(p, p.v, row.sequence, head_of_keys(p, row.head), j);
  }
  softmax.sum = softmax.sum * rescale + tile::block_reduce<tile::Sum, kThreads>(weight, s.partial);
  softmax.max = new_max;
  __syncthreads();  // the weights are there

  for (int d = t; d < p.size.head_dim_v; d += kThreads) {
    Acc sum = s.out[d] * rescale;
    for (int n = 0; n < kThreads; ++n) {
      if (s.v_offset[n] != kExcluded)
        sum += s.weight[n] * detail::load(static_cast<const T*>(p.v.data)[s.v_offset[n] + d]);
    }
    s.out[d] = sum;
  }
}

/// Adds the sink and writes out and lse. A row that saw nothing gets 0 and -inf.
template <class T>
__device__ void finish_row(const Params& p, const Row& row, Softmax<AccOf<T>> softmax,
                           const ForwardStorage<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  const bool empty = softmax.max == -Acc(INFINITY);
  Acc rescale = 1;
  if (!empty && p.sinks.data) {
    const Acc sink = detail::head_value<Acc>(p.sinks, 0, row.head, Acc(0));
    const Acc new_max = tile::Max::combine(softmax.max, sink);
    rescale = exp(softmax.max - new_max);
    softmax.sum = softmax.sum * rescale + exp(sink - new_max);
    softmax.max = new_max;
  }
  const Acc descale = detail::head_value<Acc>(p.v_descale, row.sequence.batch, head_of_keys(p, row.head), Acc(1));
  const Acc factor = empty ? Acc(0) : rescale * descale / softmax.sum;
  const std::int64_t offset = detail::q_offset(p.out, row.sequence, row.head, row.i);
  for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim_v; d += kThreads)
    detail::store_as<Acc>(p.out.data, p.dtype_out, offset + d, s.out[d] * factor);
  if (p.lse.data && threadIdx.x == 0) {
    Acc* lse = static_cast<Acc*>(p.lse.data) + detail::row_offset(p.lse, row.sequence, row.head, row.i);
    *lse = empty ? -Acc(INFINITY) : softmax.max + log(softmax.sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Params p) {
  using Acc = AccOf<T>;
  __shared__ ForwardStorage<Acc> s;
  const std::int64_t rows = p.size.total_q * p.size.heads_q;
  for (std::int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const Row row = query_row(p, index);
    const Factors<Acc> factors = factors_of<Acc>(p, row.sequence.batch, row.head);
    load_query<T>(p, row, s.q);
    for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim_v; d += kThreads) s.out[d] = 0;
    __syncthreads();  // q is there

    Softmax<Acc> softmax;
    const KeyRange keys = detail::visible_keys(p.position, row.sequence, row.i);
    for (std::int64_t first = keys.begin; first < keys.end; first += kThreads)
      attend_tile<T>(p, row, first, keys.end, factors, softmax, s);
    finish_row<T>(p, row, softmax, s);
  }
}

template <class T>
void launch_as(const Params& p, Stream stream) {
  cuda::launch("starting the reference forward kernel", forward_kernel<T>, p.size.total_q * p.size.heads_q, kThreads,
               stream, p);
}

}  // namespace

void launch_forward(const detail::Plan& plan, const Params& params, void*, Stream stream) {
  const cuda::DeviceGuard guard(plan.device.index);
  if (params.append.k_new.data) launch_append(params, stream);
  switch (params.dtype) {
    case DType::float16:
      return launch_as<detail::Float16>(params, stream);
    case DType::bfloat16:
      return launch_as<detail::BFloat16>(params, stream);
    case DType::float64:
      return launch_as<double>(params, stream);
    case DType::float8_e4m3:
      return launch_as<detail::Float8E4M3>(params, stream);
    default:
      return launch_as<float>(params, stream);
  }
}

}  // namespace flashcore::reference
