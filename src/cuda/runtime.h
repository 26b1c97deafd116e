// What device.cpp and memory.cpp give to the CUDA backend; each is a member of Backend and described there.
#pragma once

#include <cstddef>
#include <string>

#include "flashcore/device.h"
#include "flashcore/memory.h"

namespace flashcore::cuda {

int device_count();
std::string no_device_reason();
DeviceInfo device_info(int index);

MemoryResource& system_resource(int index);
bool is_capturing(Stream stream);
void copy_to_host(void* host, const void* device, std::size_t bytes, int index, Stream stream);
void synchronize(int index, Stream stream);
bool wait_for_all(int index);

}  // namespace flashcore::cuda
