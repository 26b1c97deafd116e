// Memory: the system resources, callbacks, the workspace resource and Buffer.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flashcore/flashcore.h"
#include "support/counting_resource.h"
#include "support/test_device.h"

namespace flashcore {
namespace {

using testing::Call;
using testing::CountingResource;
using testing::kCpu;
using testing::test_devices;

TEST(SystemResource, MemoryIsAlignedAndApart) {
  for (const Device device : test_devices()) {
    SCOPED_TRACE(name_of(device));
    MemoryResource& resource = system_resource(device);
    std::vector<std::pair<std::uintptr_t, std::size_t>> blocks;
    for (const std::size_t bytes : {1, 255, 256, 257, 100000})
      blocks.emplace_back(reinterpret_cast<std::uintptr_t>(resource.allocate(bytes, nullptr)), bytes);
    std::sort(blocks.begin(), blocks.end());
    std::uintptr_t end = 0;
    for (const auto& [address, bytes] : blocks) {
      EXPECT_EQ(address % 256, 0u);
      EXPECT_GE(address, end);
      end = address + bytes;
    }
    for (const auto& [address, bytes] : blocks) resource.deallocate(reinterpret_cast<void*>(address), bytes, nullptr);
  }
}

TEST(SystemResource, ExhaustionSaysWhatWasAskedAndLeavesItUsable) {
  for (const Device device : test_devices()) {
    SCOPED_TRACE(name_of(device));
    constexpr std::size_t kTooMuch = std::numeric_limits<std::size_t>::max() - 1000;
    try {
      system_resource(device).allocate(kTooMuch, nullptr);
      FAIL() << "so many bytes cannot be had";
    } catch (const OutOfMemory& error) {
      EXPECT_NE(std::string(error.what()).find(std::to_string(kTooMuch)), std::string::npos) << error.what();
    }
    void* const data = system_resource(device).allocate(1000, nullptr);
    system_resource(device).deallocate(data, 1000, nullptr);
  }
}

TEST(SystemResource, DevicesThatDoNotExistAreUnsupported) {
  EXPECT_THROW(system_resource({DeviceType::cuda, device_count()}), Unsupported);
  EXPECT_THROW(workspace_resource({DeviceType::cuda, 1000}), Unsupported);
  EXPECT_THROW(memory_stats({DeviceType::cpu, 1}), Unsupported);
  EXPECT_THROW(set_workspace_resource({DeviceType::cpu, -1}, nullptr), Unsupported);
}

alignas(256) unsigned char callback_memory[1024];

TEST(CallbackResource, PassesSizesAndStreamsOn) {
  std::vector<Call> calls;
  CallbackResource resource(
      [&](std::size_t bytes, Stream stream) {
        calls.push_back({bytes, stream});
        return callback_memory;
      },
      [&](void* data, std::size_t bytes, Stream stream) {
        EXPECT_EQ(data, callback_memory);
        calls.push_back({bytes, stream});
      });
  const auto stream = reinterpret_cast<Stream>(0x100);
  EXPECT_EQ(resource.allocate(1000, stream), callback_memory);
  resource.deallocate(callback_memory, 1000, stream);
  EXPECT_EQ(calls, (std::vector<Call>{{1000, stream}, {1000, stream}}));
}

std::string refusal_of(CallbackResource::Allocate allocate) {
  CallbackResource resource(std::move(allocate), [](void*, std::size_t, Stream) {});
  try {
    resource.allocate(77, nullptr);
  } catch (const OutOfMemory& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(CallbackResource, NullAndExceptionsBecomeOutOfMemory) {
  const std::string null = refusal_of([](std::size_t, Stream) { return nullptr; });
  EXPECT_NE(null.find("77 bytes"), std::string::npos) << null;
  EXPECT_NE(null.find("null"), std::string::npos) << null;
  const std::string thrown = refusal_of([](std::size_t, Stream) -> void* { throw std::runtime_error("no luck"); });
  EXPECT_NE(thrown.find("no luck"), std::string::npos) << thrown;
  const std::string odd = refusal_of([](std::size_t, Stream) -> void* { throw 1; });
  EXPECT_NE(odd.find("77 bytes"), std::string::npos) << odd;
}

TEST(CallbackResource, MisalignedMemoryIsGivenBackAndRefused) {
  int given_back = 0;
  CallbackResource resource([](std::size_t, Stream) { return callback_memory + 64; },
                            [&](void*, std::size_t, Stream) { ++given_back; });
  EXPECT_THROW(resource.allocate(77, nullptr), OutOfMemory);
  EXPECT_EQ(given_back, 1);
}

TEST(CallbackResource, ExceptionsWhileGivingBackAreSwallowed) {
  CallbackResource resource([](std::size_t, Stream) { return callback_memory; },
                            [](void*, std::size_t, Stream) { throw std::runtime_error("not now"); });
  EXPECT_NO_THROW(resource.deallocate(callback_memory, 1, nullptr));
}

TEST(CallbackResource, BothFunctionsAreNeeded) {
  EXPECT_THROW(CallbackResource(nullptr, [](void*, std::size_t, Stream) {}), InvalidArgument);
  EXPECT_THROW(CallbackResource([](std::size_t, Stream) { return nullptr; }, nullptr), InvalidArgument);
}

/// Sets the CPU's workspace resource for as long as it lives.
struct WorkspaceGuard {
  explicit WorkspaceGuard(std::shared_ptr<MemoryResource> resource) {
    set_workspace_resource(kCpu, std::move(resource));
  }
  ~WorkspaceGuard() { set_workspace_resource(kCpu, nullptr); }
};

TEST(WorkspaceResource, IsAPoolUntilTheProgramSetsAnother) {
  MemoryResource& pool = workspace_resource(kCpu);
  EXPECT_NE(dynamic_cast<PoolResource*>(&pool), nullptr);
  {
    const auto mine = std::make_shared<CountingResource>();
    const WorkspaceGuard guard(mine);
    EXPECT_EQ(&workspace_resource(kCpu), mine.get());
    const Buffer buffer(1000, kCpu, nullptr);
    EXPECT_EQ(mine->allocated, (std::vector<Call>{{1000, nullptr}}));
  }
  EXPECT_EQ(&workspace_resource(kCpu), &pool);
}

TEST(WorkspaceResource, LivesAsLongAsItsBuffers) {
  auto mine = std::make_shared<CountingResource>();
  const std::weak_ptr<CountingResource> watch = mine;
  {
    Buffer buffer;
    {
      const WorkspaceGuard guard(std::move(mine));
      buffer = Buffer(1000, kCpu, nullptr);
    }
    EXPECT_FALSE(watch.expired());
  }
  EXPECT_TRUE(watch.expired());
}

TEST(WorkspaceResource, MayBeReplacedFromItsOwnDestructor) {
  struct Restless final : MemoryResource {
    ~Restless() override { set_workspace_resource(kCpu, nullptr); }
    void* allocate(std::size_t, Stream) override { throw OutOfMemory("never"); }
    void deallocate(void*, std::size_t, Stream) noexcept override {}
  };
  set_workspace_resource(kCpu, std::make_shared<Restless>());
  set_workspace_resource(kCpu, nullptr);
  EXPECT_NE(dynamic_cast<PoolResource*>(&workspace_resource(kCpu)), nullptr);
}

TEST(WorkspaceResource, MemoryStatsAreThoseOfThePool) {
  for (const Device device : test_devices()) {
    SCOPED_TRACE(name_of(device));
    empty_cache();
    const MemoryStats before = memory_stats(device);
    EXPECT_EQ(before.bytes_reserved, before.bytes_in_use);
    {
      const Buffer buffer(5000, device, nullptr);
      EXPECT_EQ(memory_stats(device).bytes_in_use, before.bytes_in_use + 5120);
      EXPECT_EQ(memory_stats(device).allocations, before.allocations + 1);
    }
    EXPECT_EQ(memory_stats(device).bytes_in_use, before.bytes_in_use);
    EXPECT_EQ(memory_stats(device).bytes_reserved, before.bytes_reserved + 5120);
    empty_cache();
    EXPECT_EQ(memory_stats(device).bytes_reserved, before.bytes_reserved);
  }
}

TEST(Buffer, HoldsAlignedMemory) {
  for (const Device device : test_devices()) {
    const Buffer buffer(1000, device, nullptr);
    EXPECT_NE(buffer.data(), nullptr);
    EXPECT_EQ(buffer.bytes(), 1000u);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 256, 0u);
  }
}

TEST(Buffer, OfNoBytesAllocatesNothing) {
  const auto mine = std::make_shared<CountingResource>();
  const WorkspaceGuard guard(mine);
  const Buffer buffer(0, kCpu, nullptr);
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(buffer.bytes(), 0u);
  EXPECT_EQ(mine->attempts, 0);
}

TEST(Buffer, MovesWithoutCopiesOrLeaks) {
  const auto mine = std::make_shared<CountingResource>();
  const WorkspaceGuard guard(mine);
  {
    Buffer a(1000, kCpu, nullptr);
    void* const data = a.data();
    Buffer b(std::move(a));
    EXPECT_EQ(b.data(), data);
    EXPECT_EQ(b.bytes(), 1000u);
    EXPECT_EQ(a.data(), nullptr);  // NOLINT: a moved-from Buffer is empty
    EXPECT_EQ(a.bytes(), 0u);

    Buffer c(2000, kCpu, nullptr);
    c = std::move(b);
    EXPECT_EQ(c.data(), data);
    EXPECT_EQ(mine->live_bytes, 1000u);  // what c held before went back

    Buffer& itself = c;
    c = std::move(itself);
    EXPECT_EQ(c.data(), data);
  }
  EXPECT_EQ(mine->live_bytes, 0u);
  EXPECT_EQ(mine->wrong_deallocations, 0);
}

TEST(Buffer, GoesBackOnItsOwnStream) {
  const auto mine = std::make_shared<CountingResource>();
  const WorkspaceGuard guard(mine);
  const auto stream = reinterpret_cast<Stream>(0x100);
  {
    const Buffer buffer(1000, kCpu, stream);
  }
  EXPECT_EQ(mine->freed, (std::vector<Call>{{1000, stream}}));
}

TEST(Buffer, ExhaustionLeavesNothingBehind) {
  const auto mine = std::make_shared<CountingResource>();
  mine->limit = 500;
  const WorkspaceGuard guard(mine);
  EXPECT_THROW(Buffer(1000, kCpu, nullptr), OutOfMemory);
  EXPECT_TRUE(mine->freed.empty());
}

}  // namespace
}  // namespace flashcore
