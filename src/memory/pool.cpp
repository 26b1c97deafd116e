// PoolResource: freed blocks are kept per stream and size class and handed out again.
//
// Memory freed on a stream may still be used by work queued there, so a block is offered to that stream alone: stream
// order then protects it, and no event is needed. The stream of a free block is the one it was last freed on.
//
// While a stream is captured into a CUDA graph nothing runs; the graph may be replayed at any later time, many times. A
// block that captured work uses therefore belongs to the graph: CUDA tells when neither the graph nor anything made of
// it will run again. (Allocations recorded as nodes of the graph would do without that, but CUDA lets such a graph be
// instantiated only once at a time.)
//  - It is new, or idle: other blocks may be in use by work that the graph is not ordered after.
//  - Freed within the capture, it is handed out again to the same stream there, whose work stays in order.
//  - Once the graph is gone it is as free as any other: idle, if only captured work has used it.
//  - A block allocated before, and freed within a capture, is given to the graph likewise.
//
// Blocks go upstream only after the whole device was waited for, and on the null stream: the stream that a block was
// freed on may be destroyed by then, and CUDA crashes on the handle of a destroyed stream.
#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>

#include "backend.h"
#include "flashcore/error.h"
#include "flashcore/memory.h"

namespace flashcore {
namespace {

using detail::Capture;

/// 512, then steps of a quarter of a power of two: 640, 768, 896, 1024, 1280, …
std::size_t size_class(std::size_t bytes) {
  constexpr std::size_t kSmallest = 512;
  if (bytes <= kSmallest) return kSmallest;
  const std::size_t step = std::bit_floor(bytes - 1) / 4;
  const std::size_t rounded = (bytes + step - 1) / step * step;
  return rounded < bytes ? bytes : rounded;  // too large to round up: upstream will refuse it as it is
}

/// What is known of a block that was handed out, or that a graph may use, or both.
struct Block {
  std::size_t bytes;
  std::uint64_t capture;      // the last one whose graph may use it; 0: none
  int graphs;                 // that may use it
  bool only_captured;         // nothing but captured work has used it
  bool in_use = true;         // handed out
  Stream freed_on = nullptr;  // if not in use
};

using Blocks = std::unordered_map<void*, Block>;
/// Blocks that nobody has, by the stream and the size class they are for.
using FreeBlocks = std::multimap<std::pair<Stream, std::size_t>, void*>;
/// Blocks that nothing queued uses, either: for any stream and any graph.
using IdleBlocks = std::multimap<std::size_t, void*>;

}  // namespace

struct PoolResource::State : std::enable_shared_from_this<State> {
  State(MemoryResource& resource, Device where)
      : upstream(resource), device(where), backend(detail::find_backend(where.type)) {}

  Stream stream_of(Stream stream) const { return device.type == DeviceType::cpu ? nullptr : stream; }
  Capture capture_of(Stream stream) const { return backend ? backend->capture_of(device.index, stream) : Capture{}; }

  void* allocate(std::size_t bytes, Stream stream);
  void* allocate_captured(std::size_t bytes, Stream stream, const Capture& capture);
  void* hand_out_idle(const Block& block);
  void* hand_out_new(void* data, const Block& block);
  void hand_out(void* data, const Block& block);
  OutOfMemory exhausted(const OutOfMemory& error) const;

  void deallocate(void* data, Stream stream) noexcept;
  void take_back(Block& block);
  void set_free(Blocks::iterator known) noexcept;

  void keep_with_graph(void* data, const Capture& capture);
  void graph_is_gone(void* data) noexcept;
  void forget_graphs() noexcept;
  void give_back() noexcept;

  MemoryResource& upstream;
  const Device device;
  const detail::Backend* const backend;

