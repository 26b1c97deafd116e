// `flashcore.attention` as a callable that makes the plainest calls itself: three arrays and no more than causal,
// scale, layout, return_lse, out and lse. Others, and those that fail, go to the Python function, which knows every
// option and error.
#include "shortcut.h"

#include <structmember.h>

#include <cstddef>
#include <exception>

#include "words.h"

namespace flashcore::python {

namespace {

using VectorCall = PyObject* (*)(PyObject*, PyObject* const*, std::size_t, PyObject*);
// Both are CPython's since 3.8, but in the headers of the limited API only from 3.12 on.
constexpr unsigned long kHaveVectorCall = 1ul << 11;
constexpr Py_ssize_t kArrays = 3;

struct Shortcut {
  PyObject ob_base;
  VectorCall vectorcall;
  PyObject* attributes;
  PyObject* weak_references;
  PyObject* function;
  PyObject* known;        // type -> Framework
  PyObject* bridge_name;  // of the framework's bridge, among its attributes
  PyTypeObject* type;     // the type last looked up there, and its bridge
  PyObject* bridge;
  const Bridge* native;  // null where the framework's results need finishing in Python
};

/// The bridge of arrays of `type`; null where the call is not for the shortcut.
const Bridge* bridge_of(Shortcut& self, PyTypeObject* type) {
  if (type == self.type) return self.native;
  PyObject* framework = PyDict_GetItem(self.known, reinterpret_cast<PyObject*>(type));
  if (!framework) return nullptr;
  nb::object bridge = nb::handle(framework).attr(nb::handle(self.bridge_name));
  self.native = &nb::cast<const Bridge&>(bridge);
  if (self.native->immutable) self.native = nullptr;
  Py_INCREF(type);
  nb::object old_type = nb::steal(reinterpret_cast<PyObject*>(self.type));
  nb::object old_bridge = nb::steal(self.bridge);
  self.type = type;
  self.bridge = bridge.release().ptr();
  return self.native;
}

bool read_flag(nb::handle value, bool& flag) {
  flag = value.is(Py_True);
  return flag || value.is(Py_False);
}

bool take(nb::handle value, nb::handle& target) {
  target = value;
  return true;
}

/// Reads what stands beside the arrays; false where that is more than the shortcut knows.
bool read_words(PyObject* names, PyObject* const* values, AttentionOptions& options, Wanted& wanted) {
  static const PyObject* const causal = interned("causal");
  static const PyObject* const scale = interned("scale");
  static const PyObject* const layout = interned("layout");
  static const PyObject* const return_lse = interned("return_lse");
  static const PyObject* const out = interned("out");
  static const PyObject* const lse = interned("lse");
  const Py_ssize_t count = names ? PyTuple_Size(names) : 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const PyObject* name = PyTuple_GetItem(names, i);
    const nb::handle value = values[i];
    const bool known = name == causal       ? read_causal(value, options.mask)
                       : name == scale      ? read_scale(value, options.scale)
                       : name == layout     ? read_layout(value, options.layout)
                       : name == return_lse ? read_flag(value, wanted.with_lse)
                       : name == out        ? take(value, wanted.out)
                       : name == lse        ? take(value, wanted.lse)
                                            : false;
    if (!known) return false;
  }
  wanted.layout = options.layout;
  return true;
}

/// Makes the call; an invalid object where it is not for the shortcut.
nb::object call_directly(Shortcut& self, PyObject* const* args, Py_ssize_t positional, PyObject* names) {
  if (positional != kArrays || args[1] == Py_None || args[2] == Py_None) return {};
  const Bridge* bridge = bridge_of(self, Py_TYPE(args[0]));
  AttentionOptions options;
  Wanted wanted{.out = Py_None, .lse = Py_None};
  if (!bridge || !read_words(names, args + kArrays, options, wanted)) return {};
  Reader reader(*bridge, nb::none(), Grads::mentioned);
  return attend(reader, read_qkv(reader, args[0], args[1], args[2]), args[0], wanted, options);
}

PyObject* call(PyObject* callable, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  auto& self = *reinterpret_cast<Shortcut*>(callable);
  try {
    nb::object result = call_directly(self, args, NB_VECTORCALL_NARGS(nargsf), names);
    if (result.is_valid()) return result.release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception&) {
    // A refused call has written nothing: the Python function meets the same error, and says it.
  }
  return nb::detail::vectorcall(self.function, args, nargsf, names);
}

PyObject* call_function(PyObject* self, PyObject* args, PyObject* keywords) {
  return PyObject_Call(reinterpret_cast<Shortcut*>(self)->function, args, keywords);
}

PyObject* describe_function(PyObject* self) { return PyObject_Repr(reinterpret_cast<Shortcut*>(self)->function); }

/// Having `__get__` makes `help` and `inspect` take it for the routine it is; like a builtin, it binds to nothing.
PyObject* get_from_class(PyObject* self, PyObject*, PyObject*) { return Py_NewRef(self); }

/// Pickled as functions are: by name.
PyObject* reduce(PyObject* self, PyObject*) { return PyObject_GetAttrString(self, "__qualname__"); }

PyMethodDef methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr}, {}};
PyGetSetDef properties[] = {{"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr}, {}};
PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Shortcut, vectorcall), READONLY, nullptr},
                         {"__dictoffset__", T_PYSSIZET, offsetof(Shortcut, attributes), READONLY, nullptr},
                         {"__weaklistoffset__", T_PYSSIZET, offsetof(Shortcut, weak_references), READONLY, nullptr},
                         {}};

template <class Function>
void* slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

nb::object new_type() {
  PyType_Slot slots[] = {{Py_tp_call, slot(call_function)},
                         {Py_tp_repr, slot(describe_function)},
                         {Py_tp_descr_get, slot(get_from_class)},
                         {Py_tp_methods, methods},
                         {Py_tp_getset, properties},
                         {Py_tp_members, members},
                         {}};
  PyType_Spec spec = {"flashcore._core.Shortcut", sizeof(Shortcut), 0, Py_TPFLAGS_DEFAULT | kHaveVectorCall, slots};
  nb::object type = nb::steal(PyType_FromSpec(&spec));
  if (!type.is_valid()) throw nb::python_error();
  return type;
}

/// Lives as long as the function it stands for: for ever.
nb::object shortcut(nb::object function, nb::dict known, nb::object bridge) {
  static const nb::object type = new_type();
  nb::object object = nb::steal(PyType_GenericAlloc(reinterpret_cast<PyTypeObject*>(type.ptr()), 0));
  if (!object.is_valid()) throw nb::python_error();
  auto& self = *reinterpret_cast<Shortcut*>(object.ptr());
  self.vectorcall = call;
  self.function = function.release().ptr();
  self.known = known.release().ptr();
  self.bridge_name = bridge.release().ptr();
  return object;
}

}  // namespace

void bind_shortcut(nb::module_& m) {
  m.def(
      "shortcut", &shortcut, nb::arg("function"), nb::arg("known"), nb::arg("bridge"),
      nb::sig("def shortcut(function: object, known: object, bridge: str) -> object"),
      "`function`, which is `flashcore.attention`, with its plainest calls made without entering Python, by the bridge "
      "that a framework has under this name");
}

}  // namespace flashcore::python
