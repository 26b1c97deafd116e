// The attention calls: tuples of arrays become the library's structs, then the library's function runs without the GIL.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <chrono>
#include <optional>

#include "bindings.h"
#include "bridge.h"
#include "flashcore/attention.h"
#include "flashcore/error.h"
#include "flashcore/memory.h"
#include "options.h"
#include "results.h"
#include "shortcut.h"

namespace flashcore::python {

namespace {

/// One place in a tuple of arrays. Those at the end may be missing.
struct Slot {
  const char* name;
  TensorView* view;
};

template <std::size_t N>
void read_all(Reader& reader, nb::handle arrays, const Slot (&slots)[N], Access access = Access::read) {
  if (!PyTuple_Check(arrays.ptr()) || PyTuple_Size(arrays.ptr()) > static_cast<Py_ssize_t>(N))
    throw InvalidType("a tuple of up to " + std::to_string(N) + " arrays is needed");
  for (Py_ssize_t i = 0; i < PyTuple_Size(arrays.ptr()); ++i) {
    const nb::handle array = PyTuple_GetItem(arrays.ptr(), i);
    if (!array.is_none()) *slots[i].view = reader.read(array, slots[i].name, access);
  }
}

/// (q, k, v, mask, bias, alibi_slopes, sinks, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k, seqused_k)
AttentionInputs read_inputs(Reader& reader, nb::handle arrays, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k) {
  AttentionInputs in;
  in.sequences.max_seqlen_q = max_seqlen_q;
  in.sequences.max_seqlen_k = max_seqlen_k;
  read_all(reader, arrays,
           {{"q", &in.q},
            {"k", &in.k},
            {"v", &in.v},
            {"mask", &in.mask},
            {"bias", &in.bias},
            {"alibi_slopes", &in.alibi_slopes},
            {"sinks", &in.sinks},
            {"q_descale", &in.q_descale},
            {"k_descale", &in.k_descale},
            {"v_descale", &in.v_descale},
            {"cu_seqlens_q", &in.sequences.cu_seqlens_q},
            {"cu_seqlens_k", &in.sequences.cu_seqlens_k},
            {"seqused_k", &in.sequences.seqused_k}});
  return in;
}

/// (k_cache, v_cache), then (q, cache_seqlens, block_table, k_new, v_new, rotary_cos, rotary_sin, mask, bias,
/// alibi_slopes, sinks, q_descale, k_descale, v_descale). The caches are written where there are new keys.
DecodeInputs read_decode_inputs(Reader& reader, nb::handle arrays, nb::handle caches, bool interleaved) {
  DecodeInputs in;
  in.rotary.interleaved = interleaved;
  read_all(reader, arrays,
           {{"q", &in.q},
            {"cache_seqlens", &in.cache_seqlens},
            {"block_table", &in.block_table},
            {"k_new", &in.k_new},
            {"v_new", &in.v_new},
            {"rotary_cos", &in.rotary.cos},
            {"rotary_sin", &in.rotary.sin},
            {"mask", &in.mask},
            {"bias", &in.bias},
            {"alibi_slopes", &in.alibi_slopes},
            {"sinks", &in.sinks},
            {"q_descale", &in.q_descale},
            {"k_descale", &in.k_descale},
            {"v_descale", &in.v_descale}});
  read_all(reader, caches, {{"k_cache", &in.k_cache}, {"v_cache", &in.v_cache}},
           in.k_new ? Access::write : Access::read);
  return in;
}

AttentionOutputs read_outputs(Reader& reader, nb::handle arrays, Access access = Access::write) {
  AttentionOutputs out;
  read_all(reader, arrays, {{"out", &out.out}, {"lse", &out.lse}}, access);
  return out;
}

/// The gradients that a call would allocate, without memory: for planning.
AttentionGrads imagined_gradients(AttentionGrads given, const AttentionInputs& in) {
  const auto imagine = [](TensorView& gradient, const TensorView& source) {
    if (gradient || !source) return;
    gradient = dense(source);
    gradient.data = nullptr;
  };
  imagine(given.dq, in.q);
  imagine(given.dk, in.k);
  imagine(given.dv, in.v);
  imagine(given.dbias, in.bias);
  imagine(given.dsinks, in.sinks);
  return given;
}

nb::typed<nb::tuple, bool, std::string, std::string> to_tuple(const Support& support) {
  return nb::make_tuple(support.ok, support.kernel, support.why);
}

// ---- calls -------------------------------------------------------------------------------------------------------

/// The pair (out, lse), as arrays or None.
Wanted wanted_results(nb::handle results, Layout layout, bool with_lse) {
  if (!PyTuple_Check(results.ptr()) || PyTuple_Size(results.ptr()) != 2) throw InvalidType("(out, lse) is needed");
  return {PyTuple_GetItem(results.ptr(), 0), PyTuple_GetItem(results.ptr(), 1), layout, with_lse};
}

/// Returns out or, where lse is given or wanted, (out, lse).
nb::object forward(const Bridge& bridge, nb::handle arrays, nb::handle results, const Options& options,
                   std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, bool with_lse, nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  const AttentionInputs in = read_inputs(reader, arrays, max_seqlen_q, max_seqlen_k);
  const Results out = take_results(reader, wanted_results(results, options.value.layout, with_lse),
                                   PyTuple_GetItem(arrays.ptr(), 0), in.q, in.v);
  const Stream run_on = reader.stream(in.q.device);
  {
    nb::gil_scoped_release release;
    attention_forward(in, out.views, options.value, run_on);
  }
  return out.answer();
}

/// Work of a few microseconds, for which handing the interpreter to other threads and back does not pay.
bool is_tiny(const TensorView& q, const TensorView& k) {
  constexpr double kLimit = 1 << 22;
  return q.device.type == DeviceType::cpu && static_cast<double>(q.numel()) * static_cast<double>(k.numel()) <= kLimit;
}

}  // namespace

AttentionInputs read_qkv(Reader& reader, nb::handle q, nb::handle k, nb::handle v) {
  return {.q = reader.read(q, "q"), .k = reader.read(k, "k"), .v = reader.read(v, "v")};
}

nb::object attend(Reader& reader, const AttentionInputs& in, nb::handle q, const Wanted& wanted,
                  const AttentionOptions& options) {
  const Results out = take_results(reader, wanted, q, in.q, in.v);
  const Stream run_on = reader.stream(in.q.device);
  {
    std::optional<nb::gil_scoped_release> release;
    if (!is_tiny(in.q, in.k)) release.emplace();
    attention_forward(in, out.views, options, run_on);
  }
  return out.answer();
}

namespace {

/// Seconds that the library's own call takes, without anything of Python: what `bench/overhead.py` compares with.
double time_forward(const Bridge& bridge, nb::handle arrays, nb::handle results, const Options& options, int calls) {
  Reader reader(bridge, nb::none());
  const AttentionInputs in = read_inputs(reader, arrays, -1, -1);
  const AttentionOutputs out = read_outputs(reader, results);
  const Stream run_on = reader.stream(in.q.device);
  nb::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) attention_forward(in, out, options.value, run_on);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls;
}

/// Returns out or, where lse is given or wanted, (out, lse).
nb::object decode(const Bridge& bridge, nb::handle arrays, nb::handle caches, bool interleaved, nb::handle results,
                  const Options& options, bool with_lse, nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  const DecodeInputs in = read_decode_inputs(reader, arrays, caches, interleaved);
  const Results out = take_results(reader, wanted_results(results, options.value.layout, with_lse),
                                   PyTuple_GetItem(arrays.ptr(), 0), in.q, in.v_cache);
  const Stream run_on = reader.stream(in.q.device);
  {
    nb::gil_scoped_release release;
    attention_decode(in, out.views, options.value, run_on);
  }
  return out.answer();
}

AttentionCotangents read_cotangents(Reader& reader, nb::handle arrays) {
  AttentionCotangents above;
  read_all(reader, arrays, {{"dout", &above.dout}, {"dlse", &above.dlse}});
  return above;
}

AttentionGrads read_gradients(Reader& reader, nb::handle arrays) {
  AttentionGrads grads;
  read_all(
      reader, arrays,
      {{"dq", &grads.dq}, {"dk", &grads.dk}, {"dv", &grads.dv}, {"dbias", &grads.dbias}, {"dsinks", &grads.dsinks}},
      Access::write);
  return grads;
}

/// The gradients of a call, as arrays and as views: those given, new ones where else they are wanted, or None.
struct Gradients {
  nb::object arrays[5];
  AttentionGrads views;

