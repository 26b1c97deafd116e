// The CPU kernels for AVX2, FMA and F16C.
#include "isa_kernels.h"

namespace flashcore::cpu {

extern const Isa kAvx2Isa;
constinit const Isa kAvx2Isa = isa_kernels("avx2");

}  // namespace flashcore::cpu
