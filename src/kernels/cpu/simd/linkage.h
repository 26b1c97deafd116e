// Gives the shared element semantics internal linkage; every other header of this folder includes it first.
//
// Note: the linker keeps one copy of an inline function for the whole program. One that was compiled here with AVX-512
// would then also run on processors without it. So nothing inline may leave a translation unit of this folder:
// everything lives in unnamed namespaces, and what comes from outside is forced inline.
#pragma once

#ifdef FLASHCORE_HD
#error "linkage.h must be included before any other header of the project"
#endif
#define FLASHCORE_HD static inline __attribute__((always_inline))
#define FLASHCORE_INLINE inline __attribute__((always_inline))