  nb::object answer() const { return nb::make_tuple(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]); }
};

Gradients take_gradients(Reader& reader, nb::handle given, nb::handle wanted, nb::handle inputs,
                         const AttentionInputs& in) {
  constexpr Py_ssize_t kSources[] = {0, 1, 2, 4, 6};  // q, k, v, bias and sinks among the inputs
  Gradients grads{.arrays = {}, .views = read_gradients(reader, given)};
  if (!PyTuple_Check(wanted.ptr()) || PyTuple_Size(wanted.ptr()) != 5) throw InvalidType("5 wishes are needed");
  const std::pair<TensorView*, const TensorView*> pairs[] = {{&grads.views.dq, &in.q},
                                                             {&grads.views.dk, &in.k},
                                                             {&grads.views.dv, &in.v},
                                                             {&grads.views.dbias, &in.bias},
                                                             {&grads.views.dsinks, &in.sinks}};
  for (Py_ssize_t i = 0; i < 5; ++i) {
    const auto [gradient, source] = pairs[i];
    grads.arrays[i] = nb::borrow(PyTuple_GetItem(given.ptr(), i));
    if (*gradient || !*source || PyTuple_GetItem(wanted.ptr(), i) != Py_True) continue;
    grads.arrays[i] = new_array(reader, PyTuple_GetItem(inputs.ptr(), kSources[i]), *source, dense(*source));
    *gradient = reader.read(grads.arrays[i], "gradient", Access::fresh);
  }
  return grads;
}

