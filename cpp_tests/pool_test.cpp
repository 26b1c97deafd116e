// The pool: blocks by stream and size, also while streams are captured into CUDA graphs.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "flashcore/flashcore.h"
#include "support/counting_resource.h"
#include "support/random.h"
#include "support/test_device.h"

namespace flashcore {
namespace {

using testing::Call;
using testing::CountingResource;
using testing::kCpu;
using testing::kCuda;
using testing::test_devices;
using testing::TestStream;

constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();

/// A pool for CUDA streams whose memory is the host's: its book-keeping can be tested without a GPU. Without one the
/// streams are numbers that nothing looks into.
class StreamPoolTest : public ::testing::Test {
 protected:
  void TearDown() override {
    pool.reset();
    EXPECT_EQ(upstream.wrong_deallocations, 0);
    EXPECT_EQ(upstream.live_bytes, 0u);
  }

  static Stream stream_or(const TestStream& stream, std::uintptr_t number) {
    return stream.get() ? stream.get() : reinterpret_cast<Stream>(number);
  }

  const TestStream first_{test_devices().back()};
  const TestStream second_{test_devices().back()};
  const Stream first = stream_or(first_, 0x100);
  const Stream second = stream_or(second_, 0x200);
  CountingResource upstream;
  std::unique_ptr<PoolResource> pool = std::make_unique<PoolResource>(upstream, kCuda);
};

TEST_F(StreamPoolTest, ReusesAFreedBlock) {
  void* const data = pool->allocate(1000, first);
  pool->deallocate(data, 1000, first);
  EXPECT_EQ(pool->allocate(1000, first), data);
  EXPECT_EQ(upstream.allocated.size(), 1u);
  pool->deallocate(data, 1000, first);
}

TEST_F(StreamPoolTest, ABlockInUseIsNotHandedOutAgain) {
  void* const a = pool->allocate(1000, first);
  void* const b = pool->allocate(1000, first);
  EXPECT_NE(a, b);
  pool->deallocate(a, 1000, first);
  pool->deallocate(b, 1000, first);
}

TEST_F(StreamPoolTest, RoundsUpToSizeClasses) {
  const std::vector<std::pair<std::size_t, std::size_t>> classes = {
      {1, 512},
      {512, 512},
      {513, 640},
      {640, 640},
      {641, 768},
      {1000, 1024},
      {1024, 1024},
      {1025, 1280},
      {1281, 1536},
      {2049, 2560},
      {(1 << 20) + 1, 5 << 18},
  };
  for (const auto& [asked, taken] : classes) {
    pool->deallocate(pool->allocate(asked, first), asked, first);
    EXPECT_EQ(upstream.allocated.back().bytes, taken) << asked;
    pool->empty_cache();
  }
}

TEST_F(StreamPoolTest, SizeClassesWasteAtMostAQuarter) {
  testing::Random random(0);
  for (int i = 0; i < 1000; ++i) {
    const auto asked = static_cast<std::size_t>(random.integer(513, 1 << 16));
    pool->deallocate(pool->allocate(asked, first), asked, first);
    pool->empty_cache();
    ASSERT_GE(upstream.allocated.back().bytes, asked);
    ASSERT_LE(upstream.allocated.back().bytes, asked + asked / 4);
  }
}

TEST_F(StreamPoolTest, NearbySizesShareBlocks) {
  void* const data = pool->allocate(900, first);
  pool->deallocate(data, 900, first);
  EXPECT_EQ(pool->allocate(1020, first), data);
  pool->deallocate(data, 1020, first);
  void* const larger = pool->allocate(1030, first);
  EXPECT_NE(larger, data);
  pool->deallocate(larger, 1030, first);
}

TEST_F(StreamPoolTest, KeepsStreamsApart) {
  void* const data = pool->allocate(1000, first);
  pool->deallocate(data, 1000, first);
  void* const other = pool->allocate(1000, second);
  EXPECT_NE(other, data);
  EXPECT_EQ(pool->allocate(1000, first), data);
  pool->deallocate(data, 1000, first);
  pool->deallocate(other, 1000, second);
}

TEST_F(StreamPoolTest, ABlockBelongsToTheStreamItWasFreedOn) {
  void* const data = pool->allocate(1000, first);
  pool->deallocate(data, 1000, second);
  EXPECT_EQ(pool->allocate(1000, second), data);
  pool->deallocate(data, 1000, second);
}

TEST_F(StreamPoolTest, UpstreamAllocatesOnTheBlocksStream) {
  pool->deallocate(pool->allocate(600, first), 600, first);
  pool->deallocate(pool->allocate(700, second), 700, second);
  EXPECT_EQ(upstream.allocated, (std::vector<Call>{{640, first}, {768, second}}));
}

// The stream may have been destroyed since: its handle must not be used again.
TEST_F(StreamPoolTest, EmptyCacheDoesNotTouchTheStreamsOfTheBlocks) {
  pool->deallocate(pool->allocate(600, first), 600, first);
  pool->deallocate(pool->allocate(700, second), 700, second);
  pool->empty_cache();
  std::sort(upstream.freed.begin(), upstream.freed.end(), [](auto a, auto b) { return a.bytes < b.bytes; });
  EXPECT_EQ(upstream.freed, (std::vector<Call>{{640, nullptr}, {768, nullptr}}));
}

TEST_F(StreamPoolTest, CountsWhatItHolds) {
  void* const a = pool->allocate(500, first);
  void* const b = pool->allocate(1000, first);
  pool->deallocate(a, 500, first);
  pool->deallocate(pool->allocate(500, first), 500, first);
  MemoryStats stats = pool->stats();
  EXPECT_EQ(stats.bytes_in_use, 1024u);
  EXPECT_EQ(stats.bytes_reserved, 1024u + 512u);
  EXPECT_EQ(stats.peak_bytes_in_use, 1024u + 512u);
  EXPECT_EQ(stats.peak_bytes_reserved, 1024u + 512u);
  EXPECT_EQ(stats.allocations, 3u);
  EXPECT_EQ(stats.upstream_allocations, 2u);

  pool->deallocate(b, 1000, first);
  pool->empty_cache();
  stats = pool->stats();
  EXPECT_EQ(stats.bytes_in_use, 0u);
  EXPECT_EQ(stats.bytes_reserved, 0u);
  EXPECT_EQ(stats.peak_bytes_reserved, 1024u + 512u);
}

TEST_F(StreamPoolTest, EmptyCacheLeavesBlocksInUse) {
  void* const used = pool->allocate(1000, first);
  pool->deallocate(pool->allocate(2000, first), 2000, first);
  pool->empty_cache();
  EXPECT_EQ(upstream.live.size(), 1u);
  EXPECT_EQ(upstream.live.count(used), 1u);
  pool->deallocate(used, 1000, first);
}

TEST_F(StreamPoolTest, ExhaustionGivesTheCacheBackAndTriesOnceMore) {
  upstream.limit = 4096;
  pool->deallocate(pool->allocate(3000, first), 3000, first);
  void* const data = pool->allocate(4000, second);  // there is room only without the cached block
  EXPECT_NE(data, nullptr);
  EXPECT_EQ(upstream.attempts, 3);
  EXPECT_EQ(pool->stats().bytes_reserved, 4096u);
  pool->deallocate(data, 4000, second);
}

TEST_F(StreamPoolTest, ExhaustionIsReportedAndThePoolStaysUsable) {
  upstream.limit = 4096;
  void* const data = pool->allocate(2000, first);
  try {
    pool->allocate(4000, first);
    FAIL() << "4000 bytes cannot be had";
  } catch (const OutOfMemory& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("no room for 4096"), std::string::npos) << message;
    EXPECT_NE(message.find("2048 bytes in use"), std::string::npos) << message;
  }
  EXPECT_EQ(pool->stats().bytes_in_use, 2048u);
  EXPECT_EQ(pool->stats().bytes_reserved, 2048u);
  void* const more = pool->allocate(2000, first);
  pool->deallocate(more, 2000, first);
  pool->deallocate(data, 2000, first);
}

TEST_F(StreamPoolTest, SizesTooLargeToRoundAreOutOfMemory) {
  upstream.limit = std::size_t{1} << 40;
  EXPECT_THROW(pool->allocate(kUnlimited, first), OutOfMemory);
  EXPECT_THROW(pool->allocate(kUnlimited / 2 + 2, first), OutOfMemory);
}

TEST_F(StreamPoolTest, UnknownAddressesAreLeftAlone) {
  int local = 0;
  pool->deallocate(&local, 4, first);
  pool->deallocate(nullptr, 4, first);
  void* const data = pool->allocate(1000, first);
  pool->deallocate(data, 1000, first);
  pool->deallocate(data, 1000, first);
  void* const a = pool->allocate(1000, first);
  void* const b = pool->allocate(1000, first);
  EXPECT_NE(a, b);  // the second deallocation did not put the block into the cache twice
  pool->deallocate(a, 1000, first);
  pool->deallocate(b, 1000, first);
}

/// The same, while streams are captured.
class CudaCapturePoolTest : public StreamPoolTest {
 protected:
  void SetUp() override {
    if (!first_.get()) GTEST_SKIP() << "no CUDA device";
  }

