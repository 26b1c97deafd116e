// The CPU kernels for any processor of the x86-64 architecture: SSE2.
#include "isa_kernels.h"

namespace flashcore::cpu {

extern const Isa kBaselineIsa;
constinit const Isa kBaselineIsa = isa_kernels("baseline");

}  // namespace flashcore::cpu
