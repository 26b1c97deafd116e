// The CPU as a backend: what the machine is, its memory, its kernel rows and primitives.
#include "backend.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

#include "flash.h"
#include "kernels.h"
#include "memory/resources.h"

namespace flashcore::detail {
namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

DeviceInfo device_info(int) {
  DeviceInfo info;
  info.device = {DeviceType::cpu, 0};
  info.name = processor_name();
  info.multiprocessors = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page_bytes = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page_bytes > 0)
    info.memory_bytes = static_cast<std::size_t>(pages) * static_cast<std::size_t>(page_bytes);
  return info;
}

void copy(void* target, const void* source, std::size_t bytes, int, Stream) {
  if (bytes > 0) std::memcpy(target, source, bytes);
}

constexpr unsigned kFloatDTypes = bit(DType::float16) | bit(DType::bfloat16) | bit(DType::float32);
constexpr unsigned kWideDTypes = kFloatDTypes | bit(DType::float64);

constexpr FeatureSet kCommonFeatures = kCausal | kCausalTopLeft | kWindow | kMask | kBias | kSoftcap | kAlibi | kSinks |
                                       kDropout | kVarlen | kSequsedK | kGroupedHeads | kHeadDimV | kDeterministic |
                                       kUnaligned;

constexpr Kernel kFlashRows[] = {
    {
        "cpu.decode",
        DeviceType::cpu,
        bit(Phase::forward) | bit(Phase::decode),
        (kCommonFeatures | kLse | kPaged | kAppend | kRotary) & ~kDropout,
        kFloatDTypes,
        cpu::refuse_flash_decode,
        cpu::plan_flash_decode,
        cpu::launch_flash_decode,
        cpu::flash_decode_settings,
    },
    {
        "cpu.flash",
        DeviceType::cpu,
        bit(Phase::forward) | bit(Phase::decode),
        kCommonFeatures | kLse | kPaged | kAppend | kRotary,
        kFloatDTypes,
        nullptr,
        cpu::plan_flash_forward,
        cpu::launch_flash_forward,
        cpu::isa_settings,
    },
    {
        "cpu.flash",
        DeviceType::cpu,
        bit(Phase::backward),
        kCommonFeatures | kDlse | kDbias | kDsinks,
        kFloatDTypes,
        nullptr,
        cpu::plan_flash_backward,
        cpu::launch_flash_backward,
        cpu::isa_settings,
    },
};

constexpr Kernel kReferenceRows[] = {
    {
        "cpu.reference",
        DeviceType::cpu,
        bit(Phase::forward) | bit(Phase::decode),
        kCommonFeatures | kLse | kPaged | kAppend | kRotary | kDescale,
        kWideDTypes | bit(DType::float8_e4m3),
        nullptr,
        cpu::plan_forward,
        cpu::launch_forward,
    },
    {
        "cpu.reference",
        DeviceType::cpu,
        bit(Phase::backward),
        kCommonFeatures | kDlse | kDbias | kDsinks,
        kWideDTypes,
        nullptr,
        cpu::plan_backward,
        cpu::launch_backward,
    },
};

constexpr KernelTable kTables[] = {{kFlashRows, std::size(kFlashRows)}, {kReferenceRows, std::size(kReferenceRows)}};

}  // namespace

const Backend& cpu_backend() {
  static const Backend backend = {
      .type = DeviceType::cpu,
      .device_count = [] { return 1; },
      .no_device_reason = [] { return std::string(); },
      .device_info = device_info,
      .system_resource = [](int) -> MemoryResource& { return host_resource(); },
      .capture_of = [](int, Stream) { return Capture{}; },
      .keep_with_graph = nullptr,
      .outside_captures = nullptr,
      .copy_to_host = copy,
      .synchronize = [](int, Stream) {},
      .wait_for_all = [](int) { return true; },
      .copy = copy,
      .make_clock = make_host_clock,
      .merge_states = cpu::merge_states,
      .vector_add = cpu::vector_add,
      .reduce = cpu::reduce,
      .tables = kTables,
      .table_count = std::size(kTables),
  };
  return backend;
}

}  // namespace flashcore::detail