/// `cotangents` is (dout, dlse), `gradients` (dq, dk, dv, dbias, dsinks), `wanted` a bool for each of these. Returns
/// them all, None where not wanted.
nb::object backward(const Bridge& bridge, nb::handle arrays, nb::handle results, nb::handle cotangents,
                    nb::handle gradients, nb::handle wanted, const Options& options, std::int64_t max_seqlen_q,
                    std::int64_t max_seqlen_k, nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  const AttentionInputs in = read_inputs(reader, arrays, max_seqlen_q, max_seqlen_k);
  const AttentionOutputs out = read_outputs(reader, results, Access::read);
  const AttentionCotangents above = read_cotangents(reader, cotangents);
  const Gradients grads = take_gradients(reader, gradients, wanted, arrays, in);
  const Stream run_on = reader.stream(in.q.device);
  {
    nb::gil_scoped_release release;
    attention_backward(in, out, above, grads.views, options.value, run_on);
  }
  return grads.answer();
}

/// `states` is (out_a, lse_a, out_b, lse_b), `results` (out, lse). Returns (out, lse).
nb::object merge(const Bridge& bridge, nb::handle states, nb::handle results, int layout, nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  AttentionState a, b;
  read_all(reader, states, {{"out_a", &a.out}, {"lse_a", &a.lse}, {"out_b", &b.out}, {"lse_b", &b.lse}});
  const Results merged = take_results(reader, wanted_results(results, static_cast<Layout>(layout), true),
                                      PyTuple_GetItem(states.ptr(), 0), a.out, a.out);
  const Stream run_on = reader.stream(a.out.device);
  {
    nb::gil_scoped_release release;
    merge_states(a, b, {merged.views.out, merged.views.lse}, static_cast<Layout>(layout), run_on);
  }
  return merged.answer();
}

// ---- questions ---------------------------------------------------------------------------------------------------

