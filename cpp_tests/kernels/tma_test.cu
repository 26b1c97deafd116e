// Tiles by the copy engine (ptx/tma.cuh), every swizzle, against plain indexing on the host.
#include <cuda.h>

#include <array>
#include <string>

#include "gpu_test.cuh"
#include "kernels/ptx/barrier.cuh"
#include "kernels/ptx/tma.cuh"

namespace flashcore::testing {
namespace {

constexpr int kBoxRows = 16;
constexpr std::uint16_t kPoison = 0xffff;

/// A tensor over (dim, seq, heads, batch), 16-bit, with strides of its own. Element values count up from 1.
struct Tensor {
  const char* name;
  std::array<int, 4> size;
  std::array<int, 4> stride;  // in elements; the first is 1

  std::size_t offset(const std::array<int, 4>& at) const {
    int sum = 0;
    for (int axis = 0; axis < 4; ++axis) sum += at[axis] * stride[axis];
    return static_cast<std::size_t>(sum);
  }
  bool has(const std::array<int, 4>& at) const {
    for (int axis = 0; axis < 4; ++axis)
      if (at[axis] < 0 || at[axis] >= size[axis]) return false;
    return true;
  }
  std::size_t elements() const { return offset({size[0] - 1, size[1] - 1, size[2] - 1, size[3] - 1}) + 1; }
};

// dim is no multiple of any box, rows stand 8 elements apart in the second, so that what lies between must stay.
constexpr Tensor kTensors[] = {
    {"bhsd", {72, 21, 3, 2}, {1, 72, 72 * 21, 72 * 21 * 3}},
    {"bshd_with_gaps", {72, 21, 3, 2}, {1, 80 * 3, 80, 80 * 3 * 21}},
};

/// Boxes inside, across each border, and wholly outside. The last one is for loads alone: a store that begins before
/// the tensor is an illegal instruction on an H200.
constexpr std::array<int, 4> kPlaces[] = {{0, 0, 0, 0}, {16, 5, 2, 1}, {64, 16, 0, 1},
                                          {8, 2, 3, 0}, {72, 0, 0, 0}, {-8, -3, 1, 0}};
constexpr std::size_t kStorePlaces = std::size(kPlaces) - 1;

struct Swizzle {
  CUtensorMapSwizzle mode;
  int span;  // bytes; 0: none
};
constexpr Swizzle kSwizzles[] = {{CU_TENSOR_MAP_SWIZZLE_NONE, 0},
                                 {CU_TENSOR_MAP_SWIZZLE_32B, 32},
                                 {CU_TENSOR_MAP_SWIZZLE_64B, 64},
                                 {CU_TENSOR_MAP_SWIZZLE_128B, 128}};

int box_columns(const Swizzle& swizzle) { return swizzle.span == 0 ? 48 : swizzle.span / 2; }
int box_bytes(const Swizzle& swizzle) { return box_columns(swizzle) * 2 * kBoxRows; }

CUtensorMap make_map(const Tensor& tensor, const Swizzle& swizzle, void* data) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cuda::check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
              "looking up cuTensorMapEncodeTiled");
  cuuint64_t size[4];
  cuuint64_t stride[3];
  for (int axis = 0; axis < 4; ++axis) size[axis] = static_cast<cuuint64_t>(tensor.size[axis]);
  for (int axis = 0; axis < 3; ++axis) stride[axis] = static_cast<cuuint64_t>(tensor.stride[axis + 1]) * 2;
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns(swizzle)), kBoxRows, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, data, size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle.mode, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw CudaError(static_cast<int>(status), "cuTensorMapEncodeTiled refused a test tensor");
  return map;
}

struct Place {
  int at[4];
};

/// Loads two boxes on one barrier, each with its cache hint, one behind the other, and copies both out.
__global__ void load_boxes(const __grid_constant__ CUtensorMap map, Place first, Place second, int bytes,
                           unsigned char* out) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const std::uint32_t s_base = ptx::shared_address(s_memory);
  const int room = (bytes + 1023) / 1024 * 1024;  // swizzled tiles start on 1024 bytes
  const std::uint32_t barrier = s_base + 2 * room;
  for (int n = static_cast<int>(threadIdx.x); n < 2 * room; n += static_cast<int>(blockDim.x)) s_memory[n] = 0xff;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barrier_init();
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::barrier_expect(barrier, 2 * bytes);
    ptx::tma_load(s_base, &map, barrier, first.at[0], first.at[1], first.at[2], first.at[3], ptx::kEvictFirst);
    ptx::tma_load(s_base + room, &map, barrier, second.at[0], second.at[1], second.at[2], second.at[3],
                  ptx::kEvictLast);
  }
  ptx::barrier_wait(barrier, 0);
  for (int n = static_cast<int>(threadIdx.x); n < bytes; n += static_cast<int>(blockDim.x)) {
    out[n] = s_memory[n];
    out[bytes + n] = s_memory[room + n];
  }
}

