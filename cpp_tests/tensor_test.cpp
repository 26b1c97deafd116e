// DType, Device, TensorView and the DLPack adapter.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "flashcore/dlpack.h"
#include "flashcore/flashcore.h"
#include "support/test_device.h"

namespace flashcore {
namespace {

using testing::kCpu;

template <class Error, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing of that type was thrown";
}

TEST(DType, HasASizeAndAName) {
  const std::vector<std::pair<DType, std::pair<std::size_t, std::string>>> all = {
      {DType::float16, {2, "float16"}}, {DType::bfloat16, {2, "bfloat16"}},       {DType::float32, {4, "float32"}},
      {DType::float64, {8, "float64"}}, {DType::float8_e4m3, {1, "float8_e4m3"}}, {DType::int32, {4, "int32"}},
      {DType::int64, {8, "int64"}},     {DType::boolean, {1, "boolean"}},
  };
  for (const auto& [dtype, expected] : all) {
    EXPECT_EQ(size_of(dtype), expected.first) << expected.second;
    EXPECT_EQ(name_of(dtype), expected.second);
  }
}

TEST(Device, HasAName) {
  EXPECT_EQ(name_of(kCpu), "cpu");
  EXPECT_EQ(name_of(Device{DeviceType::cuda, 3}), "cuda:3");
}

TEST(TensorView, DefaultIsNoTensor) {
  const TensorView none;
  EXPECT_FALSE(none);
  EXPECT_EQ(describe(none), "no tensor");
}

TEST(TensorView, IsDescribedInOneLine) {
  const auto view = [](std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(nullptr, DType::float16, {DeviceType::cuda, 0}, shape);
  };
  EXPECT_EQ(describe(view({2, 8, 512, 64})), "float16 (2, 8, 512, 64) on cuda:0");
  EXPECT_EQ(describe(view({5})), "float16 (5,) on cuda:0");
  EXPECT_EQ(describe(view({})), "float16 () on cuda:0");
}

TEST(TensorView, ContiguousIsRowMajor) {
  float data[24];
  const TensorView view = TensorView::contiguous(data, DType::float32, kCpu, {2, 3, 4});
  EXPECT_TRUE(view);
  EXPECT_EQ(view.data, data);
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(std::vector<std::int64_t>(view.stride.begin(), view.stride.begin() + 3),
            (std::vector<std::int64_t>{12, 4, 1}));
  EXPECT_EQ(TensorView::contiguous(data, DType::float32, kCpu, {}).numel(), 1);
  EXPECT_EQ(TensorView::contiguous(data, DType::float32, kCpu, {3, 0}).numel(), 0);
}

TEST(TensorView, RefusesTooManyDimensionsAndNegativeSizes) {
  const std::string rank = message_of<InvalidArgument>(
      [] { TensorView::contiguous(nullptr, DType::float32, kCpu, {1, 1, 1, 1, 1, 1, 1, 1, 1}); });
  EXPECT_NE(rank.find("rank 9"), std::string::npos) << rank;
  EXPECT_NE(rank.find("rank 8"), std::string::npos) << rank;
  const std::string size =
      message_of<InvalidArgument>([] { TensorView::contiguous(nullptr, DType::float32, kCpu, {2, -3}); });
  EXPECT_NE(size.find("-3"), std::string::npos) << size;
}

// What a program's own dlpack.h declares, as far as the adapter reads it.
struct LocalTensor {
  void* data;
  struct {
    std::int32_t device_type;
    std::int32_t device_id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

TEST(FromDlpack, KeepsShapeStridesAndOffset) {
  float data[64];
  std::int64_t shape[] = {2, 3};
  std::int64_t strides[] = {-8, 2};
  const LocalTensor source = {data, {1, 0}, 2, {2, 32, 1}, shape, strides, 16};
  const TensorView view = from_dlpack(source);
  EXPECT_EQ(view.data, data + 4);
  EXPECT_EQ(view.dtype, DType::float32);
  EXPECT_EQ(view.device, kCpu);
  ASSERT_EQ(view.rank, 2);
  EXPECT_EQ(view.shape[0], 2);
  EXPECT_EQ(view.shape[1], 3);
  EXPECT_EQ(view.stride[0], -8);
  EXPECT_EQ(view.stride[1], 2);
}

TEST(FromDlpack, MissingStridesMeanRowMajor) {
  float data[24];
  std::int64_t shape[] = {2, 3, 4};
  const TensorView view = from_dlpack(LocalTensor{data, {1, 0}, 3, {2, 32, 1}, shape, nullptr, 0});
  EXPECT_EQ(view.stride[0], 12);
  EXPECT_EQ(view.stride[1], 4);
  EXPECT_EQ(view.stride[2], 1);
}

TEST(FromDlpack, KnowsEveryDType) {
  const std::vector<std::pair<std::pair<int, int>, DType>> all = {
      {{2, 16}, DType::float16},     {{4, 16}, DType::bfloat16}, {{2, 32}, DType::float32}, {{2, 64}, DType::float64},
      {{10, 8}, DType::float8_e4m3}, {{0, 32}, DType::int32},    {{0, 64}, DType::int64},   {{6, 8}, DType::boolean},
  };
  for (const auto& [type, dtype] : all)
    EXPECT_EQ(detail::dtype_from_dlpack(type.first, type.second, 1), dtype) << name_of(dtype);
}

TEST(FromDlpack, RefusesOtherDTypesAndListsThoseItKnows) {
  const std::string message = message_of<InvalidType>([] { detail::dtype_from_dlpack(1, 8, 1); });
  EXPECT_NE(message.find("uint8"), std::string::npos) << message;
  for (const char* known : {"float16", "bfloat16", "float32", "float64", "float8_e4m3", "int32", "int64", "boolean"})
    EXPECT_NE(message.find(known), std::string::npos) << message;
  const std::string small = message_of<InvalidType>([] { detail::dtype_from_dlpack(12, 8, 1); });
  EXPECT_NE(small.find("float8_e5m2 given"), std::string::npos) << small;
  EXPECT_THROW(detail::dtype_from_dlpack(2, 32, 4), InvalidType);  // vectors of four floats
  EXPECT_THROW(detail::dtype_from_dlpack(6, 1, 1), InvalidType);
  EXPECT_THROW(detail::dtype_from_dlpack(5, 64, 1), InvalidType);
  EXPECT_THROW(detail::dtype_from_dlpack(99, 8, 1), InvalidType);
}

TEST(FromDlpack, KnowsWhereMemoryIs) {
  EXPECT_EQ(detail::device_from_dlpack(1, 0), kCpu);
  EXPECT_EQ(detail::device_from_dlpack(3, 2), kCpu);  // pinned host memory
  EXPECT_EQ(detail::device_from_dlpack(2, 1), (Device{DeviceType::cuda, 1}));
  EXPECT_EQ(detail::device_from_dlpack(13, 1), (Device{DeviceType::cuda, 1}));  // managed memory
  const std::string message = message_of<InvalidArgument>([] { detail::device_from_dlpack(10, 0); });
  EXPECT_NE(message.find("10"), std::string::npos) << message;
  EXPECT_NE(message.find("CUDA"), std::string::npos) << message;
}

TEST(FromDlpack, RefusesTooManyDimensions) {
  float data[1];
  std::int64_t shape[] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const LocalTensor source = {data, {1, 0}, 9, {2, 32, 1}, shape, nullptr, 0};
  EXPECT_NE(message_of<InvalidArgument>([&] { from_dlpack(source); }).find("rank 9"), std::string::npos);
}

}  // namespace
}  // namespace flashcore
