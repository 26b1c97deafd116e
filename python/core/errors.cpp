// The library's exceptions as Python exceptions.
#include "flashcore/error.h"

#include <nanobind/stl/string.h>

#include <string>

#include "bindings.h"

namespace flashcore::python {

namespace nb = nanobind;

namespace {

PyObject* unsupported_type = nullptr;
PyObject* cuda_error_type = nullptr;

void raise_cuda_error(const CudaError& error) {
  nb::object instance = nb::steal(PyObject_CallFunction(cuda_error_type, "s", error.what()));
  if (!instance.is_valid()) return;
  instance.attr("code") = error.code();
  PyErr_SetObject(cuda_error_type, instance.ptr());
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const InvalidType& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const InvalidArgument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const Unsupported& error) {
    PyErr_SetString(unsupported_type, error.what());
  } catch (const CudaError& error) {
    raise_cuda_error(error);
  } catch (const OutOfMemory& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  }
}

}  // namespace

void bind_errors(nb::module_& m) {
  const auto module_name = nb::cast<std::string>(m.attr("__name__"));
  unsupported_type = PyErr_NewExceptionWithDoc(
      (module_name + ".Unsupported").c_str(),
      "The call is valid, but no kernel of this build runs it on this device. The message gives every kernel's reason.",
      PyExc_RuntimeError, nullptr);
  cuda_error_type = PyErr_NewExceptionWithDoc((module_name + ".CudaError").c_str(),
                                              "The CUDA runtime reported an error; `code` is its number.",
                                              PyExc_RuntimeError, nullptr);
  if (!unsupported_type || !cuda_error_type) throw nb::python_error();
  m.attr("Unsupported") = nb::borrow(unsupported_type);
  m.attr("CudaError") = nb::borrow(cuda_error_type);
  nb::register_exception_translator(translate);
}

}  // namespace flashcore::python
