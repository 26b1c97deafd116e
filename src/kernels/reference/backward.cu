// The scalar backward kernels. No atomics: every gradient element has one owner, so the result is bitwise the same from
// run to run. The weights are computed again from lse instead of being stored.
//
//   delta_i   = Σ_d dout_id · out_id − dlse_i                 one warp per query row, kept in the workspace
//   p_ij      = exp(s_ij − lse_i)                             the softmax weight
//   ds_ij     = p_ij · (dropout_ij · (dout_i · v_j) − delta_i)
//   dproduct  = ds_ij · slope of the softcap · scale          d/d(q_i · k_j)
//
//   dq_i      = Σ_j dproduct_ij · k_j                         one block per query row
//   dk_j      = Σ_i dproduct_ij · q_i                         one block per key row and key head: the queries of all
//   dv_j      = Σ_i p_ij · dropout_ij · dout_i                heads of the group, head by head
//   dbias     = Σ ds_ij over what bias was broadcast over     one warp per element of bias
//   dsink_h   = −Σ_i exp(sink_h − lse_i) · delta_i            one block per head
//
// An empty row has lse = -inf: it takes part in nothing, and nothing of an excluded key is read.
#include "../../cuda/launch.cuh"
#include "../tile/reduce.cuh"
#include "reference.h"
#include "rows.cuh"

