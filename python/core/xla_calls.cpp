// Attention as functions that XLA calls, on the CPU and on CUDA devices, and the check of such a call without data.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "array.h"
#include "bindings.h"
#include "flashcore/error.h"
#include "flashcore/memory.h"
#include "named_call.h"
#include "options.h"
#include "xla_frame.h"

namespace flashcore::python {

namespace nb = nanobind;

namespace {

using xla::AttributeReader;
using xla::Code;

AttentionOptions read_options(const AttributeReader& words) {
  return {.layout = static_cast<Layout>(words.integer("layout")),
          .mask = {static_cast<Causal>(words.integer("causal")), words.integer("left"), words.integer("right")},
          .scale = words.number("scale"),
          .softcap = words.number("softcap").value_or(0),
          .dropout_p = words.number("dropout_p").value_or(0),
          .seed = static_cast<std::uint64_t>(words.integer("seed")),
          .deterministic = words.integer("deterministic") != 0,
          .kernel = words.text("kernel")};
}

/// `names` are those of the buffers, in order, with a space between them.
void add_buffers(NamedCall& call, const xla::Buffers& buffers, std::string_view names, Device device) {
  for (std::int64_t i = 0; i < buffers.size; ++i) {
    const std::string_view name = names.substr(0, names.find(' '));
    names.remove_prefix(std::min(names.size(), name.size() + 1));
    const auto& buffer = *static_cast<const xla::Buffer*>(buffers.items[i]);
    call.add(name, buffer.data, xla::dtype_of(buffer.type, name), device,
             {buffer.dims, static_cast<std::size_t>(buffer.rank)});
  }
}

std::shared_ptr<void> host_scratch(std::size_t bytes) {
  const auto buffer = std::make_shared<Buffer>(bytes, Device{}, nullptr);
  return {buffer, buffer->data()};
}

void execute(const xla::Frame& frame, Phase phase, DeviceType where) {
  const AttributeReader words(frame.attributes);
  const bool cuda = where == DeviceType::cuda;
  const Device device = cuda ? xla::cuda_device_of(frame) : Device{};
  NamedCall call(phase, read_options(words), static_cast<int>(words.integer("mapped")));
  call.set_bounds(words.integer("max_seqlen_q"), words.integer("max_seqlen_k"));
  call.set_rotary_interleaved(words.integer("rotary_interleaved") != 0);
  add_buffers(call, frame.operands, words.text("operands"), device);
  add_buffers(call, frame.results, words.text("results"), device);  // a cache that is written comes as both
  call.run(cuda ? xla::scratch_of(frame) : host_scratch, cuda ? xla::stream_of(frame) : nullptr);
}

template <Phase phase, DeviceType where>
xla::Error* handle(xla::Frame* frame) noexcept {
  if (xla::answer_metadata(*frame)) return nullptr;
  if (frame->stage != xla::kExecute) return nullptr;
  const auto failed = [frame](Code code, const std::exception& error) {
    return xla::make_error(*frame, code, error.what());
  };
  try {
    execute(*frame, phase, where);
    return nullptr;
  } catch (const InvalidArgument& error) {
    return failed(Code::invalid_argument, error);
  } catch (const Unsupported& error) {
    return failed(Code::unimplemented, error);
  } catch (const std::bad_alloc& error) {
    return failed(Code::resource_exhausted, error);
  } catch (const std::exception& error) {
    return failed(Code::internal, error);
  } catch (...) {
    return xla::make_error(*frame, Code::internal, "unknown error in flashcore");
  }
}

nb::capsule capsule(xla::Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

/// (name, platform, capsule) of each target, for jax.ffi.register_ffi_target.
std::vector<std::tuple<std::string, std::string, nb::capsule>> targets() {
  using enum Phase;
  using enum DeviceType;
  return {{"flashcore_forward", "cpu", capsule(&handle<forward, cpu>)},
          {"flashcore_backward", "cpu", capsule(&handle<backward, cpu>)},
          {"flashcore_decode", "cpu", capsule(&handle<decode, cpu>)},
          {"flashcore_forward", "CUDA", capsule(&handle<forward, cuda>)},
          {"flashcore_backward", "CUDA", capsule(&handle<backward, cuda>)},
          {"flashcore_decode", "CUDA", capsule(&handle<decode, cuda>)}};
}

Phase phase_of(std::string_view name) {
  return name == "forward" ? Phase::forward : name == "backward" ? Phase::backward : Phase::decode;
}

DType dtype_named(std::string_view dtype, const std::string& name) {
  try {
    return dtype_from_name(dtype);
  } catch (const InvalidType&) {
    throw InvalidType(name + ": dtype " + std::string(dtype) +
                      " given; allowed dtypes: float16, bfloat16, float32, float64, float8_e4m3fn, int32, bool");
  }
}

/// Raises what a call with such tensors would raise; `tensors` are (name, dtype, shape).
void check(std::string_view phase, const Options& options,
           const std::vector<std::tuple<std::string, std::string, std::vector<std::int64_t>>>& tensors,
           std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, bool interleaved, bool cuda, int index) {
  NamedCall call(phase_of(phase), options.value, 0);
  call.set_bounds(max_seqlen_q, max_seqlen_k);
  call.set_rotary_interleaved(interleaved);
  const Device device{cuda ? DeviceType::cuda : DeviceType::cpu, index};
  for (const auto& [name, dtype, shape] : tensors) call.add(name, nullptr, dtype_named(dtype, name), device, shape);
  call.plan();
}

}  // namespace

void bind_xla(nb::module_& m) {
  m.def("xla_targets", &targets);
  m.def("check_call", &check, nb::arg("phase"), nb::arg("options"), nb::arg("tensors"), nb::arg("max_seqlen_q"),
        nb::arg("max_seqlen_k"), nb::arg("rotary_interleaved"), nb::arg("cuda"), nb::arg("index"));
}

}  // namespace flashcore::python
