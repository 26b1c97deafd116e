// Small instructions: values held in place, register budgets, fast exponentials, maxima, pairs of 16-bit numbers,
// matrix stores.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace flashcore::ptx {

/// No instruction: the compiler must have the value in a register here and may assume nothing of it after this point.
/// So it is worked out here, not where it is used.
template <class T>
__device__ __forceinline__ void keep(T*& pointer) {
  asm volatile("" : "+l"(pointer)::"memory");
}
__device__ __forceinline__ void keep(std::int64_t& number) { asm volatile("" : "+l"(number)::"memory"); }
__device__ __forceinline__ void keep(int& number) { asm volatile("" : "+r"(number)::"memory"); }

/// setmaxnreg: all four warps of a warpgroup give registers back, or take them. 24 to 256, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// elect.sync: true in one lane of a full warp, the same one each time.
__device__ __forceinline__ bool elect() {
  std::uint32_t chosen;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(chosen));
  return chosen != 0;
}

/// ex2.approx.ftz: 2^x, about 2 ulp; ex2(-inf) is 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// cvt.rn.f16x2 / cvt.rn.bf16x2: two floats to one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<detail::Float16>(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ std::uint32_t pack<detail::BFloat16>(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// max.NaN.f16x2 / max.NaN.bf16x2: the larger of each half; NaN where either is NaN. From 8.0 on.
template <class T>
__device__ __forceinline__ std::uint32_t max_pair(std::uint32_t a, std::uint32_t b);
template <>
__device__ __forceinline__ std::uint32_t max_pair<detail::Float16>(std::uint32_t a, std::uint32_t b) {
  std::uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ std::uint32_t max_pair<detail::BFloat16>(std::uint32_t a, std::uint32_t b) {
  std::uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/// max.NaN.f32: the larger of two; NaN where either is NaN. From 8.0 on.
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

/// stmatrix.x4: four 8×8 tiles of 16-bit elements; lane l gives the address of row l%8 of tile l/8.
__device__ __forceinline__ void store_matrix_x4(std::uint32_t s_row, std::uint32_t r0, std::uint32_t r1,
                                                std::uint32_t r2, std::uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace flashcore::ptx
