// The CUDA backend, as registry.cpp sees it.
#pragma once

#include "../backend.h"

namespace flashcore::detail {

const Backend& cuda_backend();

}  // namespace flashcore::detail
