// flashcore._core: the module that Python sees, put together from its parts.
#include <nanobind/nanobind.h>

#include "array.h"
#include "bindings.h"
#include "bridge.h"
#include "flashcore/device.h"
#include "shortcut.h"

NB_MODULE(_core, m) {
  using namespace flashcore::python;
  m.doc() = "The bindings of libflashcore. Use the functions of `flashcore` instead.";
  // Interpreter shutdown does not free what framework objects hold in cycles; the operating system does.
  nanobind::set_leak_warnings(false);
  m.def("version", &flashcore::version, "Version of the library.");
  bind_errors(m);
  bind_bridge(m);
  bind_array(m);
  bind_attention(m);
  bind_shortcut(m);
  bind_onlookers(m);
  bind_primitives(m);
  bind_memory(m);
  bind_device(m);
  bind_stopwatch(m);
  bind_tuning(m);
  bind_xla(m);
}