  // Upstream is never called with the mutex held: it may wait for locks of its own.
  mutable std::mutex mutex;
  MemoryStats stats;
  Blocks blocks;
  FreeBlocks free;
  IdleBlocks idle;
};

// ---- handing out ----------------------------------------------------------------------------------------------------

void* PoolResource::State::allocate(std::size_t bytes, Stream stream) {
  const Block block{.bytes = bytes, .capture = 0, .graphs = 0, .only_captured = false};
  {
    const std::lock_guard lock(mutex);
    const auto [first, end] = free.equal_range({stream, bytes});
    if (first != end) {
      const auto last = std::prev(end);  // freed last
      void* data = last->second;
      hand_out(data, block);
      free.erase(last);
      return data;
    }
    if (void* data = hand_out_idle(block)) return data;
  }
  try {
    return hand_out_new(upstream.allocate(bytes, stream), block);
  } catch (const OutOfMemory&) {
    give_back();  // and once more
  }
  try {
    return hand_out_new(upstream.allocate(bytes, stream), block);
  } catch (const OutOfMemory& error) {
    throw exhausted(error);
  }
}

void* PoolResource::State::allocate_captured(std::size_t bytes, Stream stream, const Capture& capture) {
  const Block block{.bytes = bytes, .capture = capture.id, .graphs = 1, .only_captured = true};
  void* data = nullptr;
  {
    const std::lock_guard lock(mutex);
    for (auto& [freed, known] : blocks) {
      const bool offered = !known.in_use && known.only_captured && known.capture == capture.id;
      if (!offered || known.freed_on != stream || known.bytes != bytes) continue;
      known.in_use = true;
      hand_out(freed, Block(known));
      return freed;
    }
    data = hand_out_idle(block);
  }
  if (!data) {
    try {
      backend->outside_captures(device.index, [&](Stream aside) { data = upstream.allocate(bytes, aside); });
    } catch (const OutOfMemory& error) {
      throw exhausted(error);
    }
    hand_out_new(data, block);
  }
  try {
    keep_with_graph(data, capture);
  } catch (const std::exception&) {
    const std::lock_guard lock(mutex);
    const auto known = blocks.find(data);
    take_back(known->second);
    set_free(known);
    throw;
  }
  return data;
}

/// An idle block of that size, or null. To be called with the mutex held.
void* PoolResource::State::hand_out_idle(const Block& block) {
  const auto found = idle.find(block.bytes);
  if (found == idle.end()) return nullptr;
  void* data = found->second;
  hand_out(data, block);
  idle.erase(found);
  return data;
}

/// What upstream gave. Not to be called with the mutex held.
void* PoolResource::State::hand_out_new(void* data, const Block& block) {
  try {
    const std::lock_guard lock(mutex);
    hand_out(data, block);
    ++stats.upstream_allocations;
    stats.bytes_reserved += block.bytes;
    stats.peak_bytes_reserved = std::max(stats.peak_bytes_reserved, stats.bytes_reserved);
  } catch (const std::bad_alloc&) {
    upstream.deallocate(data, block.bytes, nullptr);
    throw;
  }
  return data;
}

/// To be called with the mutex held.
void PoolResource::State::hand_out(void* data, const Block& block) {
  blocks.insert_or_assign(data, block);
  ++stats.allocations;
  stats.bytes_in_use += block.bytes;
  stats.peak_bytes_in_use = std::max(stats.peak_bytes_in_use, stats.bytes_in_use);
}

OutOfMemory PoolResource::State::exhausted(const OutOfMemory& error) const {
  const std::lock_guard lock(mutex);
  return OutOfMemory(std::string(error.what()) + " (flashcore's pool on " + name_of(device) + " has " +
                     std::to_string(stats.bytes_in_use) + " bytes in use and " +
                     std::to_string(stats.bytes_reserved - stats.bytes_in_use) + " that graphs or streams still need)");
}

// ---- taking back ----------------------------------------------------------------------------------------------------

void PoolResource::State::deallocate(void* data, Stream stream) noexcept {
  const Capture capture = capture_of(stream);
  {
    const std::lock_guard lock(mutex);
    const auto known = blocks.find(data);
    if (known == blocks.end() || !known->second.in_use) return;
    Block& block = known->second;
    take_back(block);
    block.freed_on = stream;
    block.only_captured = block.only_captured && capture.id != 0;
    if (capture.id == 0) {
      if (block.graphs == 0) set_free(known);
      return;
    }
    if (block.capture == capture.id) return;  // its graph has it already
    block.capture = capture.id;
    ++block.graphs;
  }
  try {
    keep_with_graph(data, capture);
  } catch (const std::exception&) {
    // Nobody will tell when the graph is gone: the block is not used again.
  }
}

/// To be called with the mutex held.
void PoolResource::State::take_back(Block& block) {
  block.in_use = false;
  stats.bytes_in_use -= block.bytes;
}

/// Neither in use nor a graph's. To be called with the mutex held.
void PoolResource::State::set_free(Blocks::iterator known) noexcept {
  const auto [data, block] = *known;
  try {
    if (block.only_captured)
      idle.emplace(block.bytes, data);
    else
      free.emplace(std::pair(block.freed_on, block.bytes), data);
    blocks.erase(known);
  } catch (const std::bad_alloc&) {
    // No host memory left to offer the block with: it stays unused.
  }
}

// ---- graphs ---------------------------------------------------------------------------------------------------------

/// From now on graph_is_gone(data) is called when it is.
void PoolResource::State::keep_with_graph(void* data, const Capture& capture) {
  struct Kept {
    std::weak_ptr<State> pool;
    void* data;
  };
  auto kept = std::make_unique<Kept>(weak_from_this(), data);
  const auto release = [](void* what) {
    const std::unique_ptr<Kept> gone(static_cast<Kept*>(what));
    if (const auto pool = gone->pool.lock()) pool->graph_is_gone(gone->data);
  };
  backend->keep_with_graph(capture.graph, kept.get(), release);
  static_cast<void>(kept.release());  // the call above deletes it one day
}

/// Neither one of its graphs nor anything made of that will run again.
void PoolResource::State::graph_is_gone(void* data) noexcept {
  const std::lock_guard lock(mutex);
  const auto known = blocks.find(data);
  if (known == blocks.end()) return;
  if (--known->second.graphs == 0 && !known->second.in_use) set_free(known);
}

/// The pool goes, and with it the right to replay graphs that use its blocks.
void PoolResource::State::forget_graphs() noexcept {
  const std::lock_guard lock(mutex);
  for (auto known = blocks.begin(); known != blocks.end();) {
    const auto block = known++;
    if (!block->second.in_use) set_free(block);
  }
}

void PoolResource::State::give_back() noexcept {
  FreeBlocks leaving;
  IdleBlocks leaving_idle;
  {
    const std::lock_guard lock(mutex);
    leaving.swap(free);
    leaving_idle.swap(idle);
  }
  if (leaving.empty() && leaving_idle.empty()) return;
  std::size_t given_back = 0;
  if (!backend || backend->wait_for_all(device.index)) {
    const auto give = [&](void* data, std::size_t bytes) {
      upstream.deallocate(data, bytes, nullptr);
      given_back += bytes;
    };
    for (const auto& [key, data] : leaving) give(data, key.second);
    for (const auto& [bytes, data] : leaving_idle) give(data, bytes);
    leaving.clear();
    leaving_idle.clear();
  }
  const std::lock_guard lock(mutex);
  free.merge(leaving);
  idle.merge(leaving_idle);
  stats.bytes_reserved -= given_back;
}

// ---- the resource ---------------------------------------------------------------------------------------------------

PoolResource::PoolResource(MemoryResource& upstream, Device device)
    : state_(std::make_shared<State>(upstream, device)) {}

PoolResource::~PoolResource() {
  state_->forget_graphs();
  empty_cache();
}

void* PoolResource::allocate(std::size_t bytes, Stream stream) {
  stream = state_->stream_of(stream);
  const Capture capture = state_->capture_of(stream);
  const std::size_t size = size_class(bytes);
  return capture.id == 0 ? state_->allocate(size, stream) : state_->allocate_captured(size, stream, capture);
}

void PoolResource::deallocate(void* data, std::size_t, Stream stream) noexcept {
  state_->deallocate(data, state_->stream_of(stream));
}

MemoryStats PoolResource::stats() const {
  const std::lock_guard lock(state_->mutex);
  return state_->stats;
}

void PoolResource::empty_cache() noexcept { state_->give_back(); }

}  // namespace flashcore
