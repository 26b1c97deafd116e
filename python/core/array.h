// Array: memory that flashcore owns, for callers whose framework cannot allocate results. Any DLPack consumer reads it.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dl_abi.h"
#include "flashcore/memory.h"
#include "flashcore/tensor.h"

namespace flashcore::python {

namespace nb = nanobind;

class Array {
 public:
  /// A dense array from flashcore's pool, first used by work on `stream`.
  Array(const std::vector<std::int64_t>& shape, DType dtype, Device device, Stream stream);

  const TensorView& view() const { return view_; }
  nb::tuple shape() const;

  /// `stream` as DLPack defines it: where it is another stream than the array's own, the work on the array is waited
  /// for; -1 asks for nothing.
  nb::object dlpack(nb::handle stream, nb::handle max_version, nb::handle dl_device, nb::handle copy) const;
  nb::tuple dlpack_device() const;

 private:
  void order_before(nb::handle stream) const;

  std::shared_ptr<Buffer> memory_;
  TensorView view_;
  Stream stream_;
};

/// "float32" -> DType::float32, …: the names of name_of(), and the "fn" spelling of float8. Throws InvalidType.
DType dtype_from_name(std::string_view name);

/// How DLPack writes a dtype.
dl::DataType dlpack_code(DType dtype);

void bind_array(nb::module_& m);

}  // namespace flashcore::python