namespace flashcore::reference {
namespace {

constexpr int kWarps = kThreads / tile::kWarpSize;

template <class T>
__device__ const T* query_side(const TensorParams& t, const Row& row) {
  return static_cast<const T*>(t.data) + detail::q_offset(t, row.sequence, row.head, row.i);
}

template <class Acc>
__device__ Acc row_value(const RowParams& t, const Sequence& s, std::int64_t head, std::int64_t i) {
  return static_cast<const Acc*>(t.data)[detail::row_offset(t, s, head, i)];
}

/// What one pair (query, key) adds to the gradients.
template <class Acc>
struct PairGradient {
  bool seen = false;
  Acc score = 0;    // ds
  Acc product = 0;  // dproduct
  Acc value = 0;    // p · dropout, the factor of dout in dv
};

/// `product` is q_i·k_j and `dweight` is dout_i·v_j.
template <class Acc>
__device__ PairGradient<Acc> pair_gradient(const Params& p, const Row& query, std::int64_t j, Acc product, Acc dweight,
                                           Acc lse, Acc delta) {
  const Factors<Acc> factors = factors_of<Acc>(p, query.sequence.batch, query.head);
  const detail::Score<Acc> score =
      detail::score_of<Acc>(p, query.sequence, query.head, query.i, j, product, factors.scale, factors.alibi_slope);
  if (score.value == -Acc(INFINITY)) return {};
  const Acc weight = exp(score.value - lse);
  const Acc kept = detail::dropout_factor<Acc>(p.dropout, query.sequence, query.head, query.i, j);
  PairGradient<Acc> r;
  r.seen = true;
  r.score = weight * ((kept == Acc(0) ? Acc(0) : kept * dweight) - delta);
  r.product = r.score * score.slope * factors.scale;
  r.value = weight * kept;
  return r;
}

// ---- delta ----------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ Params p, RowParams delta) {
  using Acc = AccOf<T>;
  const int lane = static_cast<int>(threadIdx.x) % tile::kWarpSize;
  const std::int64_t rows = p.size.total_q * p.size.heads_q;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * kWarps;
  for (std::int64_t index = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / tile::kWarpSize; index < rows;
       index += warps) {
    const Row row = query_row(p, index);
    const T* dout = query_side<T>(p.grad.dout, row);
    const T* out = query_side<T>(p.out, row);
    Acc sum = 0;
    for (int d = lane; d < p.size.head_dim_v; d += tile::kWarpSize) sum += detail::load(dout[d]) * detail::load(out[d]);
    sum = tile::warp_reduce<tile::Sum>(sum);
    if (p.grad.dlse.data) sum -= row_value<Acc>(p.grad.dlse, row.sequence, row.head, row.i);
    if (lane == 0) static_cast<Acc*>(delta.data)[detail::row_offset(delta, row.sequence, row.head, row.i)] = sum;
  }
}

// ---- dq -------------------------------------------------------------------------------------------------------------

template <class Acc>
struct QueryStorage {
  Acc q[kMaxHeadDim];
  Acc dout[kMaxHeadDim];
  Acc dq[kMaxHeadDim];
  Acc dproduct[kThreads];
  std::int64_t k_offset[kThreads];  // of the tile's rows of k; kExcluded
};

/// Thread t takes key first + t, then each thread adds the tile to its columns of dq.
template <class T>
__device__ void add_keys(const Params& p, const Row& query, std::int64_t first, std::int64_t end, AccOf<T> lse,
                         AccOf<T> delta, QueryStorage<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  const T* const k = static_cast<const T*>(p.k.data);
  const T* const v = static_cast<const T*>(p.v.data);
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t j = first + t;
  s.k_offset[t] = kExcluded;
  if (j < end && detail::kept_by_mask(p.mask, query.sequence, query.head, query.i, j)) {
    const std::int64_t head_k = head_of_keys(p, query.head);
    const std::int64_t k_at = detail::k_offset(p, p.k, query.sequence, head_k, j);
    const std::int64_t v_at = detail::k_offset(p, p.v, query.sequence, head_k, j);
    const Acc product = dot(s.q, k + k_at, p.size.head_dim);
    const Acc dweight = dot(s.dout, v + v_at, p.size.head_dim_v);
    const PairGradient<Acc> g = pair_gradient(p, query, j, product, dweight, lse, delta);
    s.dproduct[t] = g.product;
    if (g.seen) s.k_offset[t] = k_at;
  }
  __syncthreads();
  for (int d = t; d < p.size.head_dim; d += kThreads) {
    Acc sum = s.dq[d];
    for (int n = 0; n < kThreads; ++n)
      if (s.k_offset[n] != kExcluded) sum += s.dproduct[n] * detail::load(k[s.k_offset[n] + d]);
    s.dq[d] = sum;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) dq_kernel(const __grid_constant__ Params p, RowParams delta) {
  using Acc = AccOf<T>;
  __shared__ QueryStorage<Acc> s;
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t rows = p.size.total_q * p.size.heads_q;
  for (std::int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const Row row = query_row(p, index);
    const T* q = query_side<T>(p.q, row);
    const T* dout = query_side<T>(p.grad.dout, row);
    for (int d = t; d < p.size.head_dim; d += kThreads) {
      s.q[d] = detail::load(q[d]);
      s.dq[d] = 0;
    }
    for (int d = t; d < p.size.head_dim_v; d += kThreads) s.dout[d] = detail::load(dout[d]);
    __syncthreads();

    const KeyRange keys = detail::visible_keys(p.position, row.sequence, row.i);
    const Acc lse = row_value<Acc>(p.lse, row.sequence, row.head, row.i);
    const Acc delta_i = row_value<Acc>(delta, row.sequence, row.head, row.i);
    if (lse != -Acc(INFINITY)) {
      for (std::int64_t first = keys.begin; first < keys.end; first += kThreads)
        add_keys<T>(p, row, first, keys.end, lse, delta_i, s);
    }
    T* dq = static_cast<T*>(p.grad.dq.data) + detail::q_offset(p.grad.dq, row.sequence, row.head, row.i);
    for (int d = t; d < p.size.head_dim; d += kThreads) detail::store(dq[d], s.dq[d]);
    __syncthreads();  // the next row overwrites q
  }
}

// ---- dk, dv ---------------------------------------------------------------------------------------------------------

template <class Acc>
struct KeyStorage {
  Acc k[kMaxHeadDim];
  Acc v[kMaxHeadDim];
  Acc dk[kMaxHeadDim];
  Acc dv[kMaxHeadDim];
  Acc dproduct[kThreads];
  Acc dvalue[kThreads];
  std::int64_t q_offset[kThreads];  // of the tile's rows of q; kExcluded
  std::int64_t dout_offset[kThreads];
};

/// Thread t takes query first + t of one head, then each thread adds the tile to its columns of dk and dv.
template <class T>
__device__ void add_queries(const Params& p, const Row& key, std::int64_t head, std::int64_t first, std::int64_t end,
                            const RowParams& delta, KeyStorage<AccOf<T>>& s) {
  using Acc = AccOf<T>;
  const T* const q = static_cast<const T*>(p.q.data);
  const T* const dout = static_cast<const T*>(p.grad.dout.data);
  const int t = static_cast<int>(threadIdx.x);
  const Row query{key.sequence, head, first + t};
  s.q_offset[t] = kExcluded;
  if (query.i < end && detail::kept_by_mask(p.mask, query.sequence, head, query.i, key.i)) {
    const Acc lse = row_value<Acc>(p.lse, query.sequence, head, query.i);
    if (lse != -Acc(INFINITY)) {
      const std::int64_t q_at = detail::q_offset(p.q, query.sequence, head, query.i);
      s.dout_offset[t] = detail::q_offset(p.grad.dout, query.sequence, head, query.i);
      const Acc product = dot(q + q_at, s.k, p.size.head_dim);
      const Acc dweight = dot(dout + s.dout_offset[t], s.v, p.size.head_dim_v);
      const Acc delta_i = row_value<Acc>(delta, query.sequence, head, query.i);
      const PairGradient<Acc> g = pair_gradient(p, query, key.i, product, dweight, lse, delta_i);
      s.dproduct[t] = g.product;
      s.dvalue[t] = g.value;
      if (g.seen) s.q_offset[t] = q_at;
    }
  }
  __syncthreads();
  for (int d = t; d < p.size.head_dim; d += kThreads) {
    Acc sum = s.dk[d];
    for (int n = 0; n < kThreads; ++n)
      if (s.q_offset[n] != kExcluded) sum += s.dproduct[n] * detail::load(q[s.q_offset[n] + d]);
    s.dk[d] = sum;
  }
  for (int d = t; d < p.size.head_dim_v; d += kThreads) {
    Acc sum = s.dv[d];
    for (int n = 0; n < kThreads; ++n)
      if (s.q_offset[n] != kExcluded) sum += s.dvalue[n] * detail::load(dout[s.dout_offset[n] + d]);
    s.dv[d] = sum;
  }
  __syncthreads();
}

/// The key's own rows into shared memory, and its sums to 0.
template <class T>
__device__ void load_key(const Params& p, const Row& row, KeyStorage<AccOf<T>>& s) {
  const T* k = static_cast<const T*>(p.k.data) + detail::k_offset(p, p.k, row.sequence, row.head, row.i);
  const T* v = static_cast<const T*>(p.v.data) + detail::k_offset(p, p.v, row.sequence, row.head, row.i);
  for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim; d += kThreads) {
    s.k[d] = detail::load(k[d]);
    s.dk[d] = 0;
  }
  for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim_v; d += kThreads) {
    s.v[d] = detail::load(v[d]);
    s.dv[d] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dkdv_kernel(const __grid_constant__ Params p, RowParams delta) {
  using Acc = AccOf<T>;
  __shared__ KeyStorage<Acc> s;
  const int group = p.size.heads_q / p.size.heads_k;
  const std::int64_t rows = p.size.total_k * p.size.heads_k;
  for (std::int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const Row row = key_row(p, index);
    load_key<T>(p, row, s);
    __syncthreads();
    const KeyRange queries = visible_queries(p.position, row.sequence, row.i);
    for (std::int64_t head = row.head * group; head < (row.head + 1) * group; ++head)
      for (std::int64_t first = queries.begin; first < queries.end; first += kThreads)
        add_queries<T>(p, row, head, first, queries.end, delta, s);

    const std::int64_t dk_at = detail::k_offset(p, p.grad.dk, row.sequence, row.head, row.i);
    const std::int64_t dv_at = detail::k_offset(p, p.grad.dv, row.sequence, row.head, row.i);
    if (p.grad.dk.data)
      for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim; d += kThreads)
        detail::store(static_cast<T*>(p.grad.dk.data)[dk_at + d], s.dk[d]);
    if (p.grad.dv.data)
      for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim_v; d += kThreads)
        detail::store(static_cast<T*>(p.grad.dv.data)[dv_at + d], s.dv[d]);
    __syncthreads();  // the next row overwrites k and v
  }
}

