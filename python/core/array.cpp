// The owning array and its DLPack export.
#include "array.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "dl_abi.h"
#include "flashcore/device.h"
#include "flashcore/error.h"

namespace flashcore::python {

namespace {

struct DTypeRow {
  DType dtype;
  dl::DataType code;
};

constexpr DTypeRow kDTypes[] = {
    {DType::float16, {dl::kFloat, 16, 1}},
    {DType::bfloat16, {dl::kBfloat, 16, 1}},
    {DType::float32, {dl::kFloat, 32, 1}},
    {DType::float64, {dl::kFloat, 64, 1}},
    {DType::float8_e4m3, {dl::kFloat8E4M3FN, 8, 1}},
    {DType::int32, {dl::kInt, 32, 1}},
    {DType::int64, {dl::kInt, 64, 1}},
    {DType::boolean, {dl::kBool, 8, 1}},
};

/// What a capsule owns: the memory, and the shape that its DLTensor points to.
template <class Managed>
struct Export {
  Managed managed{};
  std::shared_ptr<Buffer> memory;
  TensorView view;
};

template <class Managed>
nb::object make_capsule(const std::shared_ptr<Buffer>& memory, const TensorView& view, const char* name) {
  auto* exported = new Export<Managed>{{}, memory, view};
  Managed& managed = exported->managed;
  managed.manager_ctx = exported;
  managed.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->manager_ctx); };
  if constexpr (std::is_same_v<Managed, dl::ManagedTensorVersioned>) managed.version = {1, 0};
  const bool cuda = view.device.type == DeviceType::cuda;
  managed.dl_tensor = {view.data,
                       {cuda ? dl::kCuda : dl::kCpu, view.device.index},
                       view.rank,
                       dlpack_code(view.dtype),
                       exported->view.shape.data(),
                       exported->view.stride.data(),
                       0};
  PyObject* capsule = PyCapsule_New(&managed, name, [](PyObject* self) {
    constexpr bool versioned = std::is_same_v<Managed, dl::ManagedTensorVersioned>;
    const char* unused = versioned ? "dltensor_versioned" : "dltensor";
    if (!PyCapsule_IsValid(self, unused)) return;  // a consumer renamed the capsule and owns the tensor now
    auto* tensor = static_cast<Managed*>(PyCapsule_GetPointer(self, unused));
    tensor->deleter(tensor);
  });
  if (!capsule) {
    delete exported;
    throw nb::python_error();
  }
  return nb::steal(capsule);
}

std::size_t bytes_of(const std::vector<std::int64_t>& shape, DType dtype) {
  std::size_t bytes = size_of(dtype);
  for (std::int64_t n : shape) {
    if (n < 0) throw InvalidArgument("negative size " + std::to_string(n) + " in an array's shape");
    bytes *= static_cast<std::size_t>(n);
  }
  return bytes;
}

}  // namespace

dl::DataType dlpack_code(DType dtype) {
  for (const DTypeRow& row : kDTypes)
    if (row.dtype == dtype) return row.code;
  throw InvalidType("dtype without a DLPack code");
}

DType dtype_from_name(std::string_view name) {
  if (name == "float8_e4m3fn") return DType::float8_e4m3;
  if (name == "bool") return DType::boolean;
  for (const DTypeRow& row : kDTypes)
    if (name == name_of(row.dtype)) return row.dtype;
  throw InvalidType("dtype " + std::string(name) + " is not one that flashcore knows");
}

Array::Array(const std::vector<std::int64_t>& shape, DType dtype, Device device, Stream stream) : stream_(stream) {
  if (shape.size() > static_cast<std::size_t>(kMaxRank))
    throw InvalidArgument("array of rank " + std::to_string(shape.size()) + "; at most 8 is allowed");
  memory_ = std::make_shared<Buffer>(bytes_of(shape, dtype), device, stream);
  view_.data = memory_->data();
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t dense = 1;
  for (int i = view_.rank - 1; i >= 0; --i) {
    view_.shape[i] = shape[i];
    view_.stride[i] = dense;
    dense *= shape[i];
  }
}

nb::tuple Array::shape() const {
  nb::list sizes;
  for (int i = 0; i < view_.rank; ++i) sizes.append(view_.shape[i]);
  return nb::tuple(sizes);
}

void Array::order_before(nb::handle stream) const {
  if (view_.device.type == DeviceType::cpu) return;
  const std::int64_t asked = stream.is_none() ? 1 : nb::cast<std::int64_t>(stream);
  if (asked == -1) return;
  const auto consumer = static_cast<std::uintptr_t>(asked == 1 ? 0 : asked);
  const auto own = reinterpret_cast<std::uintptr_t>(stream_);
  if (consumer == (own == 1 ? 0 : own)) return;
  nb::gil_scoped_release release;
  synchronize(view_.device, stream_);
}

nb::object Array::dlpack(nb::handle stream, nb::handle max_version, nb::handle dl_device, nb::handle copy) const {
  if (!copy.is_none() && nb::cast<bool>(copy)) throw nb::buffer_error("flashcore.Array does not copy itself");
  if (!dl_device.is_none() && !nb::borrow(dl_device).equal(dlpack_device()))
    throw nb::buffer_error("flashcore.Array does not move to another device");
  order_before(stream);
  if (!max_version.is_none() && nb::cast<int>(max_version[0]) >= 1)
    return make_capsule<dl::ManagedTensorVersioned>(memory_, view_, "dltensor_versioned");
  return make_capsule<dl::ManagedTensor>(memory_, view_, "dltensor");
}

nb::tuple Array::dlpack_device() const {
  return nb::make_tuple(static_cast<int>(view_.device.type == DeviceType::cuda ? dl::kCuda : dl::kCpu),
                        view_.device.index);
}

void bind_array(nb::module_& m) {
  nb::class_<Array>(m, "Array",
                    "Memory that flashcore owns. Read it with any library's from_dlpack: "
                    "numpy.from_dlpack(array), torch.from_dlpack(array), …")
      .def_prop_ro("shape", &Array::shape, nb::for_getter(nb::sig("def shape(self) -> tuple[int, ...]")))
      .def_prop_ro(
          "address", [](const Array& self) { return reinterpret_cast<std::uintptr_t>(self.view().data); },
          "Where it lies in its device's memory.")
      .def_prop_ro("dtype", [](const Array& self) { return name_of(self.view().dtype); })
      .def_prop_ro("device", [](const Array& self) { return name_of(self.view().device); })
      .def("__dlpack__", &Array::dlpack, nb::kw_only(), nb::arg("stream").none() = nb::none(),
           nb::arg("max_version").none() = nb::none(), nb::arg("dl_device").none() = nb::none(),
           nb::arg("copy").none() = nb::none())
      .def("__dlpack_device__", &Array::dlpack_device, nb::sig("def __dlpack_device__(self) -> tuple[int, int]"))
      .def("__repr__", [](const Array& self) { return "flashcore.Array: " + describe(self.view()); });
  m.def(
      "empty",
      [](const std::vector<std::int64_t>& shape, std::string_view dtype, bool cuda, int index, std::uintptr_t stream) {
        return Array(shape, dtype_from_name(dtype), {cuda ? DeviceType::cuda : DeviceType::cpu, index},
                     reinterpret_cast<Stream>(stream));
      },
      nb::arg("shape"), nb::arg("dtype"), nb::arg("cuda") = false, nb::arg("index") = 0, nb::arg("stream") = 0,
      "An uninitialised array from flashcore's pool.");
}

}  // namespace flashcore::python
