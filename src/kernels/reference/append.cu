// Appends new keys and values to the cache, contiguous or paged: one block per new row. Rotary embedding turns new keys
// to their position on the way; values are copied as they are.
#include "../../cuda/launch.cuh"
#include "reference.h"
#include "rows.cuh"

namespace flashcore::reference {
namespace {

/// Writes new key i to place j of the cache, rotated to position j.
template <class T>
__device__ void append_key(const Params& p, const Sequence& s, std::int64_t head, std::int64_t i, std::int64_t j) {
  const std::int64_t offset = detail::k_offset(p, p.k, s, head, j);
  if (p.page.block_table && offset == -1) return;  // no such page
  const T* source = static_cast<const T*>(p.append.k_new.data) + detail::q_offset(p.append.k_new, s, head, i);
  T* target = static_cast<T*>(p.k.data) + offset;
  for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim; d += kThreads) {
    if (d < p.rotary.dim) {
      detail::store(target[d], detail::rotated(source, d, j, p.rotary));
    } else {
      target[d] = source[d];
    }
  }
}

template <class T>
__device__ void append_value(const Params& p, const Sequence& s, std::int64_t head, std::int64_t i, std::int64_t j) {
  const std::int64_t offset = detail::k_offset(p, p.v, s, head, j);
  if (p.page.block_table && offset == -1) return;
  const T* source = static_cast<const T*>(p.append.v_new.data) + detail::q_offset(p.append.v_new, s, head, i);
  T* target = static_cast<T*>(p.v.data) + offset;
  for (int d = static_cast<int>(threadIdx.x); d < p.size.head_dim_v; d += kThreads) target[d] = source[d];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 8) append_kernel(const __grid_constant__ Params p) {
  const std::int64_t seqlen_new = p.sequence.seqlen_new;
  const std::int64_t rows = p.size.batch * p.size.heads_k * seqlen_new;
  for (std::int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const std::int64_t i = index % seqlen_new;
    const std::int64_t head = index / seqlen_new % p.size.heads_k;
    const Sequence s{index / seqlen_new / p.size.heads_k, 0, 0, 0, 0};
    const std::int64_t j = p.sequence.seqused_k[s.batch] + i;
    if (j < 0 || j >= p.size.seqlen_k) continue;  // beyond the cache
    append_key<T>(p, s, head, i, j);
    append_value<T>(p, s, head, i, j);
  }
}

template <class T>
void launch_as(const Params& p, Stream stream) {
  cuda::launch("starting the cache append kernel", append_kernel<T>,
               p.size.batch * p.size.heads_k * p.sequence.seqlen_new, kThreads, stream, p);
}

}  // namespace

void launch_append(const Params& params, Stream stream) {
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