// ---- dbias ----------------------------------------------------------------------------------------------------------

/// A pair of the score matrix: (batch, head, query, key).
struct Coordinates {
  std::int64_t at[4];
};

inline __device__ Coordinates unravel(std::int64_t index, const std::int64_t (&shape)[4]) {
  Coordinates c;
  for (int axis = 3; axis >= 0; --axis) {
    c.at[axis] = index % shape[axis];
    index /= shape[axis];
  }
  return c;
}

/// ds of one pair, computed by a whole warp; 0 where the pair does not exist or is not seen.
template <class T>
__device__ AccOf<T> score_gradient(const Params& p, const Coordinates& c, const RowParams& delta) {
  using Acc = AccOf<T>;
  const Row query{detail::sequence_of(p, c.at[0]), c.at[1], c.at[2]};
  const std::int64_t j = c.at[3];
  if (query.i >= query.sequence.seqlen_q) return Acc(0);
  const KeyRange keys = detail::visible_keys(p.position, query.sequence, query.i);
  if (j < keys.begin || j >= keys.end) return Acc(0);
  if (!detail::kept_by_mask(p.mask, query.sequence, query.head, query.i, j)) return Acc(0);
  const Acc lse = row_value<Acc>(p.lse, query.sequence, query.head, query.i);
  if (lse == -Acc(INFINITY)) return Acc(0);

  const std::int64_t head_k = head_of_keys(p, query.head);
  const T* q = query_side<T>(p.q, query);
  const T* dout = query_side<T>(p.grad.dout, query);
  const T* k = static_cast<const T*>(p.k.data) + detail::k_offset(p, p.k, query.sequence, head_k, j);
  const T* v = static_cast<const T*>(p.v.data) + detail::k_offset(p, p.v, query.sequence, head_k, j);
  const int lane = static_cast<int>(threadIdx.x) % tile::kWarpSize;
  Acc product = 0;
  for (int d = lane; d < p.size.head_dim; d += tile::kWarpSize) product += detail::load(q[d]) * detail::load(k[d]);
  Acc dweight = 0;
  for (int d = lane; d < p.size.head_dim_v; d += tile::kWarpSize) dweight += detail::load(dout[d]) * detail::load(v[d]);
  product = tile::warp_reduce<tile::Sum>(product);
  dweight = tile::warp_reduce<tile::Sum>(dweight);
  const Acc delta_i = row_value<Acc>(delta, query.sequence, query.head, query.i);
  return pair_gradient(p, query, j, product, dweight, lse, delta_i).score;
}

