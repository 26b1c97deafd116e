// Stores to global memory under a predicate. A branch around them, on a condition that lanes do not share, would make
// the compiler give up uniform registers far beyond it.
#pragma once

#include <cstdint>

namespace flashcore::ptx {

/// @p st.global.v4.b32: 16 bytes; `address` lies on 16 bytes.
__device__ __forceinline__ void store_if(bool wanted, void* address, const std::uint32_t (&x)[4]) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(int{wanted}),
      "l"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
      : "memory");
}

/// @p st.global.b16
__device__ __forceinline__ void store_if(bool wanted, void* address, std::uint16_t x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b16 [%1], %2;\n}" ::"r"(int{wanted}),
               "l"(address), "h"(x)
               : "memory");
}

}  // namespace flashcore::ptx