/// Reads the arguments of a question about a forward call and hands them to `ask`.
template <class Ask>
auto about_forward(const Bridge& bridge, nb::handle arrays, nb::handle results, const Options& options,
                   std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, bool with_lse, Ask ask) {
  Reader reader(bridge, nb::none());
  const AttentionInputs in = read_inputs(reader, arrays, max_seqlen_q, max_seqlen_k);
  return ask(in, imagined_outputs(read_outputs(reader, results), in.q, in.v, options.value.layout, with_lse),
             options.value);
}

template <class Ask>
auto about_decode(const Bridge& bridge, nb::handle arrays, nb::handle caches, bool interleaved, nb::handle results,
                  const Options& options, bool with_lse, Ask ask) {
  Reader reader(bridge, nb::none());
  const DecodeInputs in = read_decode_inputs(reader, arrays, caches, interleaved);
  return ask(in, imagined_outputs(read_outputs(reader, results), in.q, in.v_cache, options.value.layout, with_lse),
             options.value);
}

template <class Ask>
auto about_backward(const Bridge& bridge, nb::handle arrays, nb::handle results, nb::handle cotangents,
                    nb::handle gradients, const Options& options, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
                    Ask ask) {
  Reader reader(bridge, nb::none());
  const AttentionInputs in = read_inputs(reader, arrays, max_seqlen_q, max_seqlen_k);
  const AttentionOutputs out = read_outputs(reader, results, Access::read);
  return ask(in, imagined_outputs(out, in.q, in.v, options.value.layout, true), read_cotangents(reader, cotangents),
             imagined_gradients(read_gradients(reader, gradients), in), options.value);
}

void bind_questions(nb::module_& m) {
  const auto ask_support = [](const auto&... call) { return to_tuple(supports(call...)); };
  const auto ask_reasons = [](const auto&... call) { return explain(call...); };
  m.def("supports_forward", [=](const Bridge& bridge, nb::handle arrays, nb::handle results, const Options& options,
                                std::int64_t max_q, std::int64_t max_k, bool with_lse) {
    return about_forward(bridge, arrays, results, options, max_q, max_k, with_lse, ask_support);
  });
  m.def("explain_forward", [=](const Bridge& bridge, nb::handle arrays, nb::handle results, const Options& options,
                               std::int64_t max_q, std::int64_t max_k, bool with_lse) {
    return about_forward(bridge, arrays, results, options, max_q, max_k, with_lse, ask_reasons);
  });
  m.def("supports_decode", [=](const Bridge& bridge, nb::handle arrays, nb::handle caches, bool interleaved,
                               nb::handle results, const Options& options, bool with_lse) {
    return about_decode(bridge, arrays, caches, interleaved, results, options, with_lse, ask_support);
  });
  m.def("explain_decode", [=](const Bridge& bridge, nb::handle arrays, nb::handle caches, bool interleaved,
                              nb::handle results, const Options& options, bool with_lse) {
    return about_decode(bridge, arrays, caches, interleaved, results, options, with_lse, ask_reasons);
  });
  m.def("supports_backward", [=](const Bridge& bridge, nb::handle arrays, nb::handle results, nb::handle cotangents,
                                 nb::handle gradients, const Options& options, std::int64_t max_q, std::int64_t max_k) {
    return about_backward(bridge, arrays, results, cotangents, gradients, options, max_q, max_k, ask_support);
  });
  m.def("explain_backward", [=](const Bridge& bridge, nb::handle arrays, nb::handle results, nb::handle cotangents,
                                nb::handle gradients, const Options& options, std::int64_t max_q, std::int64_t max_k) {
    return about_backward(bridge, arrays, results, cotangents, gradients, options, max_q, max_k, ask_reasons);
  });
  m.def(
      "explain_line",
      [](std::string_view line, bool cuda, int index, std::string_view kernel) {
        return explain(line, Device{cuda ? DeviceType::cuda : DeviceType::cpu, index}, kernel);
      },
      nb::arg("line"), nb::arg("cuda"), nb::arg("index"), nb::arg("kernel") = "");
  m.def("canonical_problem_line", &canonical_problem_line, nb::arg("line"));
  m.def("problem_line_help", &problem_line_help);
}