/// `elements` is bias's own shape; `summed` is the shape of what each element was broadcast over, 1 elsewhere.
struct BroadcastShape {
  std::int64_t elements[4];
  std::int64_t summed[4];

  __host__ __device__ static std::int64_t count(const std::int64_t (&shape)[4]) {
    return shape[0] * shape[1] * shape[2] * shape[3];
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    dbias_kernel(const __grid_constant__ Params p, RowParams delta, BroadcastShape shape) {
  const std::int64_t elements = BroadcastShape::count(shape.elements);
  const std::int64_t terms = BroadcastShape::count(shape.summed);
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * kWarps;
  for (std::int64_t index = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / tile::kWarpSize; index < elements;
       index += warps) {
    const Coordinates element = unravel(index, shape.elements);
    double sum = 0;  // in double: a broadcast bias sums millions of terms one after the other
    for (std::int64_t term = 0; term < terms; ++term) {
      Coordinates pair = unravel(term, shape.summed);
      for (int axis = 0; axis < 4; ++axis) pair.at[axis] += element.at[axis];  // one of the two is 0
      sum += static_cast<double>(score_gradient<T>(p, pair, delta));
    }
    if (threadIdx.x % tile::kWarpSize == 0)
      detail::store_as<double>(
          p.grad.dbias.data, p.grad.dbias.dtype,
          detail::plane_offset(p.grad.dbias, element.at[0], element.at[1], element.at[2], element.at[3]), sum);
  }
}

// ---- dsinks ---------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) dsinks_kernel(const __grid_constant__ Params p, RowParams delta) {
  using Acc = AccOf<T>;
  __shared__ Acc s_partial[kWarps];
  for (std::int64_t head = blockIdx.x; head < p.size.heads_q; head += gridDim.x) {
    const Acc sink = detail::head_value<Acc>(p.sinks, 0, head, Acc(0));
    Acc sum = 0;
    for (std::int64_t packed = threadIdx.x; packed < p.size.total_q; packed += kThreads) {
      const Row row = query_row(p, head * p.size.total_q + packed);
      if (row.i >= row.sequence.seqlen_q) continue;  // no sequence owns it
      const Acc lse = row_value<Acc>(p.lse, row.sequence, head, row.i);
      if (lse == -Acc(INFINITY)) continue;
      sum -= exp(sink - lse) * row_value<Acc>(delta, row.sequence, head, row.i);
    }
    sum = tile::block_reduce<tile::Sum, kThreads>(sum, s_partial);
    if (threadIdx.x == 0)
      detail::store_as<Acc>(p.grad.dsinks.data, p.grad.dsinks.dtype, head * p.grad.dsinks.head, sum);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

BroadcastShape broadcast_shape(const Params& p) {
  const std::int64_t full[4] = {p.size.batch, p.size.heads_q, p.size.seqlen_q, p.size.seqlen_k};
  BroadcastShape shape{};
  for (int axis = 0; axis < 4; ++axis) {
    shape.elements[axis] = p.grad.dbias_shape[axis];
    shape.summed[axis] = shape.elements[axis] == 1 ? full[axis] : 1;
  }
  return shape;
}

template <class T>
void launch_as(const Params& p, void* workspace, Stream stream) {
  const std::int64_t query_rows = p.size.total_q * p.size.heads_q;
  const std::int64_t key_rows = p.size.total_k * p.size.heads_k;
  const bool varlen = p.sequence.cu_seqlens_q != nullptr;
  const RowParams delta{workspace, varlen ? 0 : p.size.seqlen_q, p.size.total_q, 1};
  cuda::launch("starting the reference delta kernel", delta_kernel<T>, cuda::blocks_for(query_rows, kWarps), kThreads,
               stream, p, delta);
  if (p.grad.dq.data)
    cuda::launch("starting the reference dq kernel", dq_kernel<T>, query_rows, kThreads, stream, p, delta);
  if (p.grad.dk.data || p.grad.dv.data)
    cuda::launch("starting the reference dk, dv kernel", dkdv_kernel<T>, key_rows, kThreads, stream, p, delta);
  if (p.grad.dbias.data) {
    const BroadcastShape shape = broadcast_shape(p);
    cuda::launch("starting the reference dbias kernel", dbias_kernel<T>,
                 cuda::blocks_for(BroadcastShape::count(shape.elements), kWarps), kThreads, stream, p, delta, shape);
  }
  if (p.grad.dsinks.data)
    cuda::launch("starting the reference dsinks kernel", dsinks_kernel<T>, p.size.heads_q, kThreads, stream, p, delta);
}

}  // namespace

void plan_backward(const detail::Problem& problem, const DeviceInfo&, detail::Plan& plan) {
  const std::size_t size = problem.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  plan.slices[0] = plan.workspace.add(static_cast<std::size_t>(problem.size.total_q * problem.size.heads_q) * size);
}

void launch_backward(const detail::Plan& plan, const Params& params, void* workspace, Stream stream) {
  const cuda::DeviceGuard guard(plan.device.index);
  void* delta = detail::slice<void>(workspace, plan.slices[0]);
  switch (params.dtype) {
    case DType::float16:
      return launch_as<detail::Float16>(params, delta, stream);
    case DType::bfloat16:
      return launch_as<detail::BFloat16>(params, delta, stream);
    case DType::float64:
      return launch_as<double>(params, delta, stream);
    default:
      return launch_as<float>(params, delta, stream);
  }
}

}  // namespace flashcore::reference
