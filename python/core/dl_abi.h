// The DLPack 1.3 structures and the C exchange table that array libraries publish, declared for this module alone.
//
// Layouts follow the public specification (https://dmlc.github.io/dlpack): every field up to `version`, `flags` and
// `current_work_stream` is frozen by it.
#pragma once

#include <cstdint>

namespace flashcore::python::dl {

enum : std::int32_t { kCpu = 1, kCuda = 2 };
enum : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kFloat8E4M3FN = 10 };
inline constexpr std::uint64_t kReadOnly = 1;

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Device {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null means row-major
  std::uint64_t byte_offset;
};

struct ManagedTensor {  // capsule "dltensor"
  Tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor*);
};

struct ManagedTensorVersioned {  // capsule "dltensor_versioned"
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensorVersioned*);
  std::uint64_t flags;
  Tensor dl_tensor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* prev_api;  // an older table of the same library, or null
};

/// What `type(array).__dlpack_c_exchange_api__` points to. Functions return 0, or -1 with a Python error set.
struct ExchangeApi {
  ExchangeHeader header;
  int (*managed_tensor_allocator)(Tensor*, ManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, ManagedTensorVersioned**);
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensorVersioned*, void**);
  int (*dltensor_from_py_object_no_sync)(void*, Tensor*);  // borrowed; may be null
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace flashcore::python::dl
