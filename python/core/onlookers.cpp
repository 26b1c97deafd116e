// Onlookers: whether anything of torch looks on at a call, asked of torch itself; which road the call takes then; and
// the plainest calls made at once, where nothing does.

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bridge.h"
#include "flashcore/error.h"
#include "shortcut.h"
#include "words.h"

namespace flashcore::python {

namespace {

enum class Road { operators, library, autograd };

/// What is asked of the tensors of a call. Alike: four dimensions, the same batch and heads, dense rows, so that there
/// is nothing to broadcast, and nothing to copy.
enum class Form { any, alike };

bool are_alike(const AttentionInputs& in) {
  for (const TensorView* t : {&in.q, &in.k, &in.v}) {
    if (t->rank != 4 || t->shape[0] != in.q.shape[0] || t->shape[1] != in.q.shape[1]) return false;
    if (t->stride[3] != 1 && t->shape[3] != 1) return false;
  }
  return true;
}

/// Whether the heads of a row lie together, as in a (batch, seq, heads, dim) tensor that was transposed.
bool lies_by_rows(const TensorView& q) { return q.stride[1] < q.stride[2]; }

/// A call of three tensors and no more than these words.
struct PlainCall {
  nb::handle q, k, v;
  nb::handle causal, scale, layout;
};

class Onlookers {
 public:
  /// `types` are torch's own; `questions` are pairs (function, what it answers while nobody looks on); `casts` answers
  /// True under autocast; `level` is a name in the module's dict `forward_ad`, negative without dual numbers.
  Onlookers(nb::object bridge, nb::tuple types, const nb::list& questions, nb::object casts, nb::dict forward_ad,
            nb::object level, nb::object recording)
      : bridge_object_(std::move(bridge)),
        bridge_(nb::cast<const Bridge&>(bridge_object_)),
        types_(std::move(types)),
        casts_(std::move(casts)),
        forward_ad_(std::move(forward_ad)),
        level_(std::move(level)),
        recording_(std::move(recording)) {
    for (const nb::handle question : questions)
      questions_.push_back({nb::borrow(question[0]), nb::borrow(question[1])});
  }

  /// Of a call with these tensors, a tuple. None is no tensor; the first has to be one.
  Road road(nb::handle tensors) const {
    if (!PyTuple_Check(tensors.ptr()) || PyTuple_Size(tensors.ptr()) == 0) throw InvalidType("a tuple is needed");
    std::vector<nb::handle> given;
    given.reserve(static_cast<std::size_t>(PyTuple_Size(tensors.ptr())));
    for (Py_ssize_t i = 0; i < PyTuple_Size(tensors.ptr()); ++i) {
      const nb::handle tensor = PyTuple_GetItem(tensors.ptr(), i);
      if (!tensor.is_none() || i == 0) given.push_back(tensor);
    }
    const Road road = road_with_memory(given.data(), given.data() + given.size());
    return road != Road::operators && is_meta(given[0]) ? Road::operators : road;
  }

