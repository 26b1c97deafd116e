// The devices that tests run on, and memory there that tests can fill and read.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "flashcore/flashcore.h"

namespace flashcore::testing {

inline constexpr Device kCpu = {DeviceType::cpu, 0};
inline constexpr Device kCuda = {DeviceType::cuda, 0};

/// The CPU and, where there is one, cuda:0.
std::vector<Device> test_devices();

/// "cpu" or "cuda": the part of a test's name that says where it runs.
std::string test_name(Device device);

/// This thread's current CUDA device.
void make_current(Device device);
Device current_device();

/// Bytes of one device that free themselves. Copies are synchronous, so no test needs to wait for anything else.
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(std::size_t bytes, Device device);
  DeviceArray(DeviceArray&& other) noexcept;
  DeviceArray& operator=(DeviceArray&& other) noexcept;
  ~DeviceArray();

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  Device device() const { return device_; }

  /// Copies all bytes from or to host memory.
  void upload(const void* host);
  void download(void* host) const;
  /// The same for `bytes` bytes from `offset` on.
  void upload_part(std::size_t offset, const void* host, std::size_t bytes);
  void download_part(std::size_t offset, void* host, std::size_t bytes) const;

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  Device device_ = {};
};

template <class T>
DeviceArray to_device(const std::vector<T>& values, Device device) {
  DeviceArray array(values.size() * sizeof(T), device);
  array.upload(values.data());
  return array;
}

template <class T>
std::vector<T> to_host(const DeviceArray& array) {
  std::vector<T> values(array.bytes() / sizeof(T));
  array.download(values.data());
  return values;
}

/// A CUDA graph, ready to run. Goes when it is destroyed.
class TestGraph {
 public:
  /// Takes over a cudaGraph_t.
  explicit TestGraph(void* graph);
  TestGraph(TestGraph&& other) noexcept;
  ~TestGraph();

  struct Nodes {
    int kernels;
    int others;
  };
  Nodes nodes() const;

 private:
  friend class TestStream;
  void* graph_ = nullptr;
  void* executable_ = nullptr;
};

enum class StreamKind { own, thread_default };

/// A stream of its own on a device, or the thread's default one; null on the CPU. Waits for its work when it goes.
class TestStream {
 public:
  explicit TestStream(Device device, StreamKind kind = StreamKind::own);
  ~TestStream();
  TestStream(const TestStream&) = delete;
  TestStream& operator=(const TestStream&) = delete;

  Stream get() const { return stream_; }
  void synchronize() const;
  /// Records what `work` queues on this stream, whose device is the current one at first. CUDA only.
  TestGraph capture(const std::function<void()>& work) const;
  /// Runs it and waits.
  void replay(const TestGraph& graph) const;
  /// Both, `times` times; then the graph is gone.
  void capture_and_replay(const std::function<void()>& work, int times) const;
  /// While this stream is captured: takes `other` into the capture, behind what is queued here.
  void fork_to(const TestStream& other) const;

 private:
  Device device_;
  StreamKind kind_;
  Stream stream_ = nullptr;
};

}  // namespace flashcore::testing
