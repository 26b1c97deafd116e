// The parts that the module is made of; each adds its names to it.
#pragma once

#include <nanobind/nanobind.h>

namespace flashcore::python {

void bind_errors(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_onlookers(nanobind::module_& m);
void bind_primitives(nanobind::module_& m);
void bind_memory(nanobind::module_& m);
void bind_device(nanobind::module_& m);
void bind_stopwatch(nanobind::module_& m);
void bind_tuning(nanobind::module_& m);
void bind_xla(nanobind::module_& m);

}  // namespace flashcore::python
