// What reductions are made of: how a thread reads and what it keeps of it, how the threads of a group and the blocks of
// a result meet, and how a result is written.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../numbers.h"
#include "../params.h"
#include "../ptx/global.cuh"
#include "../ptx/warp.cuh"
#include "../tile/reduce.cuh"
#include "../tile/vector.cuh"
#include "arrays.h"
#include "flashcore/primitives.h"

namespace flashcore::common {

using detail::ArrayParams;
using detail::ReduceParams;
using tile::Vector;
using Words = Vector<std::uint32_t>;  // 16 bytes of any dtype, as they are read

constexpr int kThreadsLog2 = 8;
constexpr int kThreads = 1 << kThreadsLog2;
constexpr int kAtOnce = 8;  // vectors that a thread asks for before it waits for the first
// Blocks that an SM must have room for, which bounds the registers of a thread: 128 KiB asked for at once on Hopper.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksPerSm = 3;  // with 4, some kernels would spill a register
#else
constexpr int kBlocksPerSm = 4;
#endif

/// How the work is cut. A result may be cut into chunks, one a block.
struct Cut {
  std::int64_t results = 0;
  std::int64_t blocks = 0;
  std::int64_t length = 0;    // of a chunk. Rows: vectors. Columns: elements
  std::int64_t columns = 0;   // that lie side by side
  std::int64_t sections = 0;  // strips that these are cut into
  std::int64_t strips = 0;    // of all columns
  int chunks = 1;             // more than 1: a block takes a chunk of one row or strip
  int group_log2 = 0;         // of a group of threads. Rows: for one result. Columns: side by side
  bool vectors = false;       // 16 bytes can be read at once

  FLASHCORE_HD int group() const { return 1 << group_log2; }
  FLASHCORE_HD int groups() const { return kThreads >> group_log2; }  // of a block
};

/// The minimum is minus the maximum of the negatives: one kernel less to build. These sign bits are flipped.
template <class T, class Op>
__device__ std::uint32_t flip_of(const ReduceParams& p) {
  if (std::is_same_v<Op, tile::Sum> || p.op != static_cast<int>(ReduceOp::min)) return 0;
  return sizeof(T) == 2 ? 0x80008000u : 0x80000000u;
}

/// tile::Max by the one instruction that newer chips have for it.
struct Max : tile::Max {
  template <class T>
  static __device__ T combine(T a, T b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, float>) return ptx::max_nan(a, b);
#endif
    return tile::Max::combine(a, b);
  }
};

// ---- what a thread keeps --------------------------------------------------------------------------------------------

/// The larger of each half of two words; NaN where either is NaN.
template <class T>
__device__ __forceinline__ std::uint32_t larger_pair(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return ptx::max_pair<T>(a, b);
#else
  std::uint32_t pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    T larger;
    detail::store(larger, tile::Max::combine(detail::load(T{static_cast<std::uint16_t>(a >> shift)}),
                                             detail::load(T{static_cast<std::uint16_t>(b >> shift)})));
    pair |= static_cast<std::uint32_t>(larger.bits) << shift;
  }
  return pair;
#endif
}

/// A number for each place of a vector: what was read, or the results so far. The largest of 16-bit numbers is one of
/// them, hence exact in their own format: those stay in pairs.
template <class T, class Op>
struct Places {
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr bool kPairs = sizeof(T) == 2 && std::is_same_v<Op, Max>;
  static constexpr int kPieces = kPairs ? kSize / 2 : kSize;
  using Acc = typename detail::Accumulator<T>::type;
  using Piece = std::conditional_t<kPairs, std::uint32_t, Acc>;

  Piece x[kPieces];

  static __device__ __forceinline__ Piece combine(Piece a, Piece b) {
    if constexpr (kPairs)
      return larger_pair<T>(a, b);
    else
      return Op::template combine<Acc>(a, b);
  }

