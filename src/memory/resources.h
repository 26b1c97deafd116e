// The resources behind the public ones: host memory, and the workspace resource as something that can be shared.
#pragma once

#include <memory>

#include "flashcore/memory.h"

namespace flashcore::detail {

/// Every resource aligns to this.
inline constexpr std::size_t kMemoryAlignment = 256;

/// Host memory from the C++ heap.
MemoryResource& host_resource();

/// What workspace_resource(device) refers to, kept alive by whoever holds the pointer.
std::shared_ptr<MemoryResource> shared_workspace_resource(Device device);

}  // namespace flashcore::detail
