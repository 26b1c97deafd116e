// The CPU backend: always built, always usable.
#pragma once

#include "../../backend.h"

namespace flashcore::detail {

const Backend& cpu_backend();

}  // namespace flashcore::detail