  static __device__ __forceinline__ Places of(Words given, std::uint32_t flip) {
    if constexpr (std::is_same_v<Op, Max>)
      for (int n = 0; n < Words::kSize; ++n)
        if (sizeof(T) < 8 || n % 2 == 1) given.x[n] ^= flip;  // the sign of a double is in its upper word
    Places places;
    if constexpr (kPairs) {
      for (int n = 0; n < kPieces; ++n) places.x[n] = given.x[n];
    } else if constexpr (std::is_same_v<T, detail::BFloat16>) {
      // The upper half where it is: taken out and put back it costs two instructions.
      for (int n = 0; n < kPieces; ++n)
        places.x[n] = detail::float_of(n % 2 == 0 ? given.x[n / 2] << 16 : given.x[n / 2] & 0xffff0000u);
    } else {
      Vector<T> numbers;
      std::memcpy(&numbers, &given, sizeof numbers);
      for (int n = 0; n < kPieces; ++n) places.x[n] = detail::load(numbers.x[n]);
    }
    return places;
  }

  static __device__ __forceinline__ Places identity() {
    Vector<T> numbers;
    for (T& x : numbers.x) detail::store(x, Op::template identity<Acc>());
    Words words;
    std::memcpy(&words, &numbers, sizeof words);
    return of(words, 0);
  }

  __device__ __forceinline__ void add(const Places& other) {
    for (int n = 0; n < kPieces; ++n) x[n] = combine(x[n], other.x[n]);
  }

  __device__ __forceinline__ Acc at(int place) const {
    if constexpr (kPairs)
      return detail::load(T{static_cast<std::uint16_t>(x[place / 2] >> (place % 2 * 16))});
    else
      return x[place];
  }

  /// All places together.
  __device__ __forceinline__ Acc all() const {
    Places left = *this;
#pragma unroll
    for (int n = kPieces / 2; n > 0; n /= 2)
#pragma unroll
      for (int m = 0; m < n; ++m) left.x[m] = combine(left.x[m], left.x[m + n]);
    return kPairs ? Op::template combine<Acc>(left.at(0), left.at(1)) : left.at(0);
  }
};

/// The result so far of whole vectors.
template <class T, class Op>
struct Whole {
  using Acc = typename Places<T, Op>::Acc;
  Acc value = Op::template identity<Acc>();
  __device__ __forceinline__ void add(const Places<T, Op>& given) {
    value = Op::template combine<Acc>(value, given.all());
  }
};

// ---- how a thread reads ---------------------------------------------------------------------------------------------

/// Vectors that lie on 16 bytes, `stride` elements apart.
template <class T>
struct Aligned {
  const T* x;
  std::int64_t stride;
};

/// Vectors of which only the first `count` elements are of this array, or which do not lie on 16 bytes.
template <class T>
struct Ragged {
  const T* x;
  std::int64_t stride;
  int count;
  T fill;
  __device__ Words vector(std::int64_t i) const {
    Vector<T> given;
    for (int n = 0; n < Vector<T>::kSize; ++n) given.x[n] = n < count ? x[i * stride + n] : fill;
    Words words;
    std::memcpy(&words, &given, sizeof words);
    return words;
  }
};

/// `count` elements that lie anywhere, read as vectors all the same, so that their order is. What the last vector lacks
/// is `fill`.
template <class T>
struct Scattered {
  const T* x;
  const ArrayParams& where;
  std::int64_t count;
  T fill;
  __device__ Words vector(std::int64_t i) const {
    Vector<T> given;
    for (int n = 0; n < Vector<T>::kSize; ++n) {
      const std::int64_t element = i * Vector<T>::kSize + n;
      given.x[n] = element < count ? x[offset_of(where, element)] : fill;
    }
    Words words;
    std::memcpy(&words, &given, sizeof words);
    return words;
  }
};

/// What a place that holds no element counts as.
template <class T, class Op>
__device__ T fill_of(std::uint32_t flip) {
  const auto identity = Op::template identity<typename detail::Accumulator<T>::type>();
  T fill;
  detail::store(fill, flip ? -identity : identity);
  return fill;
}

/// Adds to what is kept the vectors begin, begin + step, … before `end`, in this order; a step is a power of 2.
template <class T, class Op, template <class, class> class Kept, class Reader>
__device__ __forceinline__ void accumulate(Kept<T, Op>& kept, const Reader& reader, std::int64_t begin,
                                           std::int64_t end, int step_log2, std::uint32_t flip) {
  for (std::int64_t i = begin; i < end; i += 1 << step_log2) kept.add(Places<T, Op>::of(reader.vector(i), flip));
}

