// Tensor maps (common/tensor_map.h), asked for once and again, against the driver's own.
#include "kernels/common/tensor_map.h"

#include <array>
#include <cstring>
#include <vector>

#include "gpu_test.cuh"

namespace flashcore::testing {
namespace {

struct MapCase {
  std::int64_t first;  // element of the tensor's memory
  detail::MapShape shape;
  std::array<std::int64_t, 3> stride;  // of seq, heads and batch
  int box_rows;
  DType dtype;
};

/// Each case differs from one before in one thing.
std::vector<MapCase> map_cases() {
  std::vector<MapCase> cases;
  for (const DType dtype : {DType::float16, DType::bfloat16})
    for (const int box_rows : {16, 128})
      for (const std::int64_t seq : {40, 48})
        for (const std::int64_t step : {64, 128})
          for (const std::int64_t first : {0, 8, 4096})
            cases.push_back({first, {64, seq, 3, 2}, {step, step * seq, step * seq * 3}, box_rows, dtype});
  return cases;
}

CUtensorMap drivers_map(const MapCase& c, void* data) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
              "looking up cuTensorMapEncodeTiled");
  const auto unsigned64 = [](std::int64_t x) { return static_cast<cuuint64_t>(x); };
  const cuuint64_t sizes[4] = {unsigned64(c.shape.dim), unsigned64(c.shape.seq), unsigned64(c.shape.heads),
                               unsigned64(c.shape.batch)};
  const cuuint64_t strides[3] = {unsigned64(c.stride[0] * 2), unsigned64(c.stride[1] * 2), unsigned64(c.stride[2] * 2)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(c.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, c.dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data,
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw CudaError(static_cast<int>(status), "cuTensorMapEncodeTiled refused a test tensor");
  return map;
}

class CudaTensorMapTest : public HopperTest {};

TEST_F(CudaTensorMapTest, IsTheDriversWhetherItWasMadeBeforeOrNot) {
  const DeviceArray memory = to_device(std::vector<std::uint16_t>(1 << 17), kGpu);
  for (int round = 0; round < 3; ++round)
    for (const MapCase& c : map_cases()) {
      detail::TensorParams tensor;
      tensor.data = static_cast<std::uint16_t*>(memory.data()) + c.first;
      tensor.seq = c.stride[0];
      tensor.head = c.stride[1];
      tensor.batch = c.stride[2];
      const CUtensorMap expected = drivers_map(c, tensor.data);
      for (int again = 0; again < 2; ++again) {
        const detail::TensorMap map = detail::make_tensor_map(tensor, c.dtype, c.shape, c.box_rows);
        EXPECT_EQ(std::memcmp(&map.map, &expected, sizeof expected), 0) << "round " << round;
      }
    }
}

TEST_F(CudaTensorMapTest, RefusedTwiceWhatTheDriverRefuses) {
  detail::TensorParams crooked;  // no address of a tensor map ends in 8
  crooked.data = reinterpret_cast<void*>(std::uintptr_t{8});
  crooked.seq = 64;
  for (int again = 0; again < 2; ++again)
    EXPECT_THROW(detail::make_tensor_map(crooked, DType::float16, {64, 16, 1, 1}, 16), CudaError);
}

}  // namespace
}  // namespace flashcore::testing
