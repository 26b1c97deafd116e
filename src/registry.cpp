// The registry: which backends this build has, in which order their rows are asked, and how a row refuses.
#include "registry.h"

#include "flashcore/error.h"
#include "kernels/cpu/backend.h"
#ifdef FLASHCORE_HAVE_CUDA
#include "cuda/backend.h"
#endif

namespace flashcore::detail {

const Backend* find_backend(DeviceType type) {
  if (type == DeviceType::cpu) return &cpu_backend();
#ifdef FLASHCORE_HAVE_CUDA
  if (type == DeviceType::cuda) return &cuda_backend();
#endif
  return nullptr;
}

const Backend& backend_of(Device device) {
  const Backend* backend = find_backend(device.type);
  if (!backend)
    throw Unsupported("tensors on " + name_of(device) +
                      " given, but this build of flashcore has no CUDA kernels; build with a CUDA compiler "
                      "(FLASHCORE_CUDA=ON), or move the tensors to the CPU");
  const int count = backend->device_count();
  if (device.index < 0 || device.index >= count)
    throw Unsupported(name_of(device) + " cannot be used: " +
                      (count > 0 ? "there are " + std::to_string(count) + " devices" : backend->no_device_reason()));
  return *backend;
}

const std::vector<const Kernel*>& kernels_of(DeviceType type) {
  const auto collect = [](DeviceType wanted) {
    std::vector<const Kernel*> rows;
    if (const Backend* backend = find_backend(wanted))
      for (int t = 0; t < backend->table_count; ++t)
        for (const Kernel& row : backend->tables[t]) rows.push_back(&row);
    return rows;
  };
  static const std::vector<const Kernel*> cpu = collect(DeviceType::cpu);
  static const std::vector<const Kernel*> cuda = collect(DeviceType::cuda);
  return type == DeviceType::cpu ? cpu : cuda;
}

KernelWord parse_kernel_word(std::string_view word) {
  const std::size_t colon = word.find(':');
  if (colon == std::string_view::npos) return {word, {}};
  return {word.substr(0, colon), word.substr(colon + 1)};
}

bool matches(std::string_view name, std::string_view wanted) {
  if (wanted.empty()) return true;
  const auto word_ends = [name](std::size_t at) { return at == name.size() || name[at] == '.'; };
  for (std::size_t at = name.find(wanted); at != std::string_view::npos; at = name.find(wanted, at + 1))
    if ((at == 0 || name[at - 1] == '.') && word_ends(at + wanted.size())) return true;
  return false;
}

bool fits_by_kind(const Kernel& kernel, const Problem& problem, FeatureSet features) {
  return (kernel.phases & bit(problem.phase)) && (kernel.dtypes & bit(problem.dtype)) &&
         (features & ~kernel.features) == 0;
}

std::string refusal(const Kernel& kernel, const Problem& problem, const DeviceInfo& device) {
  static constexpr const char* kPhaseNames[] = {"forward", "backward", "decode"};
  if (!(kernel.phases & bit(problem.phase)))
    return std::string("does not do ") + kPhaseNames[static_cast<int>(problem.phase)];
  if (!(kernel.dtypes & bit(problem.dtype))) return std::string("does not know ") + name_of(problem.dtype);
  const FeatureSet unknown = features_of(problem) & ~kernel.features;
  if (unknown) return "does not know " + describe_features(unknown);
  return kernel.refuse ? kernel.refuse(problem, device) : std::string();
}

std::string setting_refusal(const Kernel& kernel, const Problem& problem, const DeviceInfo& device,
                            std::string_view setting) {
  if (setting.empty()) return {};
  std::string others;
  if (kernel.settings)
    for (const std::string& word : kernel.settings(problem, device)) {
      if (word == setting) return {};
      others += (others.empty() ? "" : ", ") + word;
    }
  return "has no setting \"" + std::string(setting) + "\" for this problem" +
         (others.empty() ? "; it has none" : "; it has " + others);
}

std::vector<std::string> kernel_words(const Kernel& kernel, const Problem& problem, const DeviceInfo& device) {
  std::vector<std::string> words{kernel.name};
  if (!kernel.settings) return words;
  for (const std::string& setting : kernel.settings(problem, device)) words.push_back(words[0] + ":" + setting);
  return words;
}

}  // namespace flashcore::detail