  /// Makes the call and returns out, where it goes to the library itself. True where a gradient is to be recorded
  /// instead; None where it is not for this, or is refused. With Form::alike both of them only for tensors that are so;
  /// out is laid out as q then.
  nb::object attend(const PlainCall& call, Form form) const {
    AttentionOptions options;
    const bool known = read_causal(call.causal, options.mask) && read_layout(call.layout, options.layout);
    if (!known || ask(casts_).is(Py_True)) return nb::none();
    const nb::handle tensors[] = {call.q, call.k, call.v};
    const Road road = road_with_memory(std::begin(tensors), std::end(tensors));  // reading those without fails
    if (road == Road::operators) return nb::none();
    if (road == Road::autograd && form == Form::any) return is_meta(call.q) ? nb::none() : nb::object(nb::bool_(true));
    if (road == Road::library && !read_scale(call.scale, options.scale)) return nb::none();
    try {
      Reader reader(bridge_, nb::none());
      const AttentionInputs in = read_qkv(reader, call.q, call.k, call.v);
      if (form == Form::alike && !are_alike(in)) return nb::none();
      if (road == Road::autograd) return nb::bool_(true);
      const nb::object by_rows = form == Form::alike && lies_by_rows(in.q) ? empty_like(call.q) : nb::none();
      const Wanted wanted{.out = by_rows, .lse = Py_None, .layout = options.layout};
      return python::attend(reader, in, call.q, wanted, options);
    } catch (const nb::python_error&) {
      throw;
    } catch (const std::exception&) {
      return nb::none();  // nothing is written yet; the long road meets the same error, and says it
    }
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

  bool is_meta(nb::handle tensor) const { return is_set(tensor, is_meta_); }

  /// Of tensors that have memory.
  Road road_with_memory(const nb::handle* first, const nb::handle* end) const {
    if (!std::all_of(first, end, [this](nb::handle tensor) { return is_of_own_type(tensor); })) return Road::operators;
    if (somebody_looks_on()) return Road::operators;
    if (ask(recording_).is(Py_False)) return Road::library;
    const auto wants_grad = [this](nb::handle tensor) { return is_set(tensor, requires_grad_); };
    return std::any_of(first, end, wants_grad) ? Road::autograd : Road::library;
  }

  nb::object empty_like(nb::handle tensor) const { return python::ask(bridge_.empty_like, tensor); }

  bool is_of_own_type(nb::handle tensor) const {
    for (Py_ssize_t i = 0; i < PyTuple_Size(types_.ptr()); ++i)
      if (tensor.type().is(PyTuple_GetItem(types_.ptr(), i))) return true;
    return false;
  }

  bool somebody_looks_on() const {
    const auto is_quiet = [](const Question& question) { return ask(question.function).is(question.quiet); };
    if (!std::all_of(questions_.begin(), questions_.end(), is_quiet)) return true;
    PyObject* level = PyDict_GetItem(forward_ad_.ptr(), level_.ptr());
    return !level || PyLong_AsLong(level) >= 0;
  }

  nb::object bridge_object_;
  const Bridge& bridge_;
  nb::tuple types_;
  std::vector<Question> questions_;
  nb::object casts_;
  nb::dict forward_ad_;
  nb::object level_;
  nb::object recording_;
  nb::object requires_grad_ = nb::steal(PyUnicode_InternFromString("requires_grad"));
  nb::object is_meta_ = nb::steal(PyUnicode_InternFromString("is_meta"));
};

}  // namespace

void bind_onlookers(nb::module_& m) {
  nb::class_<Onlookers>(m, "Onlookers", "Who may look on at a call of torch tensors.")
      .def(
          nb::init<nb::object, nb::tuple, const nb::list&, nb::object, nb::dict, nb::object, nb::object>(),
          nb::arg("bridge"), nb::arg("types"), nb::arg("questions"), nb::arg("casts"), nb::arg("forward_ad"),
          nb::arg("level"), nb::arg("recording"),
          nb::sig("def __init__(self, bridge: Bridge, types: tuple[type, ...], questions: list[tuple[object, object]], "
                  "casts: object, forward_ad: dict[str, object], level: str, recording: object) -> None"))
      .def(
          "road", [](const Onlookers& self, nb::handle tensors) { return static_cast<int>(self.road(tensors)); },
          nb::arg("tensors"), nb::sig("def road(self, tensors: tuple[object, ...]) -> int"),
          "0: by the operators, since somebody looks on. 1: to the library itself. 2: by autograd, since a gradient "
          "is recorded.")
      .def(
          "attend",
          [](const Onlookers& self, nb::handle q, nb::handle k, nb::handle v, nb::handle causal, nb::handle scale,
             nb::handle layout) { return self.attend({q, k, v, causal, scale, layout}, Form::any); },
          nb::arg("q").none(), nb::arg("k").none(), nb::arg("v").none(), nb::arg("causal").none(),
          nb::arg("scale").none(), nb::arg("layout").none(),
          nb::sig("def attend(self, q: object, k: object, v: object, causal: object, scale: object, layout: object) "
                  "-> object"),
          "out of a call that goes to the library itself; True where its gradient is to be recorded; None for every "
          "other call, and for those that are refused.")
      .def(
          "attend_alike",
          [](const Onlookers& self, nb::handle q, nb::handle k, nb::handle v, nb::handle causal, nb::handle scale) {
            static const nb::handle bhsd = interned("bhsd");
            return self.attend({q, k, v, causal, scale, bhsd}, Form::alike);
          },
          nb::arg("q").none(), nb::arg("k").none(), nb::arg("v").none(), nb::arg("causal"), nb::arg("scale").none(),
          nb::sig("def attend_alike(self, q: object, k: object, v: object, causal: object, scale: object) -> object"),
          "The same of tensors (batch, heads, seq, dim) with equal batch and heads, of which nothing is to be "
          "broadcast or copied. out has the order of q in memory.");
}

}  // namespace flashcore::python
