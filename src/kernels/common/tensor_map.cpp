// Tensor maps, encoded by the driver. The driver is reached through the runtime, never linked.
#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "../../cuda/check.h"

namespace flashcore::detail {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
                "looking up cuTensorMapEncodeTiled");
    if (!entry) throw CudaError(cudaErrorNotSupported, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  return function;
}

}  // namespace

TensorMap make_tensor_map(const TensorParams& tensor, DType dtype, const MapShape& shape, int box_rows) {
  constexpr cuuint32_t kPanelColumns = 64;
  constexpr std::int64_t kElementBytes = 2;
  constexpr cuuint64_t kAnyStride = 16;  // of a dimension of size 1: never used, but must be a valid one
  TensorMap result;
  result.head_step = shape.heads > 1 && tensor.head == 0 ? 0 : 1;
  result.batch_step = shape.batch > 1 && tensor.batch == 0 ? 0 : 1;
  const auto stride = [](std::int64_t elements) {
    return elements == 0 ? kAnyStride : static_cast<cuuint64_t>(elements * kElementBytes);
  };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(shape.dim), static_cast<cuuint64_t>(shape.seq),
                               static_cast<cuuint64_t>(result.head_step ? shape.heads : 1),
                               static_cast<cuuint64_t>(result.batch_step ? shape.batch : 1)};
  const cuuint64_t strides[3] = {stride(tensor.seq), stride(tensor.head), stride(tensor.batch)};
  const cuuint32_t box[4] = {kPanelColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status =
      encoder()(&result.map, type, 4, tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw CudaError(static_cast<int>(status),
                    "cuTensorMapEncodeTiled refused a tensor (code " + std::to_string(static_cast<int>(status)) + ")");
  return result;
}

}  // namespace flashcore::detail
