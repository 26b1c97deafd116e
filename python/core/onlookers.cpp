// Onlookers: whether anything of torch looks on at a call, asked of torch itself, and which road the call takes then.

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bridge.h"
#include "flashcore/error.h"

namespace flashcore::python {

namespace {

enum class Road { operators, library, autograd };

class Onlookers {
 public:
  /// `questions` are pairs (function, what it answers while nobody looks on); `level` is a name in the module's dict
  /// `forward_ad`, negative while no dual numbers are about.
  Onlookers(nb::object types, const nb::list& questions, nb::dict forward_ad, nb::object level, nb::object recording)
      : types_(std::move(types)),
        forward_ad_(std::move(forward_ad)),
        level_(std::move(level)),
        recording_(std::move(recording)) {
    for (const nb::handle question : questions)
      questions_.push_back({nb::borrow(question[0]), nb::borrow(question[1])});
  }

  /// Of a call with these tensors, a tuple. None is no tensor; the first has to be one.
  Road road(nb::handle tensors) const {
    if (!are_plain(tensors) || somebody_looks_on()) return Road::operators;
    if (ask(recording_).is(Py_False)) return Road::library;
    for (Py_ssize_t i = 0; i < PyTuple_Size(tensors.ptr()); ++i) {
      const nb::handle tensor = PyTuple_GetItem(tensors.ptr(), i);
      if (!tensor.is_none() && is_set(tensor, requires_grad_)) return Road::autograd;
    }
    return Road::library;
  }

 private:
  struct Question {
    nb::object function;
    nb::object quiet;
  };

  static bool is_set(nb::handle tensor, nb::handle attribute) {
    const nb::object value = nb::steal(PyObject_GetAttr(tensor.ptr(), attribute.ptr()));
    if (!value.is_valid()) throw nb::python_error();
    return value.is(Py_True);
  }

  static nb::object ask(nb::handle function) {
    nb::object answer = nb::steal(nb::detail::vectorcall(function.ptr(), nullptr, 0, nullptr));
    if (!answer.is_valid()) throw nb::python_error();
    return answer;
  }

  /// Tensors of torch's own types, with memory.
  bool are_plain(nb::handle tensors) const {
    if (!PyTuple_Check(tensors.ptr()) || PyTuple_Size(tensors.ptr()) == 0) throw InvalidType("a tuple is needed");
    for (Py_ssize_t i = 0; i < PyTuple_Size(tensors.ptr()); ++i) {
      const nb::handle tensor = PyTuple_GetItem(tensors.ptr(), i);
      if (tensor.is_none() ? i == 0 : PySet_Contains(types_.ptr(), tensor.type().ptr()) != 1) return false;
    }
    return !is_set(PyTuple_GetItem(tensors.ptr(), 0), is_meta_);
  }

  bool somebody_looks_on() const {
    const auto is_quiet = [](const Question& question) { return ask(question.function).is(question.quiet); };
    if (!std::all_of(questions_.begin(), questions_.end(), is_quiet)) return true;
    PyObject* level = PyDict_GetItem(forward_ad_.ptr(), level_.ptr());
    return !level || PyLong_AsLong(level) >= 0;
  }

  nb::object types_;
  std::vector<Question> questions_;
  nb::dict forward_ad_;
  nb::object level_;
  nb::object recording_;
  nb::object requires_grad_ = nb::steal(PyUnicode_InternFromString("requires_grad"));
  nb::object is_meta_ = nb::steal(PyUnicode_InternFromString("is_meta"));
};

/// Four dimensions, the same batch and heads, dense rows: nothing to broadcast, nothing to copy.
bool are_alike(const Bridge& bridge, nb::handle q_array, nb::handle k_array, nb::handle v_array) {
  Reader reader(bridge, nb::none());
  const auto form_of = [&](nb::handle array) { return reader.read(array, "tensor", Access::fresh); };
  const TensorView q = form_of(q_array);
  for (const TensorView& t : {q, form_of(k_array), form_of(v_array)}) {
    if (t.rank != 4 || t.shape[0] != q.shape[0] || t.shape[1] != q.shape[1]) return false;
    if (t.stride[3] != 1 && t.shape[3] != 1) return false;
  }
  return true;
}

}  // namespace

void bind_onlookers(nb::module_& m) {
  nb::class_<Onlookers>(m, "Onlookers", "Who may look on at a call of torch tensors.")
      .def(nb::init<nb::object, const nb::list&, nb::dict, nb::object, nb::object>(), nb::arg("types"),
           nb::arg("questions"), nb::arg("forward_ad"), nb::arg("level"), nb::arg("recording"),
           nb::sig("def __init__(self, types: frozenset[type], questions: list[tuple[object, object]], "
                   "forward_ad: dict[str, object], level: str, recording: object) -> None"))
      .def(
          "road", [](const Onlookers& self, nb::handle tensors) { return static_cast<int>(self.road(tensors)); },
          nb::arg("tensors"), nb::sig("def road(self, tensors: tuple[object, ...]) -> int"),
          "0: by the operators, since somebody looks on. 1: to the library itself. 2: by autograd, since a gradient "
          "is recorded.");
  m.def("are_alike", &are_alike, nb::arg("bridge"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
        "Whether three arrays have four dimensions, the same batch and heads, and dense rows.");
}

}  // namespace flashcore::python
