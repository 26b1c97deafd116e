// Stopwatch: how long work takes on a device, by the device's own clock, and work that is recorded to be repeated.
#pragma once

#include <functional>
#include <memory>

#include "flashcore/tensor.h"

namespace flashcore {

namespace detail {
struct StopwatchClock;
struct StopwatchRecording;
}  // namespace detail

/// Work that was recorded once and can be queued again and again by one launch: a CUDA graph, on the CPU the function
/// itself. The tensors that it works on must outlive it.
class FLASHCORE_API Recording {
 public:
  explicit Recording(std::unique_ptr<detail::StopwatchRecording> recorded) noexcept;
  Recording(Recording&&) noexcept;
  Recording& operator=(Recording&&) noexcept;
  ~Recording();

  /// Queues the work on the stopwatch's stream; on the CPU does it.
  void replay() const;

 private:
  std::unique_ptr<detail::StopwatchRecording> recorded_;
};

/// Times what is queued on its stream: by CUDA events, on the CPU by std::chrono::steady_clock. One thread at a time.
class FLASHCORE_API Stopwatch {
 public:
  /// Throws Unsupported where the device does not exist.
  explicit Stopwatch(Device device);
  Stopwatch(Stopwatch&&) noexcept;
  Stopwatch& operator=(Stopwatch&&) noexcept;
  ~Stopwatch();

  /// A stream of its own, which waits for no other: what is to be timed is queued here. Null on the CPU. It goes with
  /// the stopwatch: give Buffers that were taken on it back before, and call `empty_cache`.
  Stream stream() const noexcept;

  void start();
  /// Seconds from `start()` until what was queued on the stream before `stop()` is done. Waits for it.
  double stop();

  /// Records what `work` queues on the stream, once and without running it. Let it run before: a kernel's first launch
  /// loads it, which a recording must not. Throws CudaError where the work cannot be recorded, and what `work` throws.
  Recording record(const std::function<void()>& work);

 private:
  std::unique_ptr<detail::StopwatchClock> clock_;
};

}  // namespace flashcore
