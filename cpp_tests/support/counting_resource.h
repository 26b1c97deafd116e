// A memory resource that tests can look into.
#pragma once

#include <cstddef>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "flashcore/flashcore.h"
#include "test_device.h"

namespace flashcore::testing {

struct Call {
  std::size_t bytes;
  Stream stream;
  bool operator==(const Call&) const = default;
};

/// Host memory that writes down what it was asked, with no more than `limit` bytes out at a time.
class CountingResource final : public MemoryResource {
 public:
  void* allocate(std::size_t bytes, Stream stream) override {
    const std::lock_guard lock(mutex);
    ++attempts;
    if (bytes > limit - live_bytes) throw OutOfMemory("no room for " + std::to_string(bytes));
    void* data = system_resource(kCpu).allocate(bytes, nullptr);
    allocated.push_back({bytes, stream});
    live[data] = bytes;
    live_bytes += bytes;
    return data;
  }

  void deallocate(void* data, std::size_t bytes, Stream stream) noexcept override {
    const std::lock_guard lock(mutex);
    const auto found = live.find(data);
    wrong_deallocations += found == live.end() || found->second != bytes;
    if (found == live.end()) return;
    live_bytes -= found->second;
    live.erase(found);
    freed.push_back({bytes, stream});
    system_resource(kCpu).deallocate(data, bytes, nullptr);
  }

  std::mutex mutex;
  std::size_t limit = std::numeric_limits<std::size_t>::max();
  std::size_t live_bytes = 0;
  int attempts = 0;
  int wrong_deallocations = 0;
  std::vector<Call> allocated;
  std::vector<Call> freed;
  std::map<void*, std::size_t> live;
};

}  // namespace flashcore::testing
