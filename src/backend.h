// Backend: what a kind of device gives to the library, as one struct of functions. The CPU is always there; CUDA is
// there when it was built. Only registry.cpp knows which.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "flashcore/device.h"
#include "flashcore/memory.h"
#include "kernels/kernel.h"
#include "stopwatch.h"

namespace flashcore::detail {

/// What a stream is recording.
struct Capture {
  std::uint64_t id = 0;  // of another capture another; 0: the stream is not captured
  void* graph = nullptr;
};

struct Backend {
  DeviceType type;

  int (*device_count)();  // 0 and a reason where nothing is usable; never throws
  std::string (*no_device_reason)();
  DeviceInfo (*device_info)(int index);  // index is in range
  MemoryResource& (*system_resource)(int index);

  // Graphs that streams are captured into. Where there are none, only the first is called.
  Capture (*capture_of)(int index, Stream stream);  // never throws
  // release(what) is called once, on any thread, when neither the graph nor anything made of it will run again. Throws
  // CudaError: then it never is.
  void (*keep_with_graph)(void* graph, void* what, void (*release)(void* what));
  // Does work(stream) with a stream that nobody captures, allowed also beside captures, and waits for the stream.
  void (*outside_captures)(int index, const std::function<void(Stream)>& work);

  void (*copy_to_host)(void* host, const void* device, std::size_t bytes, int index, Stream stream);  // synchronises
  void (*synchronize)(int index, Stream stream);
  bool (*wait_for_all)(int index);  // for every stream; false if CUDA refused (graph capture)

  void (*copy)(void* target, const void* source, std::size_t bytes, int index, Stream stream);
  std::unique_ptr<StopwatchClock> (*make_clock)(int index);

  void (*merge_states)(const MergeParams&, int index, Stream stream);
  void (*vector_add)(const ArrayParams& a, const ArrayParams& b, const ArrayParams& out, int index, Stream stream);
  void (*reduce)(const ReduceParams&, int index, Stream stream);

  const KernelTable* tables;  // best first; behind the reference rows only those that are run by name
  int table_count;
};

/// The backend of a device type; null if this build has none.
const Backend* find_backend(DeviceType type);
/// The same; throws Unsupported where there is none or where the index is out of range.
const Backend& backend_of(Device device);

}  // namespace flashcore::detail
