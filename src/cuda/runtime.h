// What device.cpp, memory.cpp and stopwatch.cpp give to the CUDA backend; each is described at Backend.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "flashcore/device.h"
#include "flashcore/memory.h"

namespace flashcore::detail {
struct Capture;
struct StopwatchClock;
}  // namespace flashcore::detail

namespace flashcore::cuda {

int device_count();
std::string no_device_reason();
DeviceInfo device_info(int index);

MemoryResource& system_resource(int index);
detail::Capture capture_of(int index, Stream stream) noexcept;
void keep_with_graph(void* graph, void* what, void (*release)(void* what));
void outside_captures(int index, const std::function<void(Stream)>& work);
void copy_to_host(void* host, const void* device, std::size_t bytes, int index, Stream stream);
void synchronize(int index, Stream stream);
bool wait_for_all(int index);
void copy(void* target, const void* source, std::size_t bytes, int index, Stream stream);
std::unique_ptr<detail::StopwatchClock> make_clock(int index);

}  // namespace flashcore::cuda
