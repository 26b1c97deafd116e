// Which memory resource each device has: the plain one, flashcore's pool over it, or one that the program set.
#include "memory/resources.h"

#include <sys/mman.h>

#include <cstdlib>
#include <limits>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "flashcore/error.h"

namespace flashcore {
namespace detail {
namespace {

class HostResource final : public MemoryResource {
 public:
  void* allocate(std::size_t bytes, Stream) override {
    const std::size_t alignment = bytes >= kHugePage / 2 ? kHugePage : kMemoryAlignment;
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    const bool possible = bytes <= std::size_t{std::numeric_limits<std::ptrdiff_t>::max()} - alignment;
    void* data = possible ? std::aligned_alloc(alignment, rounded) : nullptr;
    if (!data) throw OutOfMemory("host memory is exhausted: " + std::to_string(bytes) + " bytes were asked for");
    if (alignment == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // an optimisation: it may be refused
    return data;
  }

  void deallocate(void* data, std::size_t, Stream) noexcept override { std::free(data); }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
};

/// One device's resources. `pool` is made on first use and lives for ever: at exit a device may be gone before static
/// objects are destroyed, and the system takes the memory back anyway.
struct DeviceResources {
  Device device;
  PoolResource* pool = nullptr;
  std::shared_ptr<MemoryResource> current = {};
};

struct Registry {
  std::mutex mutex;
  std::vector<DeviceResources> devices;

  /// To be called with the mutex held.
  DeviceResources& of(Device device) {
    for (DeviceResources& entry : devices)
      if (entry.device == device) return entry;
    return devices.emplace_back(DeviceResources{.device = device});
  }
};

Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

}  // namespace

MemoryResource& host_resource() {
  static auto* const instance = new HostResource;
  return *instance;
}

std::shared_ptr<MemoryResource> shared_workspace_resource(Device device) {
  MemoryResource& system = system_resource(device);
  const std::lock_guard lock(registry().mutex);
  DeviceResources& entry = registry().of(device);
  if (!entry.current) {
    if (!entry.pool) entry.pool = new PoolResource(system, device);
    entry.current = std::shared_ptr<MemoryResource>(std::shared_ptr<void>(), entry.pool);  // shared, not owned
  }
  return entry.current;
}

}  // namespace detail

MemoryResource& system_resource(Device device) { return detail::backend_of(device).system_resource(device.index); }

void copy_memory(void* target, const void* source, std::size_t bytes, Device device, Stream stream) {
  detail::backend_of(device).copy(target, source, bytes, device.index, stream);
}

MemoryResource& workspace_resource(Device device) { return *detail::shared_workspace_resource(device); }

void set_workspace_resource(Device device, std::shared_ptr<MemoryResource> resource) {
  detail::backend_of(device);  // refuses a device that does not exist
  const std::lock_guard lock(detail::registry().mutex);
  // The previous resource goes with `resource`, after the lock: its destructor may run the program's own code.
  detail::registry().of(device).current.swap(resource);
}

MemoryStats memory_stats(Device device) {
  detail::backend_of(device);
  const std::lock_guard lock(detail::registry().mutex);
  const PoolResource* pool = detail::registry().of(device).pool;
  return pool ? pool->stats() : MemoryStats{};
}

void empty_cache() noexcept {
  const std::lock_guard lock(detail::registry().mutex);
  for (const auto& entry : detail::registry().devices)
    if (entry.pool) entry.pool->empty_cache();
}

CallbackResource::CallbackResource(Allocate allocate, Deallocate deallocate)
    : allocate_(std::move(allocate)), deallocate_(std::move(deallocate)) {
  if (!allocate_ || !deallocate_)
    throw InvalidArgument("a memory callback is missing: both allocate and deallocate are needed");
}

void* CallbackResource::allocate(std::size_t bytes, Stream stream) {
  const std::string failed = "the memory callback was asked for " + std::to_string(bytes) + " bytes and ";
  void* data = nullptr;
  try {
    data = allocate_(bytes, stream);
  } catch (const std::exception& error) {
    throw OutOfMemory(failed + "failed: " + error.what());
  } catch (...) {
    throw OutOfMemory(failed + "failed");
  }
  if (!data) throw OutOfMemory(failed + "returned null");
  if (reinterpret_cast<std::uintptr_t>(data) % detail::kMemoryAlignment != 0) {
    deallocate(data, bytes, stream);
    throw OutOfMemory(failed + "returned an address that is not a multiple of " +
                      std::to_string(detail::kMemoryAlignment));
  }
  return data;
}

void CallbackResource::deallocate(void* data, std::size_t bytes, Stream stream) noexcept {
  try {
    deallocate_(data, bytes, stream);
  } catch (...) {
    // Memory is given back from destructors: there is nobody to tell.
  }
}

}  // namespace flashcore
