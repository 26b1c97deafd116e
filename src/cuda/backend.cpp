// The CUDA backend: the runtime's functions, the primitives and the kernel tables, best first.
#include "backend.h"

#include <iterator>

#include "../kernels/common/common.h"
#include "../kernels/ladder/ladder.h"
#include "../kernels/reference/reference.h"
#include "../kernels/sm90/sm90.h"
#include "runtime.h"

namespace flashcore::detail {

const Backend& cuda_backend() {
  static const KernelTable tables[] = {sm90::table(), reference::table(), ladder::table()};
  static const Backend backend = {
      .type = DeviceType::cuda,
      .device_count = cuda::device_count,
      .no_device_reason = cuda::no_device_reason,
      .device_info = cuda::device_info,
      .system_resource = cuda::system_resource,
      .capture_of = cuda::capture_of,
      .keep_with_graph = cuda::keep_with_graph,
      .outside_captures = cuda::outside_captures,
      .copy_to_host = cuda::copy_to_host,
      .synchronize = cuda::synchronize,
      .wait_for_all = cuda::wait_for_all,
      .copy = cuda::copy,
      .make_clock = cuda::make_clock,
      .merge_states = common::merge_states,
      .vector_add = common::vector_add,
      .reduce = common::reduce,
      .tables = tables,
      .table_count = static_cast<int>(std::size(tables)),
  };
  return backend;
}

}  // namespace flashcore::detail
