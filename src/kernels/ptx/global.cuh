// Global memory beyond C++: stores under a predicate, 16 bytes that other blocks see at once, and asking ahead.
#pragma once

#include <cstdint>

namespace flashcore::ptx {

// A branch around a store, on a condition that lanes do not share, would make the compiler give up uniform registers
// far beyond it: hence the predicate.

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

/// 16 bytes that no other thread ever sees half written.
struct alignas(16) Whole16 {
  std::uint64_t x[2];
};

/// st.relaxed.gpu.b128 (PTX 8.3)
__device__ __forceinline__ void store_whole(Whole16* address, const Whole16& value) {
  asm volatile("{\n.reg .b128 x;\nmov.b128 x, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], x;\n}" ::"l"(address),
               "l"(value.x[0]), "l"(value.x[1])
               : "memory");
}

/// ld.relaxed.gpu.b128
__device__ __forceinline__ Whole16 load_whole(const Whole16* address) {
  Whole16 value;
  asm volatile("{\n.reg .b128 x;\nld.relaxed.gpu.global.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}"
               : "=l"(value.x[0]), "=l"(value.x[1])
               : "l"(address)
               : "memory");
  return value;
}

/// prefetch.global.L2::evict_last
__device__ __forceinline__ void prefetch_to_stay(const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(address) : "memory");
#endif
}

}  // namespace flashcore::ptx
