// Reductions: sum, max, min or mean of a whole array or along axes, in float (double for float64), in a fixed order.
//
// Two ways to walk, by where the neighbours of an element lie:
//
//   rows      neighbours belong to the same result. Some lanes of a warp take it, a warp, or a block, as its length
//             asks for.
//   columns   neighbours belong to different results. A thread takes a few neighbouring results; the threads of a block
//             start at different elements of them and meet in shared memory.
//
// Both read 16 bytes at once where the array allows it, and ask for several before they wait for the first. Few results
// with many elements are cut into chunks, so that a whole array keeps the device busy; a second pass reduces these.
// Cut and order depend on sizes and strides alone, not on the device or the address, and so does the result.
#include <algorithm>
#include <type_traits>

#include "../../cuda/launch.cuh"
#include "../tile/reduce.cuh"
#include "../tile/vector.cuh"
#include "arrays.h"
#include "common.h"
#include "flashcore/memory.h"
#include "flashcore/primitives.h"

namespace flashcore::common {
namespace {

using detail::ArrayParams;
using detail::ReduceParams;
using tile::Vector;

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;                  // vectors that a thread asks for before it waits for the first
constexpr std::int64_t kChunk = 8192;       // rows: elements that are worth a block of their own
constexpr std::int64_t kMostChunks = 4096;  // rows: of all results together
constexpr std::int64_t kManyBlocks = 1024;  // columns: enough to keep a device busy
constexpr int kShortChain = 32;             // chunks that one thread may reduce alone

/// How the work is cut, and how a thread finds its part.
struct Cut {
  std::int64_t results;
  std::int64_t chunks = 1;  // per result
  std::int64_t length;      // elements per chunk
  bool vectors;             // 16 bytes can be read at once
  int group = kThreads;  // rows: threads per result, a power of 2 up to a warp, or the block. Columns: across a block
  std::int64_t columns = 0;  // neighbouring results; 0: walk by rows
  std::int64_t blocks = 0;
};

int power_of_two_at_least(std::int64_t x, int most) {
  int power = 1;
  while (power < x && power < most) power *= 2;
  return power;
}

bool divides_strides(const ArrayParams& a, int axes, std::int64_t size) {
  for (int axis = 0; axis < axes; ++axis)
    if (a.stride[axis] % size != 0) return false;
  return true;
}

Cut cut_rows(const ReduceParams& p, Cut cut, int vector_size) {
  const bool dense = p.reduced.rank == 1 && p.reduced.stride[0] == 1;
  cut.vectors = cut.vectors && dense && divides_strides(p.outer, p.outer.rank, vector_size);
  const std::int64_t allowed = kMostChunks / cut.results;
  cut.chunks = std::max<std::int64_t>(std::min(cuda::blocks_for(p.inner, kChunk), allowed), 1);
  cut.length = cuda::blocks_for(p.inner, cut.chunks * vector_size) * vector_size;
  constexpr std::int64_t kLongRow = 16 * tile::kWarpSize;  // in vectors
  const std::int64_t length = cuda::blocks_for(p.inner, vector_size);
  if (length <= kLongRow) cut.group = power_of_two_at_least(length, tile::kWarpSize);
  cut.blocks = cuda::blocks_for(cut.results * cut.chunks * cut.group, kThreads);
  return cut;
}

Cut cut_columns(const ReduceParams& p, Cut cut, int vector_size) {
  const int last = p.outer.rank - 1;
  cut.columns = p.outer.shape[last];
  cut.vectors = cut.vectors && divides_strides(p.outer, last, vector_size) &&
                divides_strides(p.reduced, p.reduced.rank, vector_size);
  cut.group = power_of_two_at_least(cuda::blocks_for(cut.columns, vector_size), tile::kWarpSize);
  const std::int64_t blocks = cut.results / cut.columns * cuda::blocks_for(cut.columns, cut.group * vector_size);
  const std::int64_t worth = p.inner / (kThreads / cut.group * 2 * kAtOnce);
  cut.chunks = std::max<std::int64_t>(std::min(cuda::blocks_for(kManyBlocks, blocks), worth), 1);
  cut.length = cuda::blocks_for(p.inner, cut.chunks);
  cut.blocks = blocks * cut.chunks;
  return cut;
}

Cut cut_of(const ReduceParams& p, int vector_size) {
  Cut cut{};
  cut.results = element_count(p.outer);
  if (cut.results == 0) return cut;
  cut.vectors = reinterpret_cast<std::uintptr_t>(p.outer.data) % tile::kVectorBytes == 0;
  const bool neighbours_are_results = p.outer.rank > 0 && p.outer.stride[p.outer.rank - 1] == 1 && p.reduced.rank > 0 &&
                                      p.reduced.stride[p.reduced.rank - 1] != 1;
  return neighbours_are_results ? cut_columns(p, cut, vector_size) : cut_rows(p, cut, vector_size);
}

// ---- on the device --------------------------------------------------------------------------------------------------

/// The minimum is minus the maximum of the negatives: one kernel less to build.
template <class Acc, class Op>
__device__ Acc sign_of(const ReduceParams& p) {
  return std::is_same_v<Op, tile::Max> && p.op == static_cast<int>(ReduceOp::min) ? Acc(-1) : Acc(1);
}

template <class Op, class T, class Acc>
__device__ Acc combine_all(Acc value, const Vector<T>& given, Acc sign) {
#pragma unroll
  for (int n = 0; n < Vector<T>::kSize; ++n) {
    const Acc x = detail::load(given.x[n]);
    value = Op::template combine<Acc>(value, std::is_same_v<Op, tile::Max> ? x * sign : x);
  }
  return value;
}

template <class T, class Op, class Acc>
__device__ void store_result(const ReduceParams& p, std::int64_t result, Acc value) {
  if (p.op == static_cast<int>(ReduceOp::mean)) value /= static_cast<Acc>(p.inner);
  detail::store(static_cast<T*>(p.out.data)[offset_of(p.out, result)], value * sign_of<Acc, Op>(p));
}

/// Neighbouring elements of one result, read at once.
template <class T>
struct Dense {
  const T* x;
  __device__ T element(std::int64_t i) const { return x[i]; }
  __device__ Vector<T> vector(std::int64_t first) const { return *reinterpret_cast<const Vector<T>*>(x + first); }
};

/// The same one by one: they lie apart, or not on 16 bytes.
template <class T>
struct Strided {
  const T* x;
  std::int64_t stride;
  __device__ T element(std::int64_t i) const { return x[i * stride]; }
  __device__ Vector<T> vector(std::int64_t first) const {
    Vector<T> given;
    for (int n = 0; n < Vector<T>::kSize; ++n) given.x[n] = element(first + n);
    return given;
  }
};

/// `count` elements, of which this thread takes vector `lane` and every `group`-th behind it: in the same order whether
/// vectors are read at once or not.
template <class Op, class T, template <class> class Elements, class Acc>
__device__ Acc reduce_row(const Elements<T>& x, std::int64_t count, int group, int lane, Acc sign) {
  constexpr int kSize = Vector<T>::kSize;
  Acc value[kAtOnce];
  for (Acc& part : value) part = Op::template identity<Acc>();
  const int step = group * kSize;
  std::int64_t first = lane * kSize;
  for (; first + (kAtOnce - 1) * step + kSize <= count; first += kAtOnce * step) {
    Vector<T> given[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) given[n] = x.vector(first + n * step);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) value[n] = combine_all<Op>(value[n], given[n], sign);
  }
  for (; first + kSize <= count; first += step) value[0] = combine_all<Op>(value[0], x.vector(first), sign);
  for (std::int64_t i = first; i < count; ++i)
    value[0] = Op::template combine<Acc>(value[0], detail::load(x.element(i)) * sign);
  for (int n = 1; n < kAtOnce; ++n) value[0] = Op::template combine<Acc>(value[0], value[n]);
  return value[0];
}

/// The same for elements on several axes that cannot be walked as one. This thread takes element `lane` and every
/// `group`-th behind it.
template <class Op, class T, class Acc>
__device__ Acc reduce_scattered(const T* x, const ArrayParams& reduced, std::int64_t begin, std::int64_t end, int group,
                                int lane, Acc sign) {
  Acc value = Op::template identity<Acc>();
  for (std::int64_t i = begin + lane; i < end; i += group)
    value = Op::template combine<Acc>(value, detail::load(x[offset_of(reduced, i)]) * sign);
  return value;
}

/// Every thread of a group gets the group's value. All threads of the block must call.
template <class Op, class Acc>
__device__ Acc reduce_group(Acc value, int group, Acc* s_partial) {
  if (group == kThreads) return tile::block_reduce<Op, kThreads>(value, s_partial);
  for (int lanes = group / 2; lanes > 0; lanes /= 2)
    value = Op::template combine<Acc>(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

/// Group g takes chunk g % chunks of result g / chunks.
template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads)
    reduce_rows_kernel(const __grid_constant__ ReduceParams p, const Cut cut, Acc* partial) {
  __shared__ Acc s_partial[kThreads / tile::kWarpSize];
  const int groups = kThreads / cut.group;  // of a block
  const int lane = static_cast<int>(threadIdx.x) % cut.group;
  const std::int64_t count = cut.results * cut.chunks;
  for (std::int64_t first = std::int64_t{blockIdx.x} * groups; first < count;
       first += std::int64_t{gridDim.x} * groups) {
    const std::int64_t index = first + threadIdx.x / cut.group;
    const std::int64_t result = index / cut.chunks;
    Acc value = Op::template identity<Acc>();
    if (index < count) {
      const T* x = static_cast<const T*>(p.outer.data) + offset_of(p.outer, result);
      const std::int64_t begin = (index - result * cut.chunks) * cut.length;
      const std::int64_t end = begin + cut.length < p.inner ? begin + cut.length : p.inner;
      const Acc sign = sign_of<Acc, Op>(p);
      const std::int64_t stride = p.reduced.stride[0];
      if (cut.vectors)
        value = reduce_row<Op>(Dense<T>{x + begin}, end - begin, cut.group, lane, sign);
      else if (p.reduced.rank <= 1)
        value = reduce_row<Op>(Strided<T>{x + begin * stride, stride}, end - begin, cut.group, lane, sign);
      else
        value = reduce_scattered<Op>(x, p.reduced, begin, end, cut.group, lane, sign);
    }
    value = reduce_group<Op>(value, cut.group, s_partial);
    if (lane != 0 || index >= count) continue;
    if (cut.chunks > 1) {
      partial[index] = value;
    } else {
      store_result<T, Op>(p, result, value);
    }
  }
}

/// Elements begin, begin + step, … of kSize neighbouring results, of which `count` exist.
template <class Op, class T, class Acc>
__device__ void reduce_columns(const ReduceParams& p, bool vectors, const T* x, int count, std::int64_t begin,
                               std::int64_t end, int step, Acc (&value)[Vector<T>::kSize]) {
  constexpr int kSize = Vector<T>::kSize;
  const Acc sign = sign_of<Acc, Op>(p);
  for (Acc& part : value) part = Op::template identity<Acc>();
  const auto read = [&](std::int64_t i) {
    const T* row = x + offset_of(p.reduced, i);
    if (vectors && count >= kSize) return *reinterpret_cast<const Vector<T>*>(row);
    Vector<T> given = {};
    for (int n = 0; n < kSize && n < count; ++n) given.x[n] = row[n];
    return given;
  };
  const auto add = [&](const Vector<T>& given) {
#pragma unroll
    for (int n = 0; n < kSize; ++n) value[n] = Op::template combine<Acc>(value[n], detail::load(given.x[n]) * sign);
  };
  std::int64_t i = begin;
  for (; i + (kAtOnce - 1) * step < end; i += kAtOnce * step) {
    Vector<T> given[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) given[n] = read(i + n * step);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) add(given[n]);
  }
  for (; i < end; i += step) add(read(i));
}

/// Threads 0 … group − 1 stand side by side over group · kSize results, the others behind them, further down.
template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads)
    reduce_columns_kernel(const __grid_constant__ ReduceParams p, const Cut cut, Acc* partial) {
  constexpr int kSize = Vector<T>::kSize;
  __shared__ Acc s_value[kThreads * kSize];
  const int across = cut.group * kSize;  // results of a block
  const int down = kThreads / cut.group;
  const std::int64_t sections = (cut.columns + across - 1) / across;
  const int lane = static_cast<int>(threadIdx.x) % cut.group;
  const int depth = static_cast<int>(threadIdx.x) / cut.group;
  for (std::int64_t block = blockIdx.x; block < cut.blocks; block += gridDim.x) {
    const std::int64_t section = block % sections;
    const std::int64_t chunk = block / sections % cut.chunks;
    const std::int64_t first = block / sections / cut.chunks * cut.columns + section * across;  // result
    const std::int64_t left = cut.columns - section * across - lane * kSize;
    const std::int64_t begin = chunk * cut.length;
    const std::int64_t end = begin + cut.length < p.inner ? begin + cut.length : p.inner;
    Acc value[kSize];
    const T* x = static_cast<const T*>(p.outer.data) + offset_of(p.outer, first) + lane * kSize;
    reduce_columns<Op>(p, cut.vectors, x, static_cast<int>(left < kSize ? left : kSize), begin + depth, end, down,
                       value);
    __syncthreads();  // the block before may still be read
    for (int n = 0; n < kSize; ++n) s_value[depth * across + lane * kSize + n] = value[n];
    __syncthreads();
    const int own = static_cast<int>(threadIdx.x);
    if (own >= across || section * across + own >= cut.columns) continue;
    Acc sum = s_value[own];
    for (int d = 1; d < down; ++d) sum = Op::template combine<Acc>(sum, s_value[d * across + own]);
    if (cut.chunks > 1) {
      partial[chunk * cut.results + first + own] = sum;
    } else {
      store_result<T, Op>(p, first + own, sum);
    }
  }
}

