// How many threads the CPU kernels use, and whose threads they are.
#pragma once

#include "flashcore/export.h"

namespace flashcore {

/// Threads that one CPU call may use, the calling one included. Starts as FLASHCORE_NUM_THREADS, else OMP_NUM_THREADS,
/// else the processors this process may run on. Results do not depend on it. Throws InvalidArgument where
/// FLASHCORE_NUM_THREADS is not a positive number, or FLASHCORE_THREADS neither "pool" nor "openmp".
FLASHCORE_API int num_threads();

/// Throws InvalidArgument for less than 1. Holds for the calls that start afterwards, in every thread.
FLASHCORE_API void set_num_threads(int threads);

/// Runs `lane(context)` at least once and at most `lanes` times, at the same time where it can, and returns when all
/// of them have returned. A lane takes work until none is left, so that it does not matter how many of them run.
using Executor = void (*)(int lanes, void (*lane)(void* context), void* context);

/// Uses a caller's threads (a framework's own pool, for example) instead of flashcore's. Null: flashcore's again.
/// FLASHCORE_THREADS=openmp starts with `openmp_executor`, where there is one at the first call.
FLASHCORE_API void set_executor(Executor executor) noexcept;

/// The threads of the OpenMP runtime that this process has loaded already (by torch, or a program that is linked with
/// one): beside its other work they are awake, and no second set of threads contends with them. Null where there is
/// none; none is ever loaded. Uses no more threads than omp_get_max_threads(), and inside a parallel region one. In a
/// forked child, where OpenMP's threads are missing, flashcore's own do the work.
FLASHCORE_API Executor openmp_executor() noexcept;

}  // namespace flashcore
