// DType, Device and TensorView: how a caller's array is described to flashcore.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "flashcore/export.h"

struct CUstream_st;  // a CUDA stream, by forward declaration: no CUDA header is needed to use flashcore

namespace flashcore {

/// A `cudaStream_t`. Null is CUDA's legacy default stream; calls on CPU tensors take null.
using Stream = CUstream_st*;

enum class DType : std::uint8_t {
  float16,
  bfloat16,
  float32,
  float64,
  float8_e4m3,  ///< OCP 8-bit, 4 exponent and 3 mantissa bits, no infinities, largest value 448 ("e4m3fn")
  int32,
  int64,
  boolean,  ///< one byte an element, 0 is false
};

/// Bytes an element of `dtype` takes.
FLASHCORE_API std::size_t size_of(DType dtype) noexcept;
/// "float16", "bfloat16", …: the names used in every message.
FLASHCORE_API const char* name_of(DType dtype) noexcept;

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;  ///< CUDA ordinal; 0 for the CPU

  friend bool operator==(Device a, Device b) noexcept { return a.type == b.type && a.index == b.index; }
  friend bool operator!=(Device a, Device b) noexcept { return !(a == b); }
};

/// "cpu" or "cuda:0".
FLASHCORE_API std::string name_of(Device device);

/// Largest rank that a TensorView can hold.
inline constexpr int kMaxRank = 8;

/// A non-owning view of an array: an address, a dtype, a device, and a shape with strides counted in elements.
///
/// The memory belongs to the caller and must stay valid until the work queued on the stream is done. Strides may be
/// anything (zero for a broadcast input, negative for a reversed one) as long as the last dimension is contiguous
/// where a function asks for that; strides of dimensions of size 1 are ignored. `rank == -1` is "no tensor": the
/// value of every optional argument.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device = {};
  int rank = -1;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};

  /// A dense row-major view.
  FLASHCORE_API static TensorView contiguous(void* data, DType dtype, Device device,
                                             std::initializer_list<std::int64_t> shape);

  /// False for "no tensor".
  explicit operator bool() const noexcept { return rank >= 0; }

  std::int64_t numel() const noexcept {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

/// "float16 (2, 8, 512, 64) on cuda:0": for messages.
FLASHCORE_API std::string describe(const TensorView& tensor);

}  // namespace flashcore
