// Test devices: the only test file that speaks to the CUDA runtime.
#include "test_device.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#ifdef FLASHCORE_TEST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace flashcore::testing {
namespace {

enum class Direction { to_device, to_host };

#ifdef FLASHCORE_TEST_CUDA
void require(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

void copy(void* target, const void* source, std::size_t bytes, Device device, Direction direction) {
  if (device.type == DeviceType::cpu) {
    std::memcpy(target, source, bytes);
    return;
  }
  make_current(device);
  require(cudaDeviceSynchronize());
  require(cudaMemcpy(target, source, bytes,
                     direction == Direction::to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost));
}
#else
void copy(void* target, const void* source, std::size_t bytes, Device, Direction) {
  std::memcpy(target, source, bytes);
}
#endif

}  // namespace

std::vector<Device> test_devices() {
  std::vector<Device> devices{kCpu};
  if (device_count() > 0) devices.push_back(kCuda);
  return devices;
}

#ifdef FLASHCORE_TEST_CUDA
void make_current(Device device) { require(cudaSetDevice(device.index)); }

Device current_device() {
  int index = 0;
  require(cudaGetDevice(&index));
  return {DeviceType::cuda, index};
}
#else
void make_current(Device) {}
Device current_device() { return kCuda; }
#endif

std::string test_name(Device device) { return device.type == DeviceType::cpu ? "cpu" : "cuda"; }

DeviceArray::DeviceArray(std::size_t bytes, Device device) : bytes_(bytes), device_(device) {
  if (bytes > 0) data_ = system_resource(device).allocate(bytes, nullptr);
}

DeviceArray::DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }

DeviceArray& DeviceArray::operator=(DeviceArray&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceArray::~DeviceArray() {
  if (data_) system_resource(device_).deallocate(data_, bytes_, nullptr);
}

void DeviceArray::upload(const void* host) { upload_part(0, host, bytes_); }
void DeviceArray::download(void* host) const { download_part(0, host, bytes_); }

void DeviceArray::upload_part(std::size_t offset, const void* host, std::size_t bytes) {
  if (bytes > 0) copy(static_cast<char*>(data_) + offset, host, bytes, device_, Direction::to_device);
}

void DeviceArray::download_part(std::size_t offset, void* host, std::size_t bytes) const {
  if (bytes > 0) copy(host, static_cast<const char*>(data_) + offset, bytes, device_, Direction::to_host);
}

#ifdef FLASHCORE_TEST_CUDA
TestStream::TestStream(Device device, StreamKind kind) : device_(device), kind_(kind) {
  if (device.type != DeviceType::cuda) return;
  make_current(device);
  cudaStream_t stream = cudaStreamPerThread;
  if (kind == StreamKind::own) require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_ = stream;
}

TestStream::~TestStream() {
  if (!stream_) return;
  cudaSetDevice(device_.index);
  cudaStreamSynchronize(stream_);
  if (kind_ == StreamKind::own) cudaStreamDestroy(stream_);
}

void TestStream::synchronize() const {
  if (!stream_) return;
  make_current(device_);
  require(cudaStreamSynchronize(stream_));
}

TestGraph::TestGraph(void* graph) : graph_(graph) {
  cudaGraphExec_t executable = nullptr;
  require(cudaGraphInstantiate(&executable, static_cast<cudaGraph_t>(graph), 0));
  executable_ = executable;
}

TestGraph::~TestGraph() {
  if (executable_) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
  if (graph_) cudaGraphDestroy(static_cast<cudaGraph_t>(graph_));
}

TestGraph::Nodes TestGraph::nodes() const {
  const auto graph = static_cast<cudaGraph_t>(graph_);
  std::size_t count = 0;
  require(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  require(cudaGraphGetNodes(graph, nodes.data(), &count));
  Nodes found{};
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    require(cudaGraphNodeGetType(node, &type));
    ++(type == cudaGraphNodeTypeKernel ? found.kernels : found.others);
  }
  return found;
}

TestGraph TestStream::capture(const std::function<void()>& work) const {
  cudaGraph_t graph = nullptr;
  make_current(device_);
  require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  work();
  make_current(device_);
  require(cudaStreamEndCapture(stream_, &graph));
  return TestGraph(graph);
}

void TestStream::replay(const TestGraph& graph) const {
  make_current(device_);
  require(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph.executable_), stream_));
  require(cudaStreamSynchronize(stream_));
}

void TestStream::fork_to(const TestStream& other) const {
  cudaEvent_t event = nullptr;
  require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  require(cudaEventRecord(event, stream_));
  require(cudaStreamWaitEvent(other.stream_, event, 0));
  require(cudaEventDestroy(event));
}
#else
TestStream::TestStream(Device device, StreamKind kind) : device_(device), kind_(kind) {}
TestStream::~TestStream() = default;
void TestStream::synchronize() const {}
TestGraph::TestGraph(void*) {}
TestGraph::~TestGraph() = default;
TestGraph::Nodes TestGraph::nodes() const { return {}; }
TestGraph TestStream::capture(const std::function<void()>&) const { return TestGraph(nullptr); }
void TestStream::replay(const TestGraph&) const {}
void TestStream::fork_to(const TestStream&) const {}
#endif

TestGraph::TestGraph(TestGraph&& other) noexcept
    : graph_(std::exchange(other.graph_, nullptr)), executable_(std::exchange(other.executable_, nullptr)) {}

void TestStream::capture_and_replay(const std::function<void()>& work, int times) const {
  const TestGraph graph = capture(work);
  for (int i = 0; i < times; ++i) replay(graph);
}

}  // namespace flashcore::testing