/// The second pass. Chunks of a result lie side by side (rows) or `results` apart (columns).
template <class T, class Op, class Acc>
__global__ void __launch_bounds__(kThreads)
    combine_chunks_kernel(const __grid_constant__ ReduceParams p, const Cut cut, const Acc* partial, int group) {
  __shared__ Acc s_partial[kThreads / tile::kWarpSize];
  cuda::wait_for_previous_kernel();  // it writes the chunks
  const std::int64_t chunk_step = cut.columns > 0 ? cut.results : 1;
  const std::int64_t result_step = cut.columns > 0 ? 1 : cut.chunks;
  const int groups = kThreads / group;
  for (std::int64_t first = std::int64_t{blockIdx.x} * groups; first < cut.results;
       first += std::int64_t{gridDim.x} * groups) {
    const std::int64_t result = first + threadIdx.x / group;
    Acc value = Op::template identity<Acc>();
    if (result < cut.results)
      for (std::int64_t chunk = threadIdx.x % group; chunk < cut.chunks; chunk += group)
        value = Op::template combine<Acc>(value, partial[result * result_step + chunk * chunk_step]);
    value = reduce_group<Op>(value, group, s_partial);
    if (threadIdx.x % group == 0 && result < cut.results) store_result<T, Op>(p, result, value);
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------

template <class T, class Op>
void launch_op(const ReduceParams& p, int index, Stream stream) {
  using Acc = typename detail::Accumulator<T>::type;
  const Cut cut = cut_of(p, Vector<T>::kSize);
  const std::size_t partials = cut.chunks > 1 ? static_cast<std::size_t>(cut.results * cut.chunks) : 0;
  const Buffer buffer(partials * sizeof(Acc), {DeviceType::cuda, index}, stream);
  Acc* partial = static_cast<Acc*>(buffer.data());
  const auto kernel = cut.columns > 0 ? reduce_columns_kernel<T, Op, Acc> : reduce_rows_kernel<T, Op, Acc>;
  cuda::launch("starting the reduction kernel", kernel, cut.blocks, kThreads, stream, p, cut, partial);
  if (cut.chunks == 1) return;
  const int group = cut.chunks <= kShortChain ? 1 : kThreads;
  cuda::launch_early("starting the second reduction kernel", combine_chunks_kernel<T, Op, Acc>,
                     cuda::blocks_for(cut.results * group, kThreads), kThreads, stream, p, cut, partial, group);
}

template <class T>
void launch_as(const ReduceParams& p, int index, Stream stream) {
  const auto op = static_cast<ReduceOp>(p.op);
  if (op == ReduceOp::max || op == ReduceOp::min) return launch_op<T, tile::Max>(p, index, stream);
  launch_op<T, tile::Sum>(p, index, stream);
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
