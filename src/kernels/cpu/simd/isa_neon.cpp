// The CPU kernels for NEON.
#include "isa_kernels.h"

namespace flashcore::cpu {

extern const Isa kNeonIsa;
constinit const Isa kNeonIsa = isa_kernels("neon");

}  // namespace flashcore::cpu
