// The CPU kernels for AVX-512 with AVX512-BF16 and AMX-BF16.
#include "isa_kernels.h"

namespace flashcore::cpu {

extern const Isa kAmxIsa;
constinit const Isa kAmxIsa = isa_kernels("amx");

}  // namespace flashcore::cpu