/// Stores two boxes in a group each and spoils their buffers as soon as the waits allow.
__global__ void store_boxes(const __grid_constant__ CUtensorMap map, const unsigned char* boxes, int bytes, Place first,
                            Place second) {
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const std::uint32_t s_base = ptx::shared_address(s_memory);
  const int room = (bytes + 1023) / 1024 * 1024;
  for (int n = static_cast<int>(threadIdx.x); n < bytes; n += static_cast<int>(blockDim.x)) {
    s_memory[n] = boxes[n];
    s_memory[room + n] = boxes[bytes + n];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  ptx::tma_store(&map, s_base, first.at[0], first.at[1], first.at[2], first.at[3]);
  ptx::bulk_commit();
  ptx::tma_store(&map, s_base + room, second.at[0], second.at[1], second.at[2], second.at[3]);
  ptx::bulk_commit();
  ptx::bulk_wait_read<1>();
  for (int n = 0; n < bytes; ++n) s_memory[n] = 0xee;
  ptx::bulk_wait_read<0>();
  for (int n = 0; n < bytes; ++n) s_memory[room + n] = 0xee;
}

/// Calls visit(where the element lies in the box's bytes / 2, its index in the tensor) for each element of a box.
template <class Visit>
void for_each_in_box(const Swizzle& swizzle, const std::array<int, 4>& place, const Visit& visit) {
  const int columns = box_columns(swizzle);
  for (int row = 0; row < kBoxRows; ++row)
    for (int column = 0; column < columns; ++column)
      visit(static_cast<std::size_t>(swizzled((row * columns + column) * 2, swizzle.span) / 2),
            std::array<int, 4>{place[0] + column, place[1] + row, place[2], place[3]});
}

std::vector<std::uint16_t> counted(const Tensor& tensor) {
  std::vector<std::uint16_t> values(tensor.elements());
  for (std::size_t n = 0; n < values.size(); ++n) values[n] = static_cast<std::uint16_t>(n + 1);
  return values;
}

Place place_of(const std::array<int, 4>& at) { return {{at[0], at[1], at[2], at[3]}}; }

struct TmaCase {
  Tensor tensor;
  Swizzle swizzle;
};

std::vector<TmaCase> all_cases() {
  std::vector<TmaCase> cases;
  for (const Tensor& tensor : kTensors)
    for (const Swizzle& swizzle : kSwizzles) cases.push_back({tensor, swizzle});
  return cases;
}

std::ostream& operator<<(std::ostream& os, const TmaCase& c) {
  return os << c.tensor.name << ", swizzle " << c.swizzle.span;
}

class CudaTmaTest : public HopperTest, public ::testing::WithParamInterface<TmaCase> {
 protected:
  int shared_bytes() const { return 2 * ((box_bytes(GetParam().swizzle) + 1023) / 1024 * 1024) + 8; }
};

TEST_P(CudaTmaTest, LoadsABoxAndFillsUpWithZeros) {
  const Tensor& tensor = GetParam().tensor;
  const Swizzle& swizzle = GetParam().swizzle;
  const std::vector<std::uint16_t> values = counted(tensor);
  const DeviceArray data = to_device(values, kGpu);
  const CUtensorMap map = make_map(tensor, swizzle, data.data());
  const std::size_t elements = static_cast<std::size_t>(box_bytes(swizzle)) / 2;
  for (std::size_t n = 0; n < std::size(kPlaces); ++n) {
    const std::array<int, 4>& first = kPlaces[n];
    const std::array<int, 4>& second = kPlaces[(n + 1) % std::size(kPlaces)];
    const Results<std::uint16_t> loaded(2 * elements);
    run_kernel(load_boxes, 1, 128, shared_bytes(), map, place_of(first), place_of(second), box_bytes(swizzle),
               reinterpret_cast<unsigned char*>(loaded.data()));
    std::vector<std::uint16_t> expected(2 * elements, kPoison);
    for_each_in_box(swizzle, first, [&](std::size_t in_box, const std::array<int, 4>& at) {
      expected[in_box] = tensor.has(at) ? values[tensor.offset(at)] : 0;
    });
    for_each_in_box(swizzle, second, [&](std::size_t in_box, const std::array<int, 4>& at) {
      expected[elements + in_box] = tensor.has(at) ? values[tensor.offset(at)] : 0;
    });
    EXPECT_EQ(loaded.host(), expected) << "places " << n << " and the next";
  }
}

TEST_P(CudaTmaTest, StoresWhatLiesInsideAndNothingElse) {
  const Tensor& tensor = GetParam().tensor;
  const Swizzle& swizzle = GetParam().swizzle;
  const std::size_t elements = static_cast<std::size_t>(box_bytes(swizzle)) / 2;
  std::vector<std::uint16_t> boxes(2 * elements);
  for (std::size_t n = 0; n < boxes.size(); ++n) boxes[n] = static_cast<std::uint16_t>(n + 1);
  const DeviceArray source = to_device(boxes, kGpu);
  for (std::size_t n = 0; n < kStorePlaces; ++n) {
    const std::array<int, 4>& first = kPlaces[n];
    std::array<int, 4> second = first;
    second[3] = 1 - first[3];  // the same box of the other batch: they never overlap
    const Results<std::uint16_t> stored(tensor.elements());
    const CUtensorMap map = make_map(tensor, swizzle, stored.data());
    run_kernel(store_boxes, 1, 128, shared_bytes(), map, static_cast<const unsigned char*>(source.data()),
               box_bytes(swizzle), place_of(first), place_of(second));
    std::vector<std::uint16_t> expected(tensor.elements(), kPoison);
    for_each_in_box(swizzle, first, [&](std::size_t in_box, const std::array<int, 4>& at) {
      if (tensor.has(at)) expected[tensor.offset(at)] = boxes[in_box];
    });
    for_each_in_box(swizzle, second, [&](std::size_t in_box, const std::array<int, 4>& at) {
      if (tensor.has(at)) expected[tensor.offset(at)] = boxes[elements + in_box];
    });
    EXPECT_EQ(stored.host(), expected) << "place " << n;
  }
}

INSTANTIATE_TEST_SUITE_P(Boxes, CudaTmaTest, ::testing::ValuesIn(all_cases()), [](const auto& info) {
  return std::string(info.param.tensor.name) + "_swizzle_" + std::to_string(info.param.swizzle.span);
});

}  // namespace
}  // namespace flashcore::testing
