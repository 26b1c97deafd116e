// Everything that is not attention: the small building blocks, memory, devices.
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>

#include "bindings.h"
#include "bridge.h"
#include "flashcore/device.h"
#include "flashcore/memory.h"
#include "flashcore/primitives.h"
#include "flashcore/threads.h"

namespace flashcore::python {

namespace {

Device device_of(bool cuda, int index) { return {cuda ? DeviceType::cuda : DeviceType::cpu, index}; }

void add(const Bridge& bridge, nb::handle a, nb::handle b, nb::handle out, nb::handle stream) {
  Reader reader(bridge, stream);
  const TensorView view_a = reader.read(a, "a");
  const TensorView view_b = reader.read(b, "b");
  const TensorView view_out = reader.read(out, "out", Access::write);
  const Stream run_on = reader.stream(view_a.device);
  nb::gil_scoped_release release;
  vector_add(view_a, view_b, view_out, run_on);
}

void reduce_array(const Bridge& bridge, nb::handle x, nb::handle out, int op, nb::handle axis, nb::handle stream) {
  Reader reader(bridge, stream);
  const TensorView view = reader.read(x, "x");
  const TensorView view_out = reader.read(out, "out", Access::write);
  const int along = axis.is_none() ? kAllAxes : nb::cast<int>(axis);
  const Stream run_on = reader.stream(view.device);
  nb::gil_scoped_release release;
  reduce(view, view_out, static_cast<ReduceOp>(op), along, run_on);
}

/// Two Python functions that hand out memory. Called and let go of with the GIL held.
class PythonAllocator {
 public:
  PythonAllocator(nb::object allocate, nb::object deallocate)
      : allocate_(std::move(allocate)), deallocate_(std::move(deallocate)) {}

  ~PythonAllocator() {
    if (!Py_IsInitialized()) {  // the interpreter is gone, and its objects with it
      allocate_.release();
      deallocate_.release();
      return;
    }
    nb::gil_scoped_acquire acquire;
    allocate_.reset();
    deallocate_.reset();
  }

  void* allocate(std::size_t bytes, Stream stream) const {
    nb::gil_scoped_acquire acquire;
    try {
      nb::object address = allocate_(bytes, reinterpret_cast<std::uintptr_t>(stream));
      return address.is_none() ? nullptr : reinterpret_cast<void*>(nb::cast<std::uintptr_t>(address));
    } catch (const nb::python_error& error) {  // which must not outlive the GIL
      throw std::runtime_error(nb::inst_name(error.value()).c_str() + std::string(": ") +
                               nb::str(error.value()).c_str());
    }
  }

  void deallocate(void* data, std::size_t bytes, Stream stream) const {
    nb::gil_scoped_acquire acquire;
    try {
      deallocate_(reinterpret_cast<std::uintptr_t>(data), bytes, reinterpret_cast<std::uintptr_t>(stream));
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("flashcore workspace resource");
    }
  }

 private:
  nb::object allocate_;
  nb::object deallocate_;
};

void use_resource(nb::object allocate, nb::object deallocate, bool cuda, int index) {
  std::shared_ptr<MemoryResource> resource;
  if (!allocate.is_none()) {
    auto python = std::make_shared<PythonAllocator>(std::move(allocate), std::move(deallocate));
    resource = std::make_shared<CallbackResource>(
        [python](std::size_t bytes, Stream stream) { return python->allocate(bytes, stream); },
        [python](void* data, std::size_t bytes, Stream stream) { python->deallocate(data, bytes, stream); });
  }
  nb::gil_scoped_release release;
  set_workspace_resource(device_of(cuda, index), std::move(resource));
}

}  // namespace

void bind_primitives(nb::module_& m) {
  m.def("vector_add", &add, nb::arg("bridge"), nb::arg("a"), nb::arg("b").none(), nb::arg("out"),
        nb::arg("stream").none());
  m.def("reduce", &reduce_array, nb::arg("bridge"), nb::arg("x"), nb::arg("out"), nb::arg("op"), nb::arg("axis").none(),
        nb::arg("stream").none());
}

void bind_memory(nb::module_& m) {
  nb::class_<MemoryStats>(m, "MemoryStats", "Counters of flashcore's own pool on one device.")
      .def_ro("bytes_in_use", &MemoryStats::bytes_in_use)
      .def_ro("bytes_reserved", &MemoryStats::bytes_reserved)
      .def_ro("peak_bytes_in_use", &MemoryStats::peak_bytes_in_use)
      .def_ro("peak_bytes_reserved", &MemoryStats::peak_bytes_reserved)
      .def_ro("allocations", &MemoryStats::allocations)
      .def_ro("upstream_allocations", &MemoryStats::upstream_allocations);
  m.def(
      "memory_stats", [](bool cuda, int index) { return memory_stats(device_of(cuda, index)); }, nb::arg("cuda"),
      nb::arg("index"));
  m.def("empty_cache", &empty_cache, nb::call_guard<nb::gil_scoped_release>());
  m.def("set_workspace_resource", &use_resource, nb::arg("allocate").none(), nb::arg("deallocate").none(),
        nb::arg("cuda"), nb::arg("index"));
}

void bind_device(nb::module_& m) {
  nb::class_<DeviceInfo>(m, "DeviceInfo", "Properties of a device. They do not change while the process runs.")
      .def_prop_ro("device", [](const DeviceInfo& self) { return name_of(self.device); })
      .def_ro("name", &DeviceInfo::name)
      .def_prop_ro(
          "compute_capability",
          [](const DeviceInfo& self) { return nb::make_tuple(self.compute_major, self.compute_minor); },
          nb::for_getter(nb::sig("def compute_capability(self) -> tuple[int, int]")))
      .def_ro("warp_size", &DeviceInfo::warp_size)
      .def_ro("multiprocessors", &DeviceInfo::multiprocessors)
      .def_ro("memory_bytes", &DeviceInfo::memory_bytes)
      .def_ro("l2_bytes", &DeviceInfo::l2_bytes)
      .def_ro("shared_bytes_per_block", &DeviceInfo::shared_bytes_per_block)
      .def_ro("shared_bytes_per_sm", &DeviceInfo::shared_bytes_per_sm)
      .def_ro("clock_khz", &DeviceInfo::clock_khz)
      .def_ro("memory_clock_khz", &DeviceInfo::memory_clock_khz)
      .def_ro("memory_bus_bits", &DeviceInfo::memory_bus_bits)
      .def_ro("driver_version", &DeviceInfo::driver_version)
      .def_ro("runtime_version", &DeviceInfo::runtime_version)
      .def("__repr__",
           [](const DeviceInfo& self) { return "DeviceInfo(" + name_of(self.device) + ": " + self.name + ")"; });
  m.def("device_count", &device_count);
  m.def("no_device_reason", &no_device_reason);
  m.def(
      "device_info", [](bool cuda, int index) { return device_info(device_of(cuda, index)); }, nb::arg("cuda"),
      nb::arg("index"));
  m.def("built_with_cuda", &built_with_cuda);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, nb::arg("threads"));
  m.def(
      "use_openmp_threads",
      [] {
        if (const Executor openmp = openmp_executor()) set_executor(openmp);
      },
      "Runs on the threads of the OpenMP runtime that the process has loaded, if there is one.");
}

}  // namespace flashcore::python
