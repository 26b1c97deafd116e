// The CPU kernels for AVX-512 F, BW, CD, DQ and VL.
#include "isa_kernels.h"

namespace flashcore::cpu {

extern const Isa kAvx512Isa;
constinit const Isa kAvx512Isa = isa_kernels("avx512");

}  // namespace flashcore::cpu