/// The same in the same order, with many reads at once. The condition around each keeps ptxas from moving it behind the
/// additions before it.
template <class T, class Op, template <class, class> class Kept>
__device__ __forceinline__ void accumulate(Kept<T, Op>& kept, const Aligned<T>& reader, std::int64_t begin,
                                           std::int64_t end, int step_log2, std::uint32_t flip) {
  const std::int64_t pace = reader.stride << step_log2;
  const T* x = reader.x + begin * reader.stride;
  for (std::int64_t left = (end - begin + (1 << step_log2) - 1) >> step_log2; left > 0; left -= kAtOnce) {
    Words given[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n, x += pace)
      if (n == 0 || n < left) given[n] = *reinterpret_cast<const Words*>(x);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (n == 0 || n < left) kept.add(Places<T, Op>::of(given[n], flip));
  }
}

// ---- how threads and blocks meet ------------------------------------------------------------------------------------

/// Every thread of a group gets the group's value. By all threads of the block; `s_partial` holds one Acc a warp.
template <class Op, class Acc>
__device__ Acc reduce_group(Acc value, int group, Acc* s_partial) {
  constexpr int kWarp = tile::kWarpSize;
  for (int lanes = (group < kWarp ? group : kWarp) / 2; lanes > 0; lanes /= 2)
    value = Op::template combine<Acc>(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  if (group <= kWarp) return value;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = group / kWarp;
  __syncthreads();  // s_partial may still be read from the last call
  if (threadIdx.x % kWarp == 0) s_partial[warp] = value;
  __syncthreads();
  const int first = warp & ~(warps - 1);
  value = s_partial[first];
  for (int n = 1; n < warps; ++n) value = Op::template combine<Acc>(value, s_partial[first + n]);
  return value;
}

/// Where the blocks of a result leave what they found: numbers beside the launch's tag, in memory that nobody has
/// zeroed. A number and its tag are written at once, so who sees the tag has the number: no block waits for its own
/// writes, and none but the one that combines them for those of others. That is the block of the last chunk. Blocks
/// start in the order of their index, so all it waits for has started.
template <class Acc>
struct Meeting {
  ptx::Whole16* words;
  std::uint64_t tag;  // of the launch

  /// Asks the block's `width` places into the L2 cache, so that those who look do not wait for memory.
  __device__ __forceinline__ void expect(int width) const {
    int thread = static_cast<int>(threadIdx.x);
    ptx::keep(thread);  // an address for here alone: kept until the number is left, it would cost a spill
    if (tag != 0 && thread < width) ptx::prefetch_to_stay(words + std::int64_t{blockIdx.x} * width + thread);
  }

  __device__ void leave(std::int64_t place, Acc value) const {
    ptx::Whole16 word{{0, tag}};
    std::memcpy(word.x, &value, sizeof value);
    ptx::store_whole(words + place, word);
  }

  /// What was or will be left at `count` places from `place` on, `stride` apart, in this order. Clears the tags, since
  /// a captured launch is replayed with the same.
  template <class Op>
  __device__ Acc combine(std::int64_t place, std::int64_t stride, int count) const {
    constexpr int kLooks = 4;  // at once
    Acc value = Op::template identity<Acc>();
    ptx::Whole16* at = words + place;
    for (; count > 0; count -= kLooks, at += kLooks * stride) {
      ptx::Whole16 given[kLooks];
#pragma unroll
      for (int n = 0; n < kLooks; ++n)
        if (n < count) given[n] = ptx::load_whole(at + n * stride);
#pragma unroll
      for (int n = 0; n < kLooks; ++n) {
        if (n >= count) break;
        while (given[n].x[1] != tag) given[n] = ptx::load_whole(at + n * stride);
        ptx::store_whole(at + n * stride, {{0, 0}});
        Acc other;
        std::memcpy(&other, given[n].x, sizeof other);
        value = Op::template combine<Acc>(value, other);
      }
    }
    return value;
  }
};

template <class T, class Op, class Acc>
__device__ void store_result(const ReduceParams& p, std::int64_t result, Acc value) {
  if (p.op == static_cast<int>(ReduceOp::mean)) value /= static_cast<Acc>(p.inner);
  if (flip_of<T, Op>(p) != 0) value = -value;
  detail::store(static_cast<T*>(p.out.data)[offset_of(p.out, result)], value);
}

}  // namespace flashcore::common
