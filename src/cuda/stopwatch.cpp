// The clock of a CUDA device: events on a stream of its own, and work recorded as a CUDA graph.
#include "../stopwatch.h"

#include <cuda_runtime_api.h>

#include "check.h"
#include "runtime.h"

namespace flashcore::cuda {
namespace {

class GraphRecording final : public detail::StopwatchRecording {
 public:
  GraphRecording(cudaGraph_t graph, int index, Stream stream) : index_(index), stream_(stream) {
    const cudaError_t status = cudaGraphInstantiate(&ready_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "making a recorded graph ready");
  }
  ~GraphRecording() override { cudaGraphExecDestroy(ready_); }

  void replay() override {
    const DeviceGuard guard(index_);
    check(cudaGraphLaunch(ready_, stream_), "launching a graph");
  }

 private:
  int index_;
  Stream stream_;
  cudaGraphExec_t ready_ = nullptr;
};

class EventClock final : public detail::StopwatchClock {
 public:
  explicit EventClock(int index) : index_(index) {
    const DeviceGuard guard(index_);
    try {
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
      check(cudaEventCreate(&begin_), "making an event");
      check(cudaEventCreate(&end_), "making an event");
    } catch (...) {
      release();
      throw;
    }
  }
  ~EventClock() override { release(); }

  Stream stream() const noexcept override { return stream_; }

  void start() override {
    const DeviceGuard guard(index_);
    check(cudaEventRecord(begin_, stream_), "recording an event");
  }

  double stop() override {
    const DeviceGuard guard(index_);
    check(cudaEventRecord(end_, stream_), "recording an event");
    check(cudaEventSynchronize(end_), "waiting for an event");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "reading the time between events");
    return milliseconds * 1e-3;
  }

  std::unique_ptr<detail::StopwatchRecording> record(const std::function<void()>& work) override {
    const DeviceGuard guard(index_);
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning to record");
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "ending a recording");
    return std::make_unique<GraphRecording>(graph, index_, stream_);
  }

 private:
  void release() noexcept {
    if (begin_) cudaEventDestroy(begin_);
    if (end_) cudaEventDestroy(end_);
    if (stream_) cudaStreamDestroy(stream_);
  }

  int index_;
  Stream stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace

std::unique_ptr<detail::StopwatchClock> make_clock(int index) { return std::make_unique<EventClock>(index); }

}  // namespace flashcore::cuda
