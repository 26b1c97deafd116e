// Options: a call's option words as the library takes them, owned by a Python object.
#pragma once

#include <string>

#include "flashcore/attention.h"

namespace flashcore::python {

/// AttentionOptions that own their string. Stays where it was made: `value.kernel` looks into `kernel`.
struct Options {
  AttentionOptions value;
  std::string kernel;

  Options() = default;
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;
};

}  // namespace flashcore::python
