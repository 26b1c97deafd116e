// Stopwatch and Recording: the public face of a backend's clock; and the clock of the CPU.
#include "stopwatch.h"

#include <chrono>

#include "backend.h"

namespace flashcore {

namespace detail {
namespace {

struct HostRecording final : StopwatchRecording {
  explicit HostRecording(std::function<void()> work) : work_(std::move(work)) {}
  void replay() override { work_(); }

 private:
  std::function<void()> work_;
};

class HostClock final : public StopwatchClock {
 public:
  Stream stream() const noexcept override { return nullptr; }
  void start() override { begin_ = Clock::now(); }
  double stop() override { return std::chrono::duration<double>(Clock::now() - begin_).count(); }
  std::unique_ptr<StopwatchRecording> record(const std::function<void()>& work) override {
    return std::make_unique<HostRecording>(work);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_ = Clock::now();
};

}  // namespace

std::unique_ptr<StopwatchClock> make_host_clock(int) { return std::make_unique<HostClock>(); }

}  // namespace detail

Recording::Recording(std::unique_ptr<detail::StopwatchRecording> recorded) noexcept : recorded_(std::move(recorded)) {}
Recording::Recording(Recording&&) noexcept = default;
Recording& Recording::operator=(Recording&&) noexcept = default;
Recording::~Recording() = default;
void Recording::replay() const { recorded_->replay(); }

Stopwatch::Stopwatch(Device device) : clock_(detail::backend_of(device).make_clock(device.index)) {}
Stopwatch::Stopwatch(Stopwatch&&) noexcept = default;
Stopwatch& Stopwatch::operator=(Stopwatch&&) noexcept = default;
Stopwatch::~Stopwatch() = default;
Stream Stopwatch::stream() const noexcept { return clock_->stream(); }
void Stopwatch::start() { clock_->start(); }
double Stopwatch::stop() { return clock_->stop(); }
Recording Stopwatch::record(const std::function<void()>& work) { return Recording(clock_->record(work)); }

}  // namespace flashcore
