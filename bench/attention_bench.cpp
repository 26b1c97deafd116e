// attention_bench: times problem lines on a device and prints line, kernel and median.
#include <flashcore/flashcore.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "call.h"

namespace {

constexpr double kSecondsPerLine = 1;
constexpr std::size_t kFewestRuns = 5;

/// Median of the time of one run, submission and waiting included.
double median_microseconds(const bench::Call& call, const flashcore::AttentionPlan& plan, void* workspace,
                           flashcore::Device device) {
  using Clock = std::chrono::steady_clock;
  const auto run = [&] {
    const auto start = Clock::now();
    call.run(plan, workspace);
    bench::synchronize(device);
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  };
  run();  // warms up caches, clocks and lazily loaded kernels
  std::vector<double> times;
  double total = 0;
  while (times.size() < kFewestRuns || total < kSecondsPerLine * 1e6) {
    times.push_back(run());
    total += times.back();
  }
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

void time_line(const std::string& text, flashcore::Device device) {
  const bench::Line line(text);
  const bench::Call call(line, device);
  const flashcore::AttentionPlan plan = call.plan();
  const flashcore::Buffer workspace(plan.workspace_bytes(), device, nullptr);
  const double microseconds = median_microseconds(call, plan, workspace.data(), device);
  std::printf("%-60s  %-24s  %12.1f us\n", line.canonical.c_str(), plan.kernel().c_str(), microseconds);
}

int help() {
  std::printf("usage: attention_bench [--device cpu|cuda] <problem line>...\n%s\n",
              flashcore::problem_line_help().c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  flashcore::Device device;
  if (flashcore::device_count() > 0) device.type = flashcore::DeviceType::cuda;
  if (words.size() >= 2 && words[0] == "--device") {
    if (words[1] != "cpu" && words[1] != "cuda") return help();
    device.type = words[1] == "cpu" ? flashcore::DeviceType::cpu : flashcore::DeviceType::cuda;
    words.erase(words.begin(), words.begin() + 2);
  }
  if (words.empty() || words[0][0] == '-') return help();
  std::printf("%s\n", flashcore::name_of(device).c_str());
  try {
    for (const std::string& line : words) time_line(line, device);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
