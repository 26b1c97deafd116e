// What the measuring commands stand on: the device's clock, recorded work, and copies into and out of Arrays.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>

#include "array.h"
#include "bindings.h"
#include "flashcore/device.h"
#include "flashcore/error.h"
#include "flashcore/memory.h"
#include "flashcore/stopwatch.h"

namespace flashcore::python {

namespace {

std::size_t bytes_of(const Array& array) {
  return static_cast<std::size_t>(array.view().numel()) * size_of(array.view().dtype);
}

void check_bytes(const Array& array, std::size_t others) {
  if (bytes_of(array) != others)
    throw InvalidArgument("an array of " + std::to_string(bytes_of(array)) + " bytes beside memory of " +
                          std::to_string(others));
}

void copy_and_wait(void* target, const void* source, const Array& array, std::uintptr_t stream) {
  const Device device = array.view().device;
  nb::gil_scoped_release release;
  copy_memory(target, source, bytes_of(array), device, reinterpret_cast<Stream>(stream));
  synchronize(device, reinterpret_cast<Stream>(stream));
}

void copy_in(const Array& array, std::uintptr_t host, std::size_t bytes, std::uintptr_t stream) {
  check_bytes(array, bytes);
  copy_and_wait(array.view().data, reinterpret_cast<const void*>(host), array, stream);
}

/// What is in place already is copied behind itself: of a large array little comes from the host.
void repeat_in(const Array& array, std::uintptr_t host, std::size_t bytes, std::uintptr_t stream) {
  const std::size_t total = bytes_of(array);
  if (bytes == 0 && total > 0) throw InvalidArgument("an array cannot be filled from no memory");
  const Device device = array.view().device;
  const auto queue = reinterpret_cast<Stream>(stream);
  auto* first = static_cast<char*>(array.view().data);
  nb::gil_scoped_release release;
  std::size_t filled = std::min(bytes, total);
  copy_memory(first, reinterpret_cast<const void*>(host), filled, device, queue);
  for (std::size_t more; filled < total; filled += more) {
    more = std::min(filled, total - filled);
    copy_memory(first + filled, first, more, device, queue);
  }
  synchronize(device, queue);
}

void copy_out(const Array& array, std::uintptr_t host, std::size_t bytes, std::uintptr_t stream) {
  check_bytes(array, bytes);
  copy_and_wait(reinterpret_cast<void*>(host), array.view().data, array, stream);
}

void copy_within(const Array& target, const Array& source, std::uintptr_t stream) {
  check_bytes(target, bytes_of(source));
  copy_memory(target.view().data, source.view().data, bytes_of(source), target.view().device,
              reinterpret_cast<Stream>(stream));
}

}  // namespace

void bind_stopwatch(nb::module_& m) {
  nb::class_<Recording>(m, "Recording", "Work that was recorded once: a CUDA graph, on the CPU the function itself.")
      .def(
          "replay",
          [](const Recording& self, int times) {
            for (int i = 0; i < times; ++i) self.replay();
          },
          nb::arg("times") = 1, "Queues the work so many times; on the CPU does it.");
  nb::class_<Stopwatch>(m, "Stopwatch", "Times what is queued on its stream, by the device's own clock.")
      .def(
          "__init__",
          [](Stopwatch* self, bool cuda, int index) {
            new (self) Stopwatch({cuda ? DeviceType::cuda : DeviceType::cpu, index});
          },
          nb::arg("cuda"), nb::arg("index"))
      .def_prop_ro("stream", [](const Stopwatch& self) { return reinterpret_cast<std::uintptr_t>(self.stream()); })
      .def("start", &Stopwatch::start)
      .def("stop", &Stopwatch::stop, nb::call_guard<nb::gil_scoped_release>(),
           "Seconds from start() until what was queued since is done.")
      .def(
          "record", [](Stopwatch& self, nb::object work) { return self.record([work = std::move(work)] { work(); }); },
          nb::arg("work"), nb::keep_alive<0, 1>());
  m.def("copy_in", &copy_in, nb::arg("array"), nb::arg("host"), nb::arg("bytes"), nb::arg("stream"),
        "Fills an Array from the host memory at this address.");
  m.def("repeat_in", &repeat_in, nb::arg("array"), nb::arg("host"), nb::arg("bytes"), nb::arg("stream"),
        "Fills an Array with the host memory at this address, over and over.");
  m.def("copy_out", &copy_out, nb::arg("array"), nb::arg("host"), nb::arg("bytes"), nb::arg("stream"),
        "Copies an Array to the host memory at this address.");
  m.def("copy_within", &copy_within, nb::arg("target"), nb::arg("source"), nb::arg("stream"),
        "Queues a copy between two Arrays of one device.");
}

}  // namespace flashcore::python
