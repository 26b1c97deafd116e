// Tuned kernels: files of them, and what there is to choose from.
#include "flashcore/tuning.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings.h"

namespace flashcore::python {

namespace nb = nanobind;

void bind_tuning(nb::module_& m) {
  m.def(
      "read_tuned",
      [](const std::string& path) {
        std::vector<std::tuple<std::string, std::string, std::string, std::string>> lines;
        for (const TunedKernel& entry : read_tuned(path))
          lines.emplace_back(entry.device_name, entry.problem_line, entry.kernel, entry.note);
        return lines;
      },
      nb::arg("path"), "(device name, problem line, kernel, note) of each line.");
  m.def("load_tuned", &load_tuned, nb::arg("path"));
  m.def("forget_tuned", &forget_tuned);
  m.def(
      "kernel_choices",
      [](std::string_view line, bool cuda, int index) {
        return kernel_choices(line, {cuda ? DeviceType::cuda : DeviceType::cpu, index});
      },
      nb::arg("line"), nb::arg("cuda"), nb::arg("index"));
}

}  // namespace flashcore::python