  /// The block of a call that takes one and gives it back.
  void* block_of_a_call(Stream stream) {
    void* const data = pool->allocate(1000, stream);
    pool->deallocate(data, 1000, stream);
    return data;
  }

  /// CUDA tells on a thread of its own that a graph is gone.
  static void wait_until(const std::function<bool()>& done) {
    for (int tries = 0; tries < 1000; ++tries) {
      if (done()) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    FAIL() << "the block of a graph that is gone was not offered again";
  }

  void wait_for_free_block(void* data) {
    std::vector<void*> others;
    wait_until([&] {
      others.push_back(pool->allocate(1000, first));
      return others.back() == data;
    });
    for (void* other : others) pool->deallocate(other, 1000, first);
  }
};

TEST_F(CudaCapturePoolTest, ACapturedCallTakesNoBlockThatQueuedWorkMayUse) {
  void* const cached = block_of_a_call(first);
  void* captured = nullptr;
  const testing::TestGraph graph = first_.capture([&] { captured = block_of_a_call(first); });
  EXPECT_NE(captured, cached);
  EXPECT_NE(upstream.allocated.back().stream, first);  // the captured stream would have made a node of it
  EXPECT_EQ(pool->stats().bytes_in_use, 0u);
  EXPECT_EQ(pool->stats().bytes_reserved, 2048u);
}

TEST_F(CudaCapturePoolTest, CallsOfOneCaptureShareABlockOnOneStreamOnly) {
  std::vector<void*> blocks;
  const auto call = [&](Stream stream) { blocks.push_back(block_of_a_call(stream)); };
  const testing::TestGraph graph = first_.capture([&] {
    call(first);
    call(first);
    first_.fork_to(second_);
    call(second);
    call(first);
    second_.fork_to(first_);  // joined again
  });
  EXPECT_EQ(blocks[0], blocks[1]);
  EXPECT_NE(blocks[2], blocks[1]);
  EXPECT_EQ(blocks[3], blocks[1]);
}

TEST_F(CudaCapturePoolTest, AGraphKeepsItsBlockUntilItIsGone) {
  void* data = nullptr;
  {
    const testing::TestGraph graph = first_.capture([&] { data = block_of_a_call(first); });
    EXPECT_NE(block_of_a_call(first), data);
    pool->empty_cache();
    EXPECT_EQ(upstream.live.count(data), 1u);
    first_.replay(graph);
  }
  wait_for_free_block(data);
}

TEST_F(CudaCapturePoolTest, TwoGraphsHaveBlocksOfTheirOwn) {
  void* blocks[2] = {};
  const testing::TestGraph one = first_.capture([&] { blocks[0] = block_of_a_call(first); });
  const testing::TestGraph other = first_.capture([&] { blocks[1] = block_of_a_call(first); });
  EXPECT_NE(blocks[0], blocks[1]);
}

TEST_F(CudaCapturePoolTest, ALaterGraphTakesTheBlockOfOneThatIsGone) {
  const auto block_of_a_graph = [&] {
    void* data = nullptr;
    first_.capture_and_replay([&] { data = block_of_a_call(first); }, 1);
    return data;
  };
  void* const data = block_of_a_graph();
  wait_until([&] { return block_of_a_graph() == data; });
}

TEST_F(CudaCapturePoolTest, ABlockThatOutlivesItsGraphIsFreedByItsUser) {
  void* data = nullptr;
  first_.capture_and_replay([&] { data = pool->allocate(1000, first); }, 1);
  EXPECT_NE(block_of_a_call(first), data);
  pool->deallocate(data, 1000, first);
  wait_for_free_block(data);
}

TEST_F(CudaCapturePoolTest, ABlockFreedWithinACaptureIsTheGraphs) {
  void* const data = pool->allocate(1000, first);
  {
    const testing::TestGraph graph = first_.capture([&] { pool->deallocate(data, 1000, first); });
    EXPECT_EQ(pool->stats().bytes_in_use, 0u);
    EXPECT_NE(block_of_a_call(first), data);
  }
  wait_for_free_block(data);
}

TEST_F(CudaCapturePoolTest, ABlockOfTwoGraphsIsFreeWhenBothAreGone) {
  void* data = nullptr;
  {
    std::optional<testing::TestGraph> one(first_.capture([&] { data = pool->allocate(1000, first); }));
    const testing::TestGraph other = first_.capture([&] { pool->deallocate(data, 1000, first); });
    one.reset();
    for (int tries = 0; tries < 20; ++tries) {
      EXPECT_NE(block_of_a_call(first), data);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  wait_for_free_block(data);
}

// Work that was queued before may still use it when the graph runs.
TEST_F(CudaCapturePoolTest, ACapturedCallTakesNoBlockFromBefore) {
  void* const before = pool->allocate(1000, first);
  void* within = nullptr;
  const testing::TestGraph graph = first_.capture([&] {
    pool->deallocate(before, 1000, first);
    within = block_of_a_call(first);
  });
  EXPECT_NE(within, before);
}

// A graph that is still there when its pool goes must not be replayed; that it goes later is no matter.
TEST_F(CudaCapturePoolTest, APoolMayGoBeforeItsGraphs) {
  const testing::TestGraph graph = first_.capture([&] { block_of_a_call(first); });
  pool.reset();
  EXPECT_EQ(upstream.live_bytes, 0u);
}

TEST_F(CudaCapturePoolTest, ExhaustionWithinACaptureIsReportedAndLeavesTheCaptureIntact) {
  upstream.limit = 4096;
  const testing::TestGraph graph = first_.capture([&] {
    EXPECT_THROW(pool->allocate(5000, first), OutOfMemory);
    block_of_a_call(first);
  });
  first_.replay(graph);
}

TEST(CpuPool, IgnoresStreams) {
  CountingResource upstream;
  PoolResource pool(upstream, kCpu);
  void* const data = pool.allocate(1000, reinterpret_cast<Stream>(0x100));
  pool.deallocate(data, 1000, reinterpret_cast<Stream>(0x200));
  EXPECT_EQ(pool.allocate(1000, nullptr), data);
  pool.deallocate(data, 1000, nullptr);
}

TEST(CpuPool, GivesItsCacheBackWhenItGoes) {
  CountingResource upstream;
  {
    PoolResource pool(upstream, kCpu);
    pool.deallocate(pool.allocate(1000, nullptr), 1000, nullptr);
    EXPECT_EQ(upstream.live.size(), 1u);
  }
  EXPECT_TRUE(upstream.live.empty());
}

TEST(CpuPool, ServesManyThreads) {
  CountingResource upstream;
  PoolResource pool(upstream, kCpu);
  const auto work = [&pool](int id) {
    testing::Random random(static_cast<std::uint64_t>(id));
    for (int i = 0; i < 2000; ++i) {
      const auto bytes = static_cast<std::size_t>(random.integer(1, 3000));
      auto* const data = static_cast<unsigned char*>(pool.allocate(bytes, nullptr));
      std::memset(data, id, bytes);
      if (i % 500 == 0) pool.empty_cache();
      const bool untouched = std::all_of(data, data + bytes, [id](unsigned char byte) { return byte == id; });
      EXPECT_TRUE(untouched) << "another thread was given the same block";
      pool.deallocate(data, bytes, nullptr);
    }
  };
  std::vector<std::thread> threads;
  for (int id = 1; id <= 4; ++id) threads.emplace_back(work, id);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.stats().allocations, 8000u);
  EXPECT_EQ(pool.stats().bytes_in_use, 0u);
  pool.empty_cache();
  EXPECT_EQ(upstream.live_bytes, 0u);
}

TEST(CudaPool, TakesPartInCaptureAndReplay) {
  if (device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const TestStream stream(kCuda);
  PoolResource pool(system_resource(kCuda), kCuda);
  testing::DeviceArray ones = testing::to_device(std::vector<float>(1000, 1.0f), kCuda);
  testing::DeviceArray sum = testing::to_device(std::vector<float>(1000, 0.0f), kCuda);
  const auto as_view = [](void* data) { return TensorView::contiguous(data, DType::float32, kCuda, {1000}); };
  stream.capture_and_replay(
      [&] {
        void* const scratch = pool.allocate(4000, stream.get());
        vector_add(as_view(ones.data()), as_view(ones.data()), as_view(scratch), stream.get());
        vector_add(as_view(scratch), as_view(sum.data()), as_view(sum.data()), stream.get());
        pool.deallocate(scratch, 4000, stream.get());
      },
      3);
  EXPECT_EQ(testing::to_host<float>(sum), std::vector<float>(1000, 6.0f));
  EXPECT_EQ(pool.stats().bytes_in_use, 0u);
}

}  // namespace
}  // namespace flashcore
