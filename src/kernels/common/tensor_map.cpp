// Tensor maps, encoded by the driver.
#include "tensor_map.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "../../cuda/driver.h"
#include "flashcore/error.h"

namespace flashcore::detail {
namespace {

constexpr int kRank = 4;

/// All that makes a map: equal words, equal maps. Without padding, so that bytes can be compared.
struct Words {
  void* data;
  cuuint64_t sizes[kRank];
  cuuint64_t strides[kRank - 1];  // in bytes
  cuuint32_t box_rows;
  CUtensorMapDataType type;
};
static_assert(std::has_unique_object_representations_v<Words>);

CUtensorMap encode(const Words& words) {
  constexpr cuuint32_t kPanelColumns = 64;
  const cuuint32_t box[kRank] = {kPanelColumns, words.box_rows, 1, 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1};
  CUtensorMap map;
  static const auto encode_tiled =
      cuda::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  const CUresult status = encode_tiled(&map, words.type, kRank, words.data, words.sizes, words.strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw CudaError(static_cast<int>(status),
                    "cuTensorMapEncodeTiled refused a tensor (code " + std::to_string(static_cast<int>(status)) + ")");
  return map;
}

/// The maps that a thread made last: a program calls with the same tensors again, and an allocator hands out the same
/// addresses again. A map tells where memory lies, not what it is, so an old one is as good as a new one.
class RecentMaps {
 public:
  const CUtensorMap& of(const Words& words) {
    Entry& entry = entries_[place_of(words)];
    if (std::memcmp(&entry.words, &words, sizeof(Words)) != 0) {
      entry.map = encode(words);
      entry.words = words;
    }
    return entry.map;
  }

 private:
  static constexpr int kPlaceBits = 5;

  struct Entry {
    Words words = {};  // no map has sizes of 0
    CUtensorMap map = {};
  };

  static std::size_t place_of(const Words& words) {
    std::uint64_t hash = words.box_rows;
    for (const std::uint64_t x :
         {std::uint64_t{reinterpret_cast<std::uintptr_t>(words.data)}, words.sizes[1], words.strides[0]})
      hash = (hash ^ x) * 0x9e3779b97f4a7c15;
    return hash >> (64 - kPlaceBits);
  }

  Entry entries_[1 << kPlaceBits];
};

}  // namespace

TensorMap make_tensor_map(const TensorParams& tensor, DType dtype, const MapShape& shape, int box_rows) {
  constexpr std::int64_t kElementBytes = 2;
  constexpr cuuint64_t kAnyStride = 16;  // of a dimension of size 1: never used, but must be a valid one
  thread_local RecentMaps recent;
  TensorMap result;
  result.head_step = shape.heads > 1 && tensor.head == 0 ? 0 : 1;
  result.batch_step = shape.batch > 1 && tensor.batch == 0 ? 0 : 1;
  const auto stride = [](std::int64_t elements) {
    return elements == 0 ? kAnyStride : static_cast<cuuint64_t>(elements * kElementBytes);
  };
  const Words words = {
      tensor.data,
      {static_cast<cuuint64_t>(shape.dim), static_cast<cuuint64_t>(shape.seq),
       static_cast<cuuint64_t>(result.head_step ? shape.heads : 1),
       static_cast<cuuint64_t>(result.batch_step ? shape.batch : 1)},
      {stride(tensor.seq), stride(tensor.head), stride(tensor.batch)},
      static_cast<cuuint32_t>(box_rows),
      dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  };
  result.map = recent.of(words);
  return result;
}

}  // namespace flashcore::detail
