// Where flashcore takes memory from: resources, the stream-ordered pool, and the owning Buffer.
//
// flashcore allocates only workspaces (and results for callers that have no allocator of their own). All of it comes
// from one MemoryResource per device, which a program may replace. The idea and the names follow C++'s
// std::pmr::memory_resource; the stream argument follows CUDA's stream-ordered allocator (cudaMallocAsync).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "flashcore/tensor.h"

namespace flashcore {

/// Hands out memory of one device, ordered by streams: memory from `allocate(n, s)` may be used by work queued on `s`
/// after the call; `deallocate(p, n, s)` may be called while work on `s` still uses `p`, and the memory is reused
/// only by work that `s` orders after it. CPU resources ignore the stream. Implementations must be thread-safe.
class FLASHCORE_API MemoryResource {
 public:
  virtual ~MemoryResource() = default;
  /// At least `bytes` bytes, aligned to 256. Never null; throws OutOfMemory. `bytes` is at least 1.
  virtual void* allocate(std::size_t bytes, Stream stream) = 0;
  /// Gives back what `allocate` with the same `bytes` returned. Does not throw.
  virtual void deallocate(void* data, std::size_t bytes, Stream stream) noexcept = 0;
};

/// The plain resource of a device: aligned host memory on the CPU, cudaMallocAsync on CUDA (cudaMalloc where the
/// driver has no memory pools). Lives as long as the process.
FLASHCORE_API MemoryResource& system_resource(Device device);

struct MemoryStats {
  std::size_t bytes_in_use = 0;    ///< handed out and not yet given back
  std::size_t bytes_reserved = 0;  ///< taken from upstream: in use plus kept for reuse
  std::size_t peak_bytes_in_use = 0;
  std::size_t peak_bytes_reserved = 0;
  std::uint64_t allocations = 0;  ///< calls served
  std::uint64_t upstream_allocations = 0;
};

/// Keeps freed blocks per stream and hands them out again. A block freed on one stream is offered to another only
/// through `empty_cache`, so that no event is ever needed. Requests are rounded up to size classes (512 bytes, then a
/// quarter of a power of two) so that nearby sizes share blocks. A block that is allocated or freed while its stream is
/// captured into a CUDA graph belongs to the graph until neither it nor anything made of it will run again; the graph
/// has no nodes that allocate or free. Such graphs must not be replayed after the pool is gone.
class FLASHCORE_API PoolResource final : public MemoryResource {
 public:
  /// `upstream` must outlive the pool.
  explicit PoolResource(MemoryResource& upstream, Device device);
  ~PoolResource() override;
  PoolResource(const PoolResource&) = delete;
  PoolResource& operator=(const PoolResource&) = delete;

  /// On exhaustion gives its cached blocks back and tries once more before it throws OutOfMemory.
  void* allocate(std::size_t bytes, Stream stream) override;
  void deallocate(void* data, std::size_t bytes, Stream stream) noexcept override;

  MemoryStats stats() const;
  /// Waits for the device and returns every cached block to upstream; those of graphs are not cached. Not while a
  /// stream of the device is captured into a graph: waiting ends the capture, and the blocks then stay cached.
  void empty_cache() noexcept;

 private:
  struct State;
  std::shared_ptr<State> state_;  // graphs know it, too
};

/// Takes memory from two functions, for a program (or a Python callback) with an allocator of its own.
class FLASHCORE_API CallbackResource final : public MemoryResource {
 public:
  using Allocate = std::function<void*(std::size_t bytes, Stream stream)>;
  using Deallocate = std::function<void(void* data, std::size_t bytes, Stream stream)>;
  CallbackResource(Allocate allocate, Deallocate deallocate);

  /// Null or an exception from the function becomes OutOfMemory.
  void* allocate(std::size_t bytes, Stream stream) override;
  void deallocate(void* data, std::size_t bytes, Stream stream) noexcept override;

 private:
  Allocate allocate_;
  Deallocate deallocate_;
};

/// The resource that workspaces on `device` come from: at first a PoolResource over `system_resource`.
FLASHCORE_API MemoryResource& workspace_resource(Device device);
/// Replaces it; null restores the pool. The resource is shared: buffers that came from it keep it alive.
FLASHCORE_API void set_workspace_resource(Device device, std::shared_ptr<MemoryResource> resource);

/// Statistics of flashcore's own pool on `device`.
FLASHCORE_API MemoryStats memory_stats(Device device);
/// Gives every block that flashcore's own pools keep for reuse back to the system; PoolResource::empty_cache for each.
FLASHCORE_API void empty_cache() noexcept;

/// Queues a copy on `stream`: within the device, or between it and host memory, which must stay until the stream is
/// synchronised. On the CPU it is done on return. Throws CudaError.
FLASHCORE_API void copy_memory(void* target, const void* source, std::size_t bytes, Device device, Stream stream);

/// Memory that frees itself: bytes of one device, taken from a resource and given back to it on the same stream.
class FLASHCORE_API Buffer {
 public:
  Buffer() = default;
  /// `bytes` 0 allocates nothing. Takes from `workspace_resource(device)`.
  Buffer(std::size_t bytes, Device device, Stream stream);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  void* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::shared_ptr<MemoryResource> resource_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  Stream stream_ = nullptr;
};

}  // namespace flashcore
