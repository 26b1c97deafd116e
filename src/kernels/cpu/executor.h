// parallel_for: a number of tasks spread over threads, whoever owns these.
#pragma once

#include <cstdint>

namespace flashcore::cpu {

/// Calls task(context, 0 … tasks − 1), each once and in any order, on up to `threads` threads. Small or nested work
/// runs on the calling thread. The first exception of a task is thrown here, after all running tasks have returned.
void run_tasks(std::int64_t tasks, int threads, void (*task)(void* context, std::int64_t index), void* context);

template <class Body>
void parallel_for(std::int64_t tasks, int threads, Body&& body) {
  run_tasks(tasks, threads, [](void* context, std::int64_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

/// The executor of flashcore's own threads.
void run_on_pool(int lanes, void (*lane)(void* context), void* context);

/// Scratch memory of this thread, aligned to 64 bytes; kept and reused until the thread ends. A second call ends the
/// first one's use. Throws OutOfMemory.
void* thread_scratch(std::size_t bytes);

}  // namespace flashcore::cpu
