// Reductions: sum, max, min or mean of a whole array or along axes, in float (double for float64), in a fixed order.
//
// Three ways to walk, by where the neighbours of an element lie:
//
//   rows        neighbours belong to the same result. Some lanes of a warp take it, some warps, or blocks, as its
//               length asks for.
//   short rows  the same, and a result is a few vectors long: some lanes take several results at once.
//   columns     neighbours belong to different results. A thread takes a vector of them; the threads of a block start
//               at different elements and meet in shared memory.
//
// All ask for 16 bytes at once where the array allows it, and for several before they wait for the first. Few results
// with many elements are cut into chunks, so that a whole array keeps the device busy; the last block of a result
// combines them. Cut and order depend on sizes and strides alone, not on the device or the address, and so does the
// result.
#include <algorithm>
#include <atomic>
#include <random>

#include "../../cuda/launch.cuh"
#include "arrays.h"
#include "common.h"
#include "flashcore/memory.h"
#include "reduce_columns.cuh"
#include "reduce_rows.cuh"

namespace flashcore::common {
namespace {

constexpr std::int64_t kRowBlocks = 1024;    // of chunks: twice what a large device holds at once, so that it evens out
constexpr std::int64_t kColumnBlocks = 512;  // once: a strip leaves a number for each of its columns
constexpr std::int64_t kEnoughBlocks = 1024;  // keep a device busy
constexpr std::int64_t kShortRow = 8;         // vectors a lane, where there are enough rows
constexpr int kMostChunkParts = 64;           // numbers that a thread of the last block of a strip combines

enum class Walk { rows, scattered_rows, short_rows, columns };

/// Of the smallest power of 2 that is x or more, but at most of `most`.
int log2_of(std::int64_t x, int most) {
  int log2 = 0;
  while (1 << log2 < x && 1 << log2 < most) ++log2;
  return log2;
}

bool divides_strides(const ArrayParams& a, int axes, std::int64_t size) {
  for (int axis = 0; axis < axes; ++axis)
    if (a.stride[axis] % size != 0) return false;
  return true;
}

bool is_aligned(const ArrayParams& a) { return reinterpret_cast<std::uintptr_t>(a.data) % tile::kVectorBytes == 0; }

Cut cut_short_rows(const ReduceParams& p, int vector_size) {
  Cut cut;
  cut.results = element_count(p.outer);
  cut.length = p.inner / vector_size;
  cut.group_log2 = log2_of(cut.length, tile::kWarpSize);
  cut.blocks = cuda::blocks_for(cut.results, cut.groups() * kAtOnce);
  return cut;
}

Cut cut_rows(const ReduceParams& p, int vector_size) {
  Cut cut;
  cut.results = element_count(p.outer);
  cut.length = cuda::blocks_for(p.inner, vector_size);
  cut.group_log2 =
      std::max(log2_of(cut.length, tile::kWarpSize), log2_of(cuda::blocks_for(cut.length, kAtOnce), kThreads));
  while (cuda::blocks_for(cut.results, cut.groups()) > cuda::kMaxBlocks) --cut.group_log2;
  cut.blocks = cuda::blocks_for(cut.results, cut.groups());
  constexpr std::int64_t kBatch = kThreads * kAtOnce;  // vectors that are worth a block of their own
  const std::int64_t chunks = std::min(cut.length / kBatch, kRowBlocks / cut.results);
  if (chunks < 2) return cut;
  cut.length = cuda::blocks_for(cut.length, chunks * kBatch) * kBatch;
  cut.chunks = static_cast<int>(cuda::blocks_for(cuda::blocks_for(p.inner, vector_size), cut.length));
  cut.blocks = cut.results * cut.chunks;
  return cut;
}

Cut cut_columns(const ReduceParams& p, int vector_size) {
  const int last = p.outer.rank - 1;
  Cut cut;
  cut.results = element_count(p.outer);
  cut.columns = p.outer.shape[last];
  cut.vectors = is_aligned(p.outer) && divides_strides(p.outer, last, vector_size) &&
                divides_strides(p.reduced, p.reduced.rank, vector_size);
  cut.group_log2 = log2_of(cuda::blocks_for(cut.columns, vector_size), kMostAcross);
  const int across = vector_size << cut.group_log2;
  cut.sections = cuda::blocks_for(cut.columns, across);
  cut.strips = cut.results / cut.columns * cut.sections;
  cut.length = p.inner;
  cut.blocks = cut.strips;
  const std::int64_t batch = cut.groups() * kAtOnce;  // rows that are worth a block of their own
  const std::int64_t chunks =
      std::min({p.inner / batch, kColumnBlocks / cut.strips, std::int64_t{kMostChunkParts} * kThreads / across});
  if (chunks < 2) return cut;
  cut.length = cuda::blocks_for(p.inner, chunks * batch) * batch;
  cut.chunks = static_cast<int>(cuda::blocks_for(p.inner, cut.length));
  cut.blocks = cut.strips * cut.chunks;
  return cut;
}

/// Whether short rows may be read as such: whole vectors, on one axis.
bool are_short_rows(const ReduceParams& p, int vector_size) {
  if (p.outer.rank > 1 || p.inner == 0 || p.inner % vector_size != 0) return false;
  const Cut cut = cut_short_rows(p, vector_size);
  return cut.length <= cut.group() || (cut.length <= cut.group() * kShortRow && cut.blocks >= kEnoughBlocks);
}

/// The one place that chooses.
Walk walk_of(const ReduceParams& p, int vector_size) {
  const bool dense = p.reduced.rank == 1 && p.reduced.stride[0] == 1;
  const bool neighbours_are_results = p.outer.rank > 0 && p.outer.stride[p.outer.rank - 1] == 1 && p.reduced.rank > 0;
  if (neighbours_are_results && !dense && cut_columns(p, vector_size).blocks <= cuda::kMaxBlocks) return Walk::columns;
  if (!dense || !is_aligned(p.outer) || !divides_strides(p.outer, p.outer.rank, vector_size))
    return Walk::scattered_rows;
  return are_short_rows(p, vector_size) ? Walk::short_rows : Walk::rows;
}

// ---- launching ------------------------------------------------------------------------------------------------------

/// For each launch another, and hardly what memory holds by chance.
std::uint64_t new_tag() {
  static std::atomic<std::uint64_t> next{std::random_device{}() * 0x9e3779b97f4a7c15u | 1};
  return next.fetch_add(0x9e3779b97f4a7c16u, std::memory_order_relaxed);  // odd for ever, hence never 0
}

/// `meetings`: rows or strips that are cut into chunks, `width` numbers wide.
template <class Acc, class Kernel>
void launch_cut(const char* name, Kernel kernel, const ReduceParams& p, const Cut& cut, std::int64_t meetings,
                int width, int index, Stream stream) {
  if (cut.chunks == 1) meetings = 0;
  const auto words = static_cast<std::size_t>(meetings * cut.chunks * width);
  const Buffer buffer(words * sizeof(ptx::Whole16), {DeviceType::cuda, index}, stream);
  const Meeting<Acc> meeting{static_cast<ptx::Whole16*>(buffer.data()), words > 0 ? new_tag() : 0};
  cuda::launch_early(name, kernel, cut.blocks, kThreads, stream, p, cut, meeting);
}

template <class T, class Op>
void launch_op(const ReduceParams& p, int index, Stream stream) {
  using Acc = typename detail::Accumulator<T>::type;
  constexpr int kSize = Vector<T>::kSize;
  const Walk walk = walk_of(p, kSize);
  if (walk == Walk::short_rows) {
    const Cut cut = cut_short_rows(p, kSize);
    cuda::launch_early("starting the reduction of short rows", reduce_short_rows_kernel<T, Op, Acc>, cut.blocks,
                       kThreads, stream, p, cut);
  } else if (walk == Walk::columns) {
    const Cut cut = cut_columns(p, kSize);
    launch_cut<Acc>("starting the reduction of columns", reduce_columns_kernel<T, Op, Acc>, p, cut, cut.strips,
                    kSize << cut.group_log2, index, stream);
  } else {
    const Cut cut = cut_rows(p, kSize);
    const auto kernel =
        walk == Walk::rows ? reduce_rows_kernel<true, T, Op, Acc> : reduce_rows_kernel<false, T, Op, Acc>;
    launch_cut<Acc>("starting the reduction of rows", kernel, p, cut, cut.results, 1, index, stream);
  }
}

template <class T>
void launch_as(const ReduceParams& p, int index, Stream stream) {
  const auto op = static_cast<ReduceOp>(p.op);
  if (op == ReduceOp::max || op == ReduceOp::min) return launch_op<T, Max>(p, index, stream);
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
