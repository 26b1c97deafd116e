// From DLPack to TensorView. Needs no DLPack header of its own: any struct laid out and named like DLTensor will do
// (https://dmlc.github.io/dlpack), so this header works beside whichever dlpack.h a program already has.
#pragma once

#include <string>

#include "flashcore/error.h"
#include "flashcore/tensor.h"

namespace flashcore {

namespace detail {
/// DLDataTypeCode and bits -> DType. Throws InvalidType.
FLASHCORE_API DType dtype_from_dlpack(int code, int bits, int lanes);
/// DLDeviceType and ordinal -> Device (pinned host memory counts as CPU, managed memory as CUDA). Throws
/// InvalidArgument.
FLASHCORE_API Device device_from_dlpack(int device_type, int device_id);
}  // namespace detail

/// A view of what a DLTensor describes; no ownership moves. Missing strides mean row-major. Throws InvalidArgument or
/// InvalidType for a device, a dtype or a rank that flashcore does not know.
template <class DLTensorLike>
TensorView from_dlpack(const DLTensorLike& source) {
  TensorView view;
  if (source.ndim > kMaxRank)
    throw InvalidArgument("tensor of rank " + std::to_string(source.ndim) + " given; at most rank " +
                          std::to_string(kMaxRank) + " is allowed");
  view.data = static_cast<char*>(source.data) + source.byte_offset;
  view.dtype = detail::dtype_from_dlpack(source.dtype.code, source.dtype.bits, source.dtype.lanes);
  view.device = detail::device_from_dlpack(static_cast<int>(source.device.device_type), source.device.device_id);
  view.rank = source.ndim;
  std::int64_t dense = 1;
  for (int i = source.ndim - 1; i >= 0; --i) {
    view.shape[i] = source.shape[i];
    view.stride[i] = source.strides ? source.strides[i] : dense;
    dense *= source.shape[i];
  }
  return view;
}

}  // namespace flashcore
