// DType, Device and TensorView in words, and what DLPack calls them.
#include "flashcore/tensor.h"

#include <iterator>

#include "flashcore/dlpack.h"
#include "flashcore/error.h"

namespace flashcore {

std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::float8_e4m3:
    case DType::boolean:
      return 1;
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float64:
    case DType::int64:
      return 8;
  }
  return 0;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::float8_e4m3:
      return "float8_e4m3";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::boolean:
      return "boolean";
  }
  return "unknown dtype";
}

std::string name_of(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string describe(const TensorView& tensor) {
  if (!tensor) return "no tensor";
  std::string text = std::string(name_of(tensor.dtype)) + " (";
  for (int i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + (tensor.rank == 1 ? ",) on " : ") on ") + name_of(tensor.device);
}

TensorView TensorView::contiguous(void* data, DType dtype, Device device, std::initializer_list<std::int64_t> shape) {
  if (shape.size() > static_cast<std::size_t>(kMaxRank))
    throw InvalidArgument("tensor of rank " + std::to_string(shape.size()) + " given; at most rank " +
                          std::to_string(kMaxRank) + " is allowed");
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.device = device;
  for (view.rank = 0; const std::int64_t size : shape) view.shape[view.rank++] = size;
  std::int64_t dense = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.shape[i] < 0) throw InvalidArgument("a dimension of negative size given: " + describe(view));
    view.stride[i] = dense;
    dense *= view.shape[i];
  }
  return view;
}

namespace detail {
namespace {

struct DLPackType {
  int code;
  int bits;
  DType dtype;
};

constexpr DLPackType kDLPackTypes[] = {
    {2, 16, DType::float16},     {4, 16, DType::bfloat16}, {2, 32, DType::float32}, {2, 64, DType::float64},
    {10, 8, DType::float8_e4m3}, {0, 32, DType::int32},    {0, 64, DType::int64},   {6, 8, DType::boolean},
};

/// "uint8", or the bare code where it has no common name.
std::string dlpack_name(int code, int bits) {
  static constexpr const char* kCodes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  static constexpr const char* kSmallFloats[] = {
      // their codes follow, and tell the bits
      "float8_e3m4",     "float8_e4m3",    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
      "float8_e5m2fnuz", "float8_e8m0fnu", "float6_e2m3fn",      "float6_e3m2fn", "float4_e2m1fn"};
  if (code >= 0 && code < 7) return kCodes[code] + std::to_string(bits);
  if (code >= 7 && code < 7 + static_cast<int>(std::size(kSmallFloats))) return kSmallFloats[code - 7];
  return "DLPack type code " + std::to_string(code) + " of " + std::to_string(bits) + " bits";
}

}  // namespace

DType dtype_from_dlpack(int code, int bits, int lanes) {
  for (const DLPackType& type : kDLPackTypes)
    if (lanes == 1 && type.code == code && type.bits == bits) return type.dtype;
  std::string known;
  for (const DLPackType& type : kDLPackTypes) known += (known.empty() ? "" : ", ") + std::string(name_of(type.dtype));
  throw InvalidType("array of " + dlpack_name(code, bits) +
                    (lanes == 1 ? "" : " in vectors of " + std::to_string(lanes) + " lanes") +
                    " given; flashcore knows " + known);
}

Device device_from_dlpack(int device_type, int device_id) {
  enum { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };  // DLDeviceType
  switch (device_type) {
    case kCpu:
    case kCudaHost:
      return {DeviceType::cpu, 0};
    case kCuda:
    case kCudaManaged:
      return {DeviceType::cuda, device_id};
    default:
      throw InvalidArgument("array on DLPack device type " + std::to_string(device_type) +
                            " given; flashcore knows the CPU (1), CUDA (2), pinned host memory (3) and CUDA managed "
                            "memory (13)");
  }
}

}  // namespace detail
}  // namespace flashcore
