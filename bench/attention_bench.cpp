// attention_bench: times problem lines on a device: line, kernel, and the spread of the times in microseconds. With
// --once it makes each call a single time, for a profiler.
#include <flashcore/flashcore.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include "call.h"

namespace {

struct Settings {
  flashcore::Device device;
  int warm_up = 20;
  int samples = 100;
  bool once = false;
};

constexpr double kSampleSeconds = 1e-3;  // short calls are repeated for so long
constexpr int kMostRepeats = 200;

/// Microseconds of one call, sorted. A sample is the mean over calls queued back to back.
std::vector<double> sample(const bench::Call& call, const flashcore::AttentionPlan& plan, void* workspace,
                           const Settings& settings) {
  flashcore::Stopwatch stopwatch(settings.device);
  const auto work = [&] { call.run(plan, workspace, stopwatch.stream()); };
  work();  // loads the kernel
  const flashcore::Recording recording = stopwatch.record(work);
  const auto seconds = [&](int repeats) {
    stopwatch.start();
    for (int i = 0; i < repeats; ++i) recording.replay();
    return stopwatch.stop() / repeats;
  };
  const int repeats = std::clamp(static_cast<int>(kSampleSeconds / std::max(seconds(3), 1e-9)), 1, kMostRepeats);
  for (int i = 0; i < settings.warm_up; ++i) seconds(repeats);
  std::vector<double> times(static_cast<std::size_t>(settings.samples));
  std::generate(times.begin(), times.end(), [&] { return seconds(repeats) * 1e6; });
  std::sort(times.begin(), times.end());
  return times;
}

/// The value below which this share of the sorted samples lies, interpolated.
double percentile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<std::size_t>(place), high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (place - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

void time_line(const std::string& text, const Settings& settings) {
  const bench::Line line(text);
  const bench::Call call(line, settings.device);
  const flashcore::AttentionPlan plan = call.plan();
  const flashcore::Buffer workspace(plan.workspace_bytes(), settings.device, nullptr);
  flashcore::synchronize(settings.device);  // the stopwatch's stream waits for no other
  if (settings.once) {
    call.run(plan, workspace.data(), nullptr);
    flashcore::synchronize(settings.device);
    std::printf("%s  %s\n", line.canonical.c_str(), plan.kernel().c_str());
    return;
  }
  const std::vector<double> times = sample(call, plan, workspace.data(), settings);
  const double mean = std::accumulate(times.begin(), times.end(), 0.0) / static_cast<double>(times.size());
  double squares = 0;
  for (const double time : times) squares += (time - mean) * (time - mean);
  const double deviation = times.size() > 1 ? std::sqrt(squares / static_cast<double>(times.size() - 1)) : 0;
  std::printf("%-56s  %-22s", line.canonical.c_str(), plan.kernel().c_str());
  for (const double value : {mean, deviation, times.front()}) std::printf(" %10.2f", value);
  for (const double share : {0.5, 0.9, 0.95, 0.99}) std::printf(" %10.2f", percentile(times, share));
  std::printf("\n");
  std::fflush(stdout);
}

void print_header(flashcore::Device device) {
  std::printf("%s\n%-56s  %-22s", flashcore::device_info(device).name.c_str(), "microseconds", "kernel");
  for (const char* name : {"mean", "std", "min", "p50", "p90", "p95", "p99"}) std::printf(" %10s", name);
  std::printf("\n");
}

constexpr char kOptions[] = "[--device cpu|cuda] [--warm-up N] [--samples N] [--once]";

int help() {
  std::printf("usage: attention_bench %s <problem line>...\n%s\n", kOptions, flashcore::problem_line_help().c_str());
  return 2;
}

int refuse_option(const std::vector<std::string>& words) {
  const std::string value = words.size() > 1 ? ' ' + words[1] : "";
  std::fprintf(stderr, "attention_bench: cannot read \"%s%s\"; the options are %s\n", words[0].c_str(), value.c_str(),
               kOptions);
  return 2;
}

/// The number that the text is; -1 if it is none, or negative.
int count_in(const std::string& text) {
  int number = -1;
  const char* const end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, number);
  return result.ec == std::errc() && result.ptr == end ? std::max(number, -1) : -1;
}

/// Takes "--once" or "--name value" off the front of the words; false for an option or a value that there is not.
bool take_option(std::vector<std::string>& words, Settings& settings) {
  if (words[0] == "--once") {
    words.erase(words.begin());
    return settings.once = true;
  }
  if (words.size() < 2) return false;
  const std::string &name = words[0], &value = words[1];
  const int number = count_in(value);
  if (name == "--device" && (value == "cpu" || value == "cuda")) {
    settings.device.type = value == "cpu" ? flashcore::DeviceType::cpu : flashcore::DeviceType::cuda;
  } else if (name == "--warm-up" && number >= 0) {
    settings.warm_up = number;
  } else if (name == "--samples" && number > 0) {
    settings.samples = number;
  } else {
    return false;
  }
  words.erase(words.begin(), words.begin() + 2);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc), lines;
  Settings settings;
  if (flashcore::device_count() > 0) settings.device.type = flashcore::DeviceType::cuda;
  while (!words.empty()) {
    if (words[0].substr(0, 1) != "-") {
      lines.push_back(words[0]);
      words.erase(words.begin());
    } else if (!take_option(words, settings)) {
      return refuse_option(words);
    }
  }
  if (lines.empty()) return help();
  try {
    if (!settings.once) print_header(settings.device);
    for (const std::string& line : lines) time_line(line, settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
