# The CPU kernels: one translation unit for each instruction set, each with flags of its own; isa.cpp chooses at run time.

# Note: never -ffast-math. It breaks the tests for infinity, and GCC before 13 would flush subnormals process-wide.
# Always -O3, also in a debug build: unoptimised, these kernels are a hundred times slower. Sanitizers are content with
# -O1; with -O3 they would compile for minutes.
set(_common -O3)
if(FLASHCORE_SANITIZE)
  set(_common -O1)
endif()
list(APPEND _common -fno-exceptions -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND _common -fno-tree-vectorize)  # what is to be a vector is written as one
else()
  list(APPEND _common -Wno-unknown-pragmas)
endif()

set(FLASHCORE_CPU_ISAS "" CACHE STRING "Instruction sets to build for beside the baseline, such as avx2;avx512. Empty: all")

function(_flashcore_add_isa name)
  if(FLASHCORE_CPU_ISAS AND NOT name IN_LIST FLASHCORE_CPU_ISAS AND NOT name MATCHES "baseline|neon")
    return()
  endif()
  string(TOUPPER ${name} upper)
  set_property(SOURCE src/kernels/cpu/simd/isa.cpp APPEND PROPERTY COMPILE_DEFINITIONS FLASHCORE_ISA_${upper})
  target_sources(flashcore PRIVATE src/kernels/cpu/simd/isa_${name}.cpp)
  set_source_files_properties(src/kernels/cpu/simd/isa_${name}.cpp PROPERTIES COMPILE_OPTIONS "${_common};${ARGN}")
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  _flashcore_add_isa(neon)
else()
  _flashcore_add_isa(baseline)
  _flashcore_add_isa(avx2 -march=x86-64-v3)
  # Note: GCC 12 takes the undefined vectors of its own AVX-512 intrinsics for a mistake (its bug 105593).
  _flashcore_add_isa(avx512 -march=x86-64-v4 -mtune=skylake-avx512 -mprefer-vector-width=512 -Wno-uninitialized
    -Wno-maybe-uninitialized)
  _flashcore_add_isa(amx -march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16 -mtune=sapphirerapids
    -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

find_package(Threads REQUIRED)
target_link_libraries(flashcore PRIVATE Threads::Threads)