// ---- plans -------------------------------------------------------------------------------------------------------

/// Returns out or, where lse is given or wanted, (out, lse).
nb::object run_forward(const AttentionPlan& plan, const Bridge& bridge, nb::handle arrays, nb::handle results,
                       int layout, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, bool with_lse,
                       nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  const AttentionInputs in = read_inputs(reader, arrays, max_seqlen_q, max_seqlen_k);
  const Results out = take_results(reader, wanted_results(results, static_cast<Layout>(layout), with_lse),
                                   PyTuple_GetItem(arrays.ptr(), 0), in.q, in.v);
  const Stream run_on = reader.stream(in.q.device);
  {
    nb::gil_scoped_release release;
    const Buffer workspace(plan.workspace_bytes(), in.q.device, run_on);
    plan.run(in, out.views, workspace.data(), run_on);
  }
  return out.answer();
}

nb::object run_decode(const AttentionPlan& plan, const Bridge& bridge, nb::handle arrays, nb::handle caches,
                      bool interleaved, nb::handle results, int layout, bool with_lse, nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  const DecodeInputs in = read_decode_inputs(reader, arrays, caches, interleaved);
  const Results out = take_results(reader, wanted_results(results, static_cast<Layout>(layout), with_lse),
                                   PyTuple_GetItem(arrays.ptr(), 0), in.q, in.v_cache);
  const Stream run_on = reader.stream(in.q.device);
  {
    nb::gil_scoped_release release;
    const Buffer workspace(plan.workspace_bytes(), in.q.device, run_on);
    plan.run(in, out.views, workspace.data(), run_on);
  }
  return out.answer();
}

nb::object run_backward(const AttentionPlan& plan, const Bridge& bridge, nb::handle arrays, nb::handle results,
                        nb::handle cotangents, nb::handle gradients, nb::handle wanted, std::int64_t max_seqlen_q,
                        std::int64_t max_seqlen_k, nb::handle stream) {
  Reader reader(bridge, stream, Grads::mentioned);
  const AttentionInputs in = read_inputs(reader, arrays, max_seqlen_q, max_seqlen_k);
  const AttentionOutputs out = read_outputs(reader, results, Access::read);
  const AttentionCotangents above = read_cotangents(reader, cotangents);
  const Gradients grads = take_gradients(reader, gradients, wanted, arrays, in);
  const Stream run_on = reader.stream(in.q.device);
  {
    nb::gil_scoped_release release;
    const Buffer workspace(plan.workspace_bytes(), in.q.device, run_on);
    plan.run(in, out, above, grads.views, workspace.data(), run_on);
  }
  return grads.answer();
}

void bind_plan(nb::module_& m) {
  nb::class_<AttentionPlan>(m, "AttentionPlan", "A call that was checked and dispatched once.")
      .def_prop_ro("kernel", &AttentionPlan::kernel)
      .def_prop_ro("workspace_bytes", &AttentionPlan::workspace_bytes)
      .def("describe", &AttentionPlan::describe)
      .def("run_forward", &run_forward, nb::arg("bridge"), nb::arg("arrays"), nb::arg("results"), nb::arg("layout"),
           nb::arg("max_seqlen_q"), nb::arg("max_seqlen_k"), nb::arg("with_lse"), nb::arg("stream").none())
      .def("run_decode", &run_decode, nb::arg("bridge"), nb::arg("arrays"), nb::arg("caches"), nb::arg("interleaved"),
           nb::arg("results"), nb::arg("layout"), nb::arg("with_lse"), nb::arg("stream").none())
      .def("run_backward", &run_backward, nb::arg("bridge"), nb::arg("arrays"), nb::arg("results"),
           nb::arg("cotangents"), nb::arg("gradients"), nb::arg("wanted"), nb::arg("max_seqlen_q"),
           nb::arg("max_seqlen_k"), nb::arg("stream").none());
  m.def("plan_forward", [](const Bridge& bridge, nb::handle arrays, nb::handle results, const Options& options,
                           std::int64_t max_q, std::int64_t max_k, bool with_lse) {
    return about_forward(
        bridge, arrays, results, options, max_q, max_k, with_lse,
        [](const auto& in, const auto& out, const auto& o) { return AttentionPlan::forward(in, out, o); });
  });
  m.def("plan_decode", [](const Bridge& bridge, nb::handle arrays, nb::handle caches, bool interleaved,
                          nb::handle results, const Options& options, bool with_lse) {
    return about_decode(
        bridge, arrays, caches, interleaved, results, options, with_lse,
        [](const auto& in, const auto& out, const auto& o) { return AttentionPlan::decode(in, out, o); });
  });
  m.def("plan_backward", [](const Bridge& bridge, nb::handle arrays, nb::handle results, nb::handle cotangents,
                            nb::handle gradients, const Options& options, std::int64_t max_q, std::int64_t max_k) {
    return about_backward(bridge, arrays, results, cotangents, gradients, options, max_q, max_k,
                          [](const auto&... call) { return AttentionPlan::backward(call...); });
  });
}

