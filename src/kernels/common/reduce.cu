// Reductions: sum, max, min or mean of a whole array or along axes, in float (double for float64), in a fixed order.
//
// One block sums one chunk of one result's elements: threads first add strided elements of their own, then the block
// adds the threads by warp shuffles and shared memory. Few results with many elements are cut into chunks, so that a
// whole array keeps the device busy; a second pass reduces the chunks. The cut depends on the sizes alone, not on the
// device, and so does the result.
#include "../../cuda/launch.cuh"
#include "../tile/reduce.cuh"
#include "arrays.h"
#include "common.h"
#include "flashcore/memory.h"
#include "flashcore/primitives.h"

namespace flashcore::common {
namespace {

using detail::ArrayParams;
using detail::ReduceParams;

constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 8192;       // elements that are worth a block of their own
constexpr std::int64_t kMostChunks = 4096;  // of all results together

struct Cut {
  std::int64_t results;
  std::int64_t chunks;  // per result
  std::int64_t length;  // elements per chunk
};

Cut cut_of(const ReduceParams& p) {
  Cut cut{element_count(p.outer), 1, p.inner};
  if (cut.results == 0) return cut;
  const std::int64_t allowed = kMostChunks / cut.results;
  const std::int64_t wanted = cuda::blocks_for(p.inner, kChunk);
  cut.chunks = wanted < allowed ? wanted : allowed;
  if (cut.chunks < 1) cut.chunks = 1;
  cut.length = cuda::blocks_for(p.inner, cut.chunks);
  return cut;
}

template <class T, class Acc>
__device__ void store_result(const ReduceParams& p, std::int64_t result, Acc value) {
  if (p.op == static_cast<int>(ReduceOp::mean)) value /= static_cast<Acc>(p.inner);
  detail::store(static_cast<T*>(p.out.data)[offset_of(p.out, result)], value);
}

/// Chunk c of result r, by block r · chunks + c. The last pass where there is one chunk; else the partial results go to
/// `partial`, in that order.
template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ ReduceParams p, const Cut cut, Acc* partial) {
  __shared__ Acc s_partial[kThreads / tile::kWarpSize];
  for (std::int64_t block = blockIdx.x; block < cut.results * cut.chunks; block += gridDim.x) {
    const std::int64_t result = block / cut.chunks;
    const std::int64_t begin = (block - result * cut.chunks) * cut.length;
    const std::int64_t end = begin + cut.length < p.inner ? begin + cut.length : p.inner;
    const T* x = static_cast<const T*>(p.outer.data) + offset_of(p.outer, result);
    Acc value = Op::template identity<Acc>();
    for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads)
      value = Op::template combine<Acc>(value, detail::load(x[offset_of(p.reduced, i)]));
    value = tile::block_reduce<Op, kThreads>(value, s_partial);
    if (threadIdx.x != 0) continue;
    if (cut.chunks > 1) {
      partial[block] = value;
    } else {
      store_result<T>(p, result, value);
    }
  }
}

template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads)
    combine_chunks_kernel(const __grid_constant__ ReduceParams p, const Cut cut, const Acc* partial) {
  __shared__ Acc s_partial[kThreads / tile::kWarpSize];
  for (std::int64_t result = blockIdx.x; result < cut.results; result += gridDim.x) {
    Acc value = Op::template identity<Acc>();
    for (std::int64_t chunk = threadIdx.x; chunk < cut.chunks; chunk += kThreads)
      value = Op::template combine<Acc>(value, partial[result * cut.chunks + chunk]);
    value = tile::block_reduce<Op, kThreads>(value, s_partial);
    if (threadIdx.x == 0) store_result<T>(p, result, value);
  }
}

template <class T, class Op>
void launch_op(const ReduceParams& p, int index, Stream stream) {
  using Acc = typename detail::Accumulator<T>::type;
  const Cut cut = cut_of(p);
  const std::size_t partials = cut.chunks > 1 ? static_cast<std::size_t>(cut.results * cut.chunks) : 0;
  const Buffer buffer(partials * sizeof(Acc), {DeviceType::cuda, index}, stream);
  Acc* partial = static_cast<Acc*>(buffer.data());
  cuda::launch("starting the reduction kernel", reduce_kernel<T, Op, Acc>, cut.results * cut.chunks, kThreads, stream,
               p, cut, partial);
  if (cut.chunks > 1)
    cuda::launch("starting the second reduction kernel", combine_chunks_kernel<T, Op, Acc>, cut.results, kThreads,
                 stream, p, cut, partial);
}

template <class T>
void launch_as(const ReduceParams& p, int index, Stream stream) {
  switch (static_cast<ReduceOp>(p.op)) {
    case ReduceOp::max:
      return launch_op<T, tile::Max>(p, index, stream);
    case ReduceOp::min:
      return launch_op<T, tile::Min>(p, index, stream);
    default:
      return launch_op<T, tile::Sum>(p, index, stream);
  }
}

}  // namespace

void reduce(const ReduceParams& given, int index, Stream stream) {
  const cuda::DeviceGuard guard(index);
  ReduceParams p = given;
  collapse<2>({&p.outer, &p.out});
  collapse<1>({&p.reduced});
  switch (p.out.dtype) {
    case DType::float16:
      return launch_as<detail::Float16>(p, index, stream);
    case DType::bfloat16:
      return launch_as<detail::BFloat16>(p, index, stream);
    case DType::float64:
      return launch_as<double>(p, index, stream);
    default:
      return launch_as<float>(p, index, stream);
  }
}

}  // namespace flashcore::common
