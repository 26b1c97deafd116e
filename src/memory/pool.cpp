// PoolResource: freed blocks are kept per stream and size class and handed out again.
//
// Memory freed on a stream may still be used by work queued there, so a block is offered to that stream alone: stream
// order then protects it, and no event is needed. The stream of a free block is the one it was last freed on.
//
// While a stream is captured into a CUDA graph nothing runs; the graph may be replayed at any later time, many times.
//  - A block allocated while capturing is a node of the graph: the graph owns the address and uses it in every replay.
//    It never enters the free lists; wherever it is freed it goes upstream, which records the free in the graph or
//    ends the allocation that a replay left behind.
//  - A block allocated before and freed while capturing is no node, and CUDA refuses to record its release. Captured
//    work may use it whenever the graph is replayed, so it must not be handed out again either: it is parked until
//    empty_cache, whose caller says that nothing uses cached memory any more.
//
// Blocks go upstream only after the whole device was waited for, and on the null stream: the stream that a block was
// freed on may be destroyed by then, and CUDA crashes on the handle of a destroyed stream.
#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "backend.h"
#include "flashcore/error.h"
#include "flashcore/memory.h"

namespace flashcore {
namespace {

/// 512, then steps of a quarter of a power of two: 640, 768, 896, 1024, 1280, …
std::size_t size_class(std::size_t bytes) {
  constexpr std::size_t kSmallest = 512;
  if (bytes <= kSmallest) return kSmallest;
  const std::size_t step = std::bit_floor(bytes - 1) / 4;
  const std::size_t rounded = (bytes + step - 1) / step * step;
  return rounded < bytes ? bytes : rounded;  // too large to round up: upstream will refuse it as it is
}

/// Blocks that nobody uses, by the stream and the size class they are for.
using FreeBlocks = std::multimap<std::pair<Stream, std::size_t>, void*>;

struct UsedBlock {
  std::size_t bytes;
  bool captured;  // allocated while its stream was capturing
};

}  // namespace

struct PoolResource::State {
  State(MemoryResource& resource, Device where)
      : upstream(resource), device(where), backend(detail::find_backend(where.type)) {}

  Stream stream_of(Stream stream) const { return device.type == DeviceType::cpu ? nullptr : stream; }
  bool is_capturing(Stream stream) const { return backend && backend->is_capturing(stream); }

  void* reuse(std::size_t bytes, Stream stream);
  void* take(std::size_t bytes, Stream stream);
  void hand_out(void* data, UsedBlock block);
  void add_reserved(std::size_t bytes);
  std::optional<UsedBlock> take_back(void* data);
  void give_back(FreeBlocks& blocks) noexcept;

  MemoryResource& upstream;
  const Device device;
  const detail::Backend* const backend;

  // Upstream is never called with the mutex held: it may wait for locks of its own.
  mutable std::mutex mutex;
  MemoryStats stats;
  std::unordered_map<void*, UsedBlock> used;
  FreeBlocks free;
  FreeBlocks parked;
};

/// A free block of that stream and size, the last one freed first; null if there is none.
void* PoolResource::State::reuse(std::size_t bytes, Stream stream) {
  const std::lock_guard lock(mutex);
  const auto [first, end] = free.equal_range({stream, bytes});
  if (first == end) return nullptr;
  const auto last = std::prev(end);
  void* data = last->second;
  hand_out(data, {bytes, false});
  free.erase(last);
  return data;
}

/// Asks upstream; on exhaustion once more, after the free blocks were given back.
void* PoolResource::State::take(std::size_t bytes, Stream stream) {
  try {
    return upstream.allocate(bytes, stream);
  } catch (const OutOfMemory&) {
    give_back(free);
  }
  try {
    return upstream.allocate(bytes, stream);
  } catch (const OutOfMemory& error) {
    const std::lock_guard lock(mutex);
    throw OutOfMemory(std::string(error.what()) + " (flashcore's pool on " + name_of(device) + " has " +
                      std::to_string(stats.bytes_in_use) + " bytes in use and gave back all others)");
  }
}

/// To be called with the mutex held.
void PoolResource::State::hand_out(void* data, UsedBlock block) {
  used.insert_or_assign(data, block);
  ++stats.allocations;
  stats.bytes_in_use += block.bytes;
  stats.peak_bytes_in_use = std::max(stats.peak_bytes_in_use, stats.bytes_in_use);
}

/// To be called with the mutex held.
void PoolResource::State::add_reserved(std::size_t bytes) {
  ++stats.upstream_allocations;
  stats.bytes_reserved += bytes;
  stats.peak_bytes_reserved = std::max(stats.peak_bytes_reserved, stats.bytes_reserved);
}

/// What is known of a block that its user gives back; nothing for an address that is not in use.
std::optional<UsedBlock> PoolResource::State::take_back(void* data) {
  const std::lock_guard lock(mutex);
  const auto found = used.find(data);
  if (found == used.end()) return std::nullopt;
  const UsedBlock block = found->second;
  used.erase(found);
  stats.bytes_in_use -= block.bytes;
  return block;
}

void PoolResource::State::give_back(FreeBlocks& blocks) noexcept {
  FreeBlocks leaving;
  {
    const std::lock_guard lock(mutex);
    leaving.swap(blocks);
  }
  if (leaving.empty()) return;
  std::size_t given_back = 0;
  if (!backend || backend->wait_for_all(device.index)) {
    for (const auto& [key, data] : leaving) {
      upstream.deallocate(data, key.second, nullptr);
      given_back += key.second;
    }
    leaving.clear();
  }
  const std::lock_guard lock(mutex);
  blocks.merge(leaving);
  stats.bytes_reserved -= given_back;
}

PoolResource::PoolResource(MemoryResource& upstream, Device device)
    : state_(std::make_unique<State>(upstream, device)) {}

PoolResource::~PoolResource() { empty_cache(); }

void* PoolResource::allocate(std::size_t bytes, Stream stream) {
  stream = state_->stream_of(stream);
  const std::size_t size = size_class(bytes);
  const bool capturing = state_->is_capturing(stream);
  if (!capturing)
    if (void* data = state_->reuse(size, stream)) return data;
  void* data = capturing ? state_->upstream.allocate(size, stream) : state_->take(size, stream);
  try {
    const std::lock_guard lock(state_->mutex);
    state_->hand_out(data, {size, capturing});
    state_->add_reserved(size);
  } catch (const std::bad_alloc&) {
    state_->upstream.deallocate(data, size, stream);
    throw;
  }
  return data;
}

void PoolResource::deallocate(void* data, std::size_t, Stream stream) noexcept {
  stream = state_->stream_of(stream);
  const std::optional<UsedBlock> block = state_->take_back(data);
  if (!block) return;
  if (!block->captured) {
    const bool capturing = state_->is_capturing(stream);
    try {
      const std::lock_guard lock(state_->mutex);
      (capturing ? state_->parked : state_->free).emplace(std::pair(stream, block->bytes), data);
      return;
    } catch (const std::bad_alloc&) {
      // No host memory left to remember the block with: upstream takes it.
    }
  }
  state_->upstream.deallocate(data, block->bytes, stream);
  const std::lock_guard lock(state_->mutex);
  state_->stats.bytes_reserved -= block->bytes;
}

MemoryStats PoolResource::stats() const {
  const std::lock_guard lock(state_->mutex);
  return state_->stats;
}

void PoolResource::empty_cache() noexcept {
  state_->give_back(state_->free);
  state_->give_back(state_->parked);
}

}  // namespace flashcore
