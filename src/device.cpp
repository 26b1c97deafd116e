// The devices of this process, asked of the backends and remembered.
#include "flashcore/device.h"

#include <memory>
#include <mutex>

#include "backend.h"
#include "flashcore/error.h"

namespace flashcore {
namespace {

/// The devices of one type; each is asked for its properties when first wanted.
class DeviceList {
 public:
  explicit DeviceList(DeviceType type) : backend_(detail::find_backend(type)) {
    if (backend_) count_ = backend_->device_count();
    entries_ = std::make_unique<Entry[]>(static_cast<std::size_t>(count_));
  }

  int count() const { return count_; }

  const DeviceInfo& info(int index) {
    Entry& entry = entries_[static_cast<std::size_t>(index)];
    std::call_once(entry.once, [&] { entry.info = backend_->device_info(index); });
    return entry.info;
  }

 private:
  struct Entry {
    std::once_flag once;
    DeviceInfo info;
  };

  const detail::Backend* backend_;
  int count_ = 0;
  std::unique_ptr<Entry[]> entries_;
};

DeviceList& devices_of(DeviceType type) {
  if (type == DeviceType::cpu) {
    static auto* const cpu = new DeviceList(DeviceType::cpu);  // never destroyed: callers keep references
    return *cpu;
  }
  static auto* const cuda = new DeviceList(DeviceType::cuda);
  return *cuda;
}

std::string what_exists(DeviceType type, int count) {
  const std::string kind = type == DeviceType::cpu ? "CPU device" : "CUDA device";
  if (count > 1) return "there are " + std::to_string(count) + " " + kind + "s, 0 to " + std::to_string(count - 1);
  if (count == 1) return "there is 1 " + kind + ", number 0";
  return "there are 0 " + kind + "s (" + no_device_reason() + ")";
}

}  // namespace

int device_count() noexcept {
  const detail::Backend* backend = detail::find_backend(DeviceType::cuda);
  return backend ? backend->device_count() : 0;
}

std::string no_device_reason() {
  const detail::Backend* backend = detail::find_backend(DeviceType::cuda);
  if (!backend) return "built without CUDA";
  return backend->device_count() > 0 ? std::string() : backend->no_device_reason();
}

const DeviceInfo& device_info(Device device) {
  DeviceList& devices = devices_of(device.type);
  if (device.index < 0 || device.index >= devices.count())
    throw InvalidArgument("device " + std::to_string(device.index) + " of type " +
                          (device.type == DeviceType::cpu ? "cpu" : "cuda") + " given; " +
                          what_exists(device.type, devices.count()));
  return devices.info(device.index);
}

void synchronize(Device device, Stream stream) { detail::backend_of(device).synchronize(device.index, stream); }

bool built_with_cuda() noexcept { return detail::find_backend(DeviceType::cuda) != nullptr; }

const char* version() noexcept { return FLASHCORE_VERSION; }

}  // namespace flashcore
