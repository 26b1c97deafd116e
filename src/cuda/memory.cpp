// Device memory from the CUDA runtime, copies to the host, and the state of streams.
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../backend.h"
#include "check.h"
#include "runtime.h"

namespace flashcore::cuda {
namespace {

/// cudaMallocAsync; cudaMalloc where the driver has no memory pools.
class DeviceMemory final : public MemoryResource {
 public:
  explicit DeviceMemory(int index) : index_(index) {
    int supported = 0;
    check(cudaDeviceGetAttribute(&supported, cudaDevAttrMemoryPoolsSupported, index), "reading a device attribute");
    stream_ordered_ = supported != 0;
  }

  void* allocate(std::size_t bytes, Stream stream) override {
    const DeviceGuard guard(index_);
    void* data = nullptr;
    const cudaError_t status = stream_ordered_ ? cudaMallocAsync(&data, bytes, stream) : cudaMalloc(&data, bytes);
    check(status, ("allocating " + std::to_string(bytes) + " bytes on cuda:" + std::to_string(index_)).c_str());
    return data;
  }

  void deallocate(void* data, std::size_t, Stream stream) noexcept override {
    try {
      const DeviceGuard guard(index_);
      const cudaError_t status = stream_ordered_ ? cudaFreeAsync(data, stream) : cudaFree(data);
      if (status != cudaSuccess) cudaGetLastError();
    } catch (...) {
      // The process is ending or the context is lost: the memory went with it.
    }
  }

 private:
  int index_;
  bool stream_ordered_ = false;
};

/// Lets this thread allocate while streams are captured.
class RelaxedCaptures {
 public:
  RelaxedCaptures() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "allowing memory beside a capture"); }
  ~RelaxedCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCaptures(const RelaxedCaptures&) = delete;
  RelaxedCaptures& operator=(const RelaxedCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one before
};

struct OwnStream {
  OwnStream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream"); }
  ~OwnStream() { cudaStreamDestroy(stream); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  cudaStream_t stream = nullptr;
};

std::vector<std::unique_ptr<DeviceMemory>>* make_resources() {
  auto* resources = new std::vector<std::unique_ptr<DeviceMemory>>;
  for (int i = 0; i < device_count(); ++i) resources->push_back(std::make_unique<DeviceMemory>(i));
  return resources;
}

}  // namespace

MemoryResource& system_resource(int index) {
  // Never destroyed: buffers may outlive every other static object.
  static const auto* const resources = make_resources();
  return *resources->at(static_cast<std::size_t>(index));
}

detail::Capture capture_of(int index, Stream stream) noexcept {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  try {
    const DeviceGuard guard(index);  // the handles of the default streams stand for those of the current device
    check(cudaStreamGetCaptureInfo(stream, &status, &id, &graph), "asking what a stream records");
  } catch (const std::exception&) {
    return {};  // the legacy stream beside a capturing one, which records nothing itself; or the process is ending
  }
  return status == cudaStreamCaptureStatusActive ? detail::Capture{id, graph} : detail::Capture{};
}

void keep_with_graph(void* graph, void* what, void (*release)(void* what)) {
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(&object, what, release, 1, cudaUserObjectNoDestructorSync), "making a graph's object");
  // If this fails the object is left alone: letting it go would call release.
  check(cudaGraphRetainUserObject(static_cast<cudaGraph_t>(graph), object, 1, cudaGraphUserObjectMove),
        "handing an object to a graph");
}

void outside_captures(int index, const std::function<void(Stream)>& work) {
  const DeviceGuard guard(index);
  const RelaxedCaptures relaxed;
  const OwnStream own;
  work(own.stream);
  check(cudaStreamSynchronize(own.stream), "waiting for a stream");
}

void copy_to_host(void* host, const void* device, std::size_t bytes, int index, Stream stream) {
  if (bytes == 0) return;
  const DeviceGuard guard(index);
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "copying to the host");
  check(cudaStreamSynchronize(stream), "waiting for a copy to the host");
}

void copy(void* target, const void* source, std::size_t bytes, int index, Stream stream) {
  if (bytes == 0) return;
  const DeviceGuard guard(index);
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream), "copying");
}

void synchronize(int index, Stream stream) {
  const DeviceGuard guard(index);
  check(cudaStreamSynchronize(stream), "waiting for a stream");
}

bool wait_for_all(int index) {
  if (device_count() == 0) return true;  // nothing can be running
  try {
    const DeviceGuard guard(index);
    check(cudaDeviceSynchronize(), "waiting for the device");
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace flashcore::cuda