void bind_options(nb::module_& m) {
  nb::class_<Options>(m, "Options", "The options of a call, in the library's own words.")
      .def(
          "__init__",
          [](Options* self, int layout, int causal, std::int64_t left, std::int64_t right, std::optional<double> scale,
             double softcap, double dropout_p, std::uint64_t seed, bool deterministic, std::string kernel) {
            new (self) Options();
            self->kernel = std::move(kernel);
            self->value = {.layout = static_cast<Layout>(layout),
                           .mask = {static_cast<Causal>(causal), left, right},
                           .scale = scale,
                           .softcap = softcap,
                           .dropout_p = dropout_p,
                           .seed = seed,
                           .deterministic = deterministic,
                           .kernel = self->kernel};
          },
          nb::arg("layout"), nb::arg("causal"), nb::arg("left"), nb::arg("right"), nb::arg("scale").none(),
          nb::arg("softcap"), nb::arg("dropout_p"), nb::arg("seed"), nb::arg("deterministic"), nb::arg("kernel"))
      .def(
          "words",
          [](const Options& self) {
            const AttentionOptions& o = self.value;
            return nb::make_tuple(static_cast<int>(o.layout), static_cast<int>(o.mask.kind), o.mask.left, o.mask.right,
                                  o.scale, o.softcap, o.dropout_p, o.seed, o.deterministic, self.kernel);
          },
          nb::sig("def words(self) -> tuple[int, int, int, int, float | None, float, float, int, bool, str]"),
          "What the constructor was given.");
}

}  // namespace

void bind_attention(nb::module_& m) {
  bind_options(m);
  m.def("forward", &forward, nb::arg("bridge"), nb::arg("arrays"), nb::arg("results"), nb::arg("options"),
        nb::arg("max_seqlen_q"), nb::arg("max_seqlen_k"), nb::arg("with_lse"), nb::arg("stream").none());
  m.def("time_forward", &time_forward, nb::arg("bridge"), nb::arg("arrays"), nb::arg("results"), nb::arg("options"),
        nb::arg("calls"));
  m.def("decode", &decode, nb::arg("bridge"), nb::arg("arrays"), nb::arg("caches"), nb::arg("interleaved"),
        nb::arg("results"), nb::arg("options"), nb::arg("with_lse"), nb::arg("stream").none());
  m.def("backward", &backward, nb::arg("bridge"), nb::arg("arrays"), nb::arg("results"), nb::arg("cotangents"),
        nb::arg("gradients"), nb::arg("wanted"), nb::arg("options"), nb::arg("max_seqlen_q"), nb::arg("max_seqlen_k"),
        nb::arg("stream").none());
  m.def("merge_states", &merge, nb::arg("bridge"), nb::arg("states"), nb::arg("results"), nb::arg("layout"),
        nb::arg("stream").none());
  bind_questions(m);
  bind_plan(m);
}

}  // namespace flashcore::python
