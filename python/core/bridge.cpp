// Reading arrays: the C exchange table where a framework has one, `__dlpack__` otherwise.
#include "bridge.h"

#include <nanobind/stl/string.h>

#include "array.h"
#include "flashcore/dlpack.h"
#include "flashcore/error.h"

namespace flashcore::python {

namespace {

std::string qualified_name(nb::handle type) {
  return nb::cast<std::string>(type.attr("__module__")) + "." + nb::cast<std::string>(type.attr("__qualname__"));
}

/// The view of a DLTensor, as if of dtype `meant` if that is not empty. What is wrong is said of the argument `name`.
TensorView view_of(dl::Tensor tensor, const char* name, const std::string& meant) {
  try {
    if (!meant.empty()) tensor.dtype = dlpack_code(dtype_from_name(meant));
    return from_dlpack(tensor);
  } catch (const InvalidType& error) {
    throw InvalidType(std::string(name) + ": " + error.what());
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(std::string(name) + ": " + error.what());
  }
}

[[noreturn]] void refuse_write(const char* name, const std::string& why) {
  throw InvalidArgument(std::string(name) + " would be written, but " + why);
}

[[noreturn]] void refuse_type(const Bridge& bridge, nb::handle array, const char* name) {
  const std::string given = qualified_name(array.type());
  if (!nb::hasattr(array, "__dlpack__"))
    throw InvalidType(std::string(name) + ": " + given + " is not an array (it has no __dlpack__)");
  throw InvalidType(std::string(name) + " is a " + given + ", but the first array of the call is a " +
                    qualified_name(bridge.type) + "; all arrays of a call must come from one framework");
}

constexpr std::size_t kMaxKeywords = 2;

/// The keywords of `__dlpack__` in the form of a vector call.
void prepare_keywords(Bridge& bridge) {
  nb::list names;
  for (auto [name, value] : nb::borrow<nb::dict>(bridge.keywords)) {
    names.append(name);
    bridge.keyword_values.push_back(nb::borrow(value));
  }
  if (bridge.keyword_values.size() > kMaxKeywords) throw InvalidArgument("__dlpack__ is given 2 keywords at most");
  bridge.keyword_names = nb::tuple(names);
}

bool on_cuda(nb::handle array) {
  return nb::hasattr(array, "__dlpack_device__") && nb::cast<int>(array.attr("__dlpack_device__")()[0]) == dl::kCuda;
}

}  // namespace

const dl::ExchangeApi* exchange_api(nb::handle type) {
  nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (capsule.is_none()) return nullptr;
  auto* header = static_cast<dl::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!header) throw nb::python_error();
  while (header && header->version.major != 1) header = header->prev_api;
  auto* api = reinterpret_cast<dl::ExchangeApi*>(header);
  return api && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

nb::object ask(nb::handle function, nb::handle array) {
  PyObject* argument = array.ptr();
  nb::object answer = nb::steal(nb::detail::vectorcall(function.ptr(), &argument, 1, nullptr));
  if (!answer.is_valid()) throw nb::python_error();
  return answer;
}

Reader::Reader(const Bridge& bridge, nb::handle stream, Grads grads)
    : bridge_(bridge), stream_(stream), grads_(grads) {}

Stream Reader::stream(Device device) const {
  if (device.type == DeviceType::cpu) return nullptr;
  void* stream = nullptr;
  if (!stream_.is_none()) {
    stream = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(stream_));
  } else if (bridge_.api) {
    if (bridge_.api->current_work_stream(dl::kCuda, device.index, &stream) != 0) throw nb::python_error();
  } else if (!bridge_.current_stream.is_none()) {
    stream = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(bridge_.current_stream(device.index)));
  }
  return static_cast<Stream>(stream);
}

TensorView Reader::read(nb::handle array, const char* name, Access access) {
  if (array.is_none()) return {};
  auto* type = reinterpret_cast<PyTypeObject*>(bridge_.type.ptr());
  if (PyObject_TypeCheck(array.ptr(), type)) {
    if (access != Access::read && bridge_.immutable)
      refuse_write(name, "a " + qualified_name(bridge_.type) + " is immutable");
    if (access != Access::fresh && !bridge_.inspect.is_none()) inspect(array, access);
    return read_foreign(array, name, access);
  }
  if (nb::isinstance<Array>(array)) return nb::cast<const Array&>(array).view();
  refuse_type(bridge_, array, name);
}

/// Asks the two quick questions; what needs a closer look is the framework's own business.
void Reader::inspect(nb::handle array, Access access) const {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  bool suspect = ask(bridge_.is_negated, array).is(Py_True);
  if (!suspect && access == Access::read && grads_ == Grads::mentioned && bridge_.wary_of_grad) {
    const nb::object wants_grad = nb::steal(PyObject_GetAttr(array.ptr(), requires_grad));
    if (!wants_grad.is_valid()) throw nb::python_error();
    suspect = wants_grad.is(Py_True);
  }
  if (suspect) bridge_.inspect(array);
}

TensorView Reader::read_foreign(nb::handle array, const char* name, Access access) {
  if (std::optional<TensorView> view = try_export(array, name, access, {})) return *view;
  // The framework's second way: another array over the same memory, with the dtype that is really meant.
  nb::object answer = bridge_.reinterpret(array, name);
  std::optional<TensorView> view = try_export(answer[0], name, access, nb::cast<std::string>(answer[1]));
  if (!view) throw InvalidType(std::string(name) + ": the array cannot be exported by DLPack");
  keep(std::move(answer));
  return *view;
}

