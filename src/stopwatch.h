// What a backend gives for the public Stopwatch: its clock, and work recorded on its stream.
#pragma once

#include <functional>
#include <memory>

#include "flashcore/stopwatch.h"

namespace flashcore::detail {

struct StopwatchRecording {
  virtual ~StopwatchRecording() = default;
  virtual void replay() = 0;
};

struct StopwatchClock {
  virtual ~StopwatchClock() = default;
  virtual Stream stream() const noexcept = 0;
  virtual void start() = 0;
  virtual double stop() = 0;
  virtual std::unique_ptr<StopwatchRecording> record(const std::function<void()>& work) = 0;
};

/// The clock of the CPU.
std::unique_ptr<StopwatchClock> make_host_clock(int index);

}  // namespace flashcore::detail
