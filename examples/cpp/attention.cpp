// Reads a prompt and generates from it, as a model's attention layer does: attention over the prompt, then decode steps
// against the cache of keys and values. On the CPU, and on a GPU if there is one. Every step is checked against
// attention over the whole sequence.
#include <flashcore/flashcore.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#ifdef EXAMPLE_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

using flashcore::Buffer;
using flashcore::Device;
using flashcore::DeviceType;
using flashcore::DType;
using flashcore::Mask;
using flashcore::TensorView;

constexpr std::int64_t kHeads = 8, kHeadsK = 2, kDim = 64, kPrompt = 100, kSteps = 20, kLength = kPrompt + kSteps;

/// Copies between the host and `device`, in either direction.
void copy(void* to, const void* from, std::size_t bytes, Device device) {
  if (device.type == DeviceType::cpu) {
    std::memcpy(to, from, bytes);
    return;
  }
#ifdef EXAMPLE_HAS_CUDA
  if (const cudaError_t error = cudaMemcpy(to, from, bytes, cudaMemcpyDefault))
    throw flashcore::CudaError(error, std::string("copying: ") + cudaGetErrorString(error));
#endif
}

/// A dense tensor in memory of its own. flashcore takes any memory: this is one way to come by some.
class Tensor {
 public:
  Tensor(std::initializer_list<std::int64_t> shape, DType dtype, Device device)
      : view_(TensorView::contiguous(nullptr, dtype, device, shape)),
        memory_(static_cast<std::size_t>(view_.numel()) * size_of(dtype), device, nullptr) {
    view_.data = memory_.data();
  }

  template <class T>
  void fill(const std::vector<T>& values) {
    copy(memory_.data(), values.data(), values.size() * sizeof(T), view_.device);
  }

  std::vector<float> values() const {
    std::vector<float> result(static_cast<std::size_t>(view_.numel()));
    copy(result.data(), memory_.data(), memory_.bytes(), view_.device);
    return result;
  }

  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  Buffer memory_;
};

/// `count` places of the sequence from `first` on: a view, since strides are read as they are.
TensorView places(const Tensor& sequence, std::int64_t first, std::int64_t count) {
  TensorView part = sequence.view();
  part.data = static_cast<float*>(part.data) + first * part.stride[2];
  part.shape[2] = count;
  return part;
}

std::vector<float> random_values(std::mt19937& random, std::int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  std::generate(values.begin(), values.end(), [&] { return normal(random); });
  return values;
}

/// The largest difference between generating step by step and attention over all at once.
double generate(Device device) {
  std::mt19937 random(0);
  Tensor q({1, kHeads, kLength, kDim}, DType::float32, device);
  Tensor k({1, kHeadsK, kLength, kDim}, DType::float32, device);
  Tensor v({1, kHeadsK, kLength, kDim}, DType::float32, device);
  for (Tensor* t : {&q, &k, &v}) t->fill(random_values(random, t->view().numel()));

  Tensor expected({1, kHeads, kLength, kDim}, DType::float32, device);
  flashcore::attention_forward({.q = q.view(), .k = k.view(), .v = v.view()}, {.out = expected.view()},
                               {.mask = Mask::causal()});

  Tensor k_cache({1, kHeadsK, kLength, kDim}, DType::float32, device);
  Tensor v_cache({1, kHeadsK, kLength, kDim}, DType::float32, device);
  Tensor held({1}, DType::int32, device);
  Tensor out({1, kHeads, kLength, kDim}, DType::float32, device);
  for (std::int64_t at = 0; at < kLength;) {
    const std::int64_t count = at == 0 ? kPrompt : 1;
    held.fill(std::vector<std::int32_t>{static_cast<std::int32_t>(at)});
    flashcore::attention_decode({.q = places(q, at, count),
                                 .k_cache = k_cache.view(),
                                 .v_cache = v_cache.view(),
                                 .cache_seqlens = held.view(),
                                 .k_new = places(k, at, count),
                                 .v_new = places(v, at, count)},
                                {.out = places(out, at, count)}, {.mask = Mask::bottom_right()});
    flashcore::synchronize(device);  // `held` is about to change
    at += count;
  }

  const std::vector<float> right = expected.values(), made = out.values();
  double largest = 0;
  for (std::size_t i = 0; i < right.size(); ++i) largest = std::max(largest, std::abs(double{right[i]} - made[i]));
  return largest;
}

bool run_on(Device device) {
  const double difference = generate(device);
  std::printf("%s, %s: %d tokens step by step differ from all at once by %.1e\n", name_of(device).c_str(),
              device_info(device).name.c_str(), static_cast<int>(kLength), difference);
  return difference < 1e-5;
}

}  // namespace

int main() {
  try {
    std::printf("flashcore %s\n%s\n", flashcore::version(),
                flashcore::explain("fwd fp32 b1 q120 k120 h8/2 d64 causal", Device{}).c_str());
    bool right = run_on(Device{});
#ifdef EXAMPLE_HAS_CUDA
    if (flashcore::device_count() > 0) right = run_on({DeviceType::cuda, 0}) && right;
#endif
    if (flashcore::device_count() == 0) std::printf("no GPU: %s\n", flashcore::no_device_reason().c_str());
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention: %s\n", error.what());
    return 1;
  }
}