/// Nothing where the array refuses to be exported.
std::optional<TensorView> Reader::try_export(nb::handle array, const char* name, Access access,
                                             const std::string& meant) {
  if (bridge_.api) {
    dl::Tensor tensor{};
    if (bridge_.api->dltensor_from_py_object_no_sync(array.ptr(), &tensor) == 0) return view_of(tensor, name, meant);
    PyErr_Clear();
    return {};
  }
  nb::object capsule = call_dlpack(array);
  if (!capsule.is_valid()) return {};
  return read_capsule(std::move(capsule), name, access, meant);
}

/// A capsule that nobody consumes frees its tensor when it dies, so holding it is owning the tensor.
TensorView Reader::read_capsule(nb::object capsule, const char* name, Access access, const std::string& meant) {
  const dl::Tensor* tensor = nullptr;
  bool read_only = false;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<dl::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    tensor = &managed->dl_tensor;
    read_only = (managed->flags & dl::kReadOnly) != 0;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    tensor = &static_cast<dl::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->dl_tensor;
  } else {
    throw InvalidType(std::string(name) + ": __dlpack__ returned something that is not a DLPack capsule");
  }
  if (access != Access::read && read_only) refuse_write(name, "the array is read-only");
  const TensorView view = view_of(*tensor, name, meant);
  keep(std::move(capsule));
  return view;
}

/// Calls `__dlpack__`; an invalid object where the array refuses.
nb::object Reader::call_dlpack(nb::handle array) const {
  static PyObject* const method_name = PyUnicode_InternFromString("__dlpack__");
  nb::object capsule;
  if (bridge_.ordered && on_cuda(array)) {
    nb::dict keywords;
    keywords.update(nb::borrow<nb::dict>(bridge_.keywords));
    const std::int64_t stream = stream_.is_none() ? 0 : nb::cast<std::int64_t>(stream_);
    keywords["stream"] = stream == 0 ? 1 : stream;  // DLPack's word for the legacy default stream is 1
    const nb::object method = nb::steal(PyObject_GetAttr(array.ptr(), method_name));
    if (method.is_valid()) capsule = nb::steal(PyObject_Call(method.ptr(), nb::tuple().ptr(), keywords.ptr()));
  } else {
    PyObject* arguments[1 + kMaxKeywords] = {array.ptr()};
    for (std::size_t i = 0; i < bridge_.keyword_values.size(); ++i) arguments[1 + i] = bridge_.keyword_values[i].ptr();
    capsule = nb::steal(nb::detail::vectorcall_method(method_name, arguments, 1, bridge_.keyword_names.ptr()));
  }
  if (!capsule.is_valid() && PyErr_ExceptionMatches(PyExc_TypeError)) {  // an older library, without max_version
    PyErr_Clear();
    PyObject* self = array.ptr();
    capsule = nb::steal(nb::detail::vectorcall_method(method_name, &self, 1, nullptr));
  }
  if (!capsule.is_valid()) PyErr_Clear();
  return capsule;
}

/// Keeps an object until the reader goes.
void Reader::keep(nb::object owner) {
  if (owners_.empty()) owners_.reserve(8);
  owners_.push_back(std::move(owner));
}

void bind_bridge(nb::module_& m) {
  nb::class_<Bridge>(m, "Bridge", "How the arrays of one framework are read.")
      .def(
          "__init__",
          [](Bridge* self, nb::object type, nb::dict keywords, nb::object reinterpret, nb::object empty,
             nb::object dtypes, nb::object current_stream, nb::object empty_like, nb::object inspect,
             nb::object is_negated, bool exchange, bool ordered, bool immutable) {
            new (self) Bridge{.type = type,
                              .keywords = keywords,
                              .reinterpret = reinterpret,
                              .current_stream = current_stream,
                              .empty = empty,
                              .dtypes = dtypes,
                              .empty_like = empty_like,
                              .inspect = inspect,
                              .is_negated = is_negated,
                              .api = exchange ? exchange_api(type) : nullptr,
                              .ordered = ordered,
                              .immutable = immutable,
                              .wary_of_grad = !inspect.is_none()};
            prepare_keywords(*self);
          },
          nb::arg("type"), nb::arg("keywords"), nb::arg("reinterpret"), nb::arg("empty"),
          nb::arg("dtypes").none() = nb::none(), nb::arg("current_stream").none() = nb::none(),
          nb::arg("empty_like").none() = nb::none(), nb::arg("inspect").none() = nb::none(),
          nb::arg("is_negated").none() = nb::none(), nb::arg("exchange") = false, nb::arg("ordered") = false,
          nb::arg("immutable") = false,
          nb::sig("def __init__(self, type: type, keywords: dict[str, object], reinterpret: object, empty: object, "
                  "dtypes: object = None, current_stream: object = None, empty_like: object = None, inspect: object = "
                  "None, "
                  "is_negated: object = None, exchange: bool = False, ordered: bool = False, "
                  "immutable: bool = False) -> None"))
      .def_rw("wary_of_grad", &Bridge::wary_of_grad)
      .def_prop_ro("has_exchange_api", [](const Bridge& self) { return self.api != nullptr; })
      .def(
          "describe",
          [](const Bridge& self, nb::handle array, const char* name) {
            const nb::int_ in_no_order(-1);  // what an array is does not wait for what lies in it
            Reader reader(self, in_no_order);
            const TensorView view = reader.read(array, name);
            nb::list shape;
            for (int i = 0; i < view.rank; ++i) shape.append(view.shape[i]);
            return nb::make_tuple(nb::tuple(shape), name_of(view.dtype), view.device.type == DeviceType::cuda,
                                  view.device.index);
          },
          nb::arg("array"), nb::arg("name"),
          nb::sig("def describe(self, array: object, name: str) -> tuple[tuple[int, ...], str, bool, int]"),
          "(shape, dtype name, on CUDA, device index) of an array");
}

}  // namespace flashcore::python
