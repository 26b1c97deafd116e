// vector_add and reduce: every dtype, rank, stride and axis against float64, and every bad call refused.
#include "flashcore/primitives.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <typeinfo>
#include <vector>

#include "flashcore/flashcore.h"
#include "support/float_formats.h"
#include "support/random.h"
#include "support/strided_array.h"
#include "support/test_device.h"

namespace flashcore {
namespace {

using testing::layouts;
using testing::Random;
using testing::Sizes;
using Array = testing::StridedArray;

constexpr DType kDTypes[] = {DType::float16, DType::bfloat16, DType::float32, DType::float64};
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::int64_t product(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{1}, std::multiplies<>());
}

void expect_equal(const std::vector<double>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const bool same = std::isnan(expected[i]) ? std::isnan(actual[i]) : actual[i] == expected[i];
    ASSERT_TRUE(same) << "element " << i << ": " << actual[i] << " instead of " << expected[i];
  }
}

class PrimitivesTest : public ::testing::TestWithParam<std::tuple<Device, DType>> {
 protected:
  Device device() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  Array array(const Sizes& shape) const { return Array(device(), dtype(), shape); }
  Array array(const Sizes& shape, const Sizes& stride) const { return Array(device(), dtype(), shape, stride); }
  double round(double x) const { return testing::rounded(dtype(), x); }
};

std::string parameter_name(const ::testing::TestParamInfo<std::tuple<Device, DType>>& info) {
  return testing::test_name(std::get<0>(info.param)) + "_" + name_of(std::get<1>(info.param));
}

const auto kEverywhere = ::testing::Combine(::testing::ValuesIn(testing::test_devices()), ::testing::ValuesIn(kDTypes));

// ---- vector_add -----------------------------------------------------------------------------------------------------

class VectorAdd : public PrimitivesTest {};
INSTANTIATE_TEST_SUITE_P(Devices, VectorAdd, kEverywhere, parameter_name);

/// The sum of two numbers of a format is exact in float64 or rounds innocuously: one rounding is all there may be.
TEST_P(VectorAdd, AddsEveryRankAndLayoutExactly) {
  Random random(42);
  for (const Sizes& shape : {Sizes{}, {1}, {1000}, {7, 9}, {3, 1, 5}, {2, 3, 4, 5}, {2, 1, 2, 1, 3, 1, 2, 3}}) {
    for (const Sizes& stride_a : layouts(shape)) {
      for (const Sizes& stride_out : layouts(shape)) {
        const Array a = array(shape, stride_a).fill_random(random);
        const Array b = array(shape, stride_out).fill_random(random);
        const Array out = array(shape, stride_out);
        const std::vector<unsigned char> before = out.bytes();
        vector_add(a.view(), b.view(), out.view());
        std::vector<double> expected = a.values();
        const std::vector<double> summands = b.values();
        for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = round(expected[i] + summands[i]);
        expect_equal(out.values(), expected);
        EXPECT_EQ(out.strays(before), 0);
      }
    }
  }
}

TEST_P(VectorAdd, AddsLongVectorsOfEveryAlignment) {
  Random random(7);
  for (const std::int64_t size : {31, 4096, 70001}) {  // less than a vector a thread, some blocks, a ragged end
    for (const std::int64_t skip : {0, 1, 3}) {
      Array a = array({size + skip}).fill_random(random);
      Array b = array({size + skip}).fill_random(random);
      const Array out = array({size + skip});
      const auto part = [&](const Array& whole) {
        TensorView view = whole.view();
        view.shape[0] = size;
        view.data = static_cast<char*>(view.data) + skip * static_cast<std::int64_t>(size_of(dtype()));
        return view;
      };
      vector_add(part(a), part(b), part(out));
      std::vector<double> expected = out.values();
      const std::vector<double> x = a.values();
      const std::vector<double> y = b.values();
      for (std::int64_t i = 0; i < skip; ++i) ASSERT_EQ(expected[i], 77.0);
      for (std::int64_t i = skip; i < size + skip; ++i) expected[i] = round(x[i] + y[i]);
      expect_equal(out.values(), expected);
    }
  }
}

/// Sizes that threads of the CPU share: by lines, and by parts of one.
TEST_P(VectorAdd, AddsWhatThreadsShare) {
  Random random(8);
  for (const Sizes& shape : {Sizes{200001}, {700, 301}, {3, 70001}}) {
    const Array a = array(shape).fill_random(random);
    const Array b = array(shape, layouts(shape).back()).fill_random(random);
    const Array out = array(shape);
    vector_add(a.view(), b.view(), out.view());
    const std::vector<double> x = a.values();
    std::vector<double> sum = b.values();
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = round(x[i] + sum[i]);
    expect_equal(out.values(), sum);
  }
}

TEST_P(VectorAdd, ReadsBroadcastInputs) {
  Random random(1);
  const Array a = array({3, 4}, {0, 1}).fill_random(random);
  const Array b = array({3, 4}, {1, 0}).fill_random(random);
  const Array out = array({3, 4});
  vector_add(a.view(), b.view(), out.view());
  std::vector<double> expected = a.values();
  const std::vector<double> summands = b.values();
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = round(expected[i] + summands[i]);
  expect_equal(out.values(), expected);
}

TEST_P(VectorAdd, WorksInPlace) {
  Random random(2);
  const Array a = array({5, 6}, {1, 5}).fill_random(random);
  const Array b = array({5, 6}).fill_random(random);
  std::vector<double> expected = a.values();
  const std::vector<double> summands = b.values();
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = round(expected[i] + summands[i]);
  vector_add(a.view(), b.view(), a.view());
  expect_equal(a.values(), expected);
  vector_add(b.view(), b.view(), b.view());
  std::vector<double> doubled = summands;
  for (double& x : doubled) x = round(2 * x);
  expect_equal(b.values(), doubled);
}

TEST_P(VectorAdd, WritesBetweenTheElementsOfItsInputs) {
  Random random(3);
  const Array packed = array({20, 3}).fill_random(random);
  const std::vector<double> before = packed.values();
  const auto column = [&](int n) {
    TensorView view = packed.view();
    view.rank = 1;
    view.data = static_cast<char*>(view.data) + n * static_cast<std::int64_t>(size_of(dtype()));
    return view;
  };
  vector_add(column(0), column(1), column(2));
  std::vector<double> expected = before;
  for (std::size_t i = 0; i < 20; ++i) expected[3 * i + 2] = round(before[3 * i] + before[3 * i + 1]);
  expect_equal(packed.values(), expected);
}

TEST_P(VectorAdd, KeepsNaNInfinityAndOverflow) {
  const double largest = dtype() == DType::float16    ? 65504
                         : dtype() == DType::bfloat16 ? 3.3895313892515355e38
                         : dtype() == DType::float32  ? std::numeric_limits<float>::max()
                                                      : std::numeric_limits<double>::max();
  Array a = array({5});
  Array b = array({5});
  const Array out = array({5});
  a.set({kNaN, kInfinity, kInfinity, largest, -largest});
  b.set({1, 1, -kInfinity, largest, largest});
  vector_add(a.view(), b.view(), out.view());
  expect_equal(out.values(), {kNaN, kInfinity, kNaN, kInfinity, 0});
}

TEST_P(VectorAdd, KeepsSubnormalNumbers) {
  const double smallest = testing::decode(dtype(), 1);
  Array a = array({1});
  Array b = array({1});
  const Array out = array({1});
  a.set({smallest});
  b.set({2 * smallest});
  vector_add(a.view(), b.view(), out.view());
  expect_equal(out.values(), {3 * smallest});
}

TEST_P(VectorAdd, OfNothingDoesNothing) {
  TensorView empty = TensorView::contiguous(nullptr, dtype(), device(), {3, 0, 2});
  EXPECT_NO_THROW(vector_add(empty, empty, empty));
}

// ---- reduce ---------------------------------------------------------------------------------------------------------

class Reduce : public PrimitivesTest {};
INSTANTIATE_TEST_SUITE_P(Devices, Reduce, kEverywhere, parameter_name);

struct Expected {
  double value;
  double tolerance;
};

/// The reduction of `terms` in float64, and how far a sum taken in float32 (float64) in any order, rounded once to the
/// dtype, may be from it: each of n additions is off by half a unit of the accumulator, relative to Σ|x| at most.
Expected expected_of(ReduceOp op, const std::vector<double>& terms, DType dtype) {
  if (op == ReduceOp::max) return {*std::max_element(terms.begin(), terms.end()), 0};
  if (op == ReduceOp::min) return {*std::min_element(terms.begin(), terms.end()), 0};
  long double sum = 0;
  long double magnitude = 0;
  for (const double term : terms) {
    sum += term;
    magnitude += std::abs(term);
  }
  const double unit = testing::unit_roundoff(dtype == DType::float64 ? DType::float64 : DType::float32);
  const auto count = static_cast<double>(terms.size());
  const double divisor = op == ReduceOp::mean ? count : 1;
  const auto value = static_cast<double>(sum / divisor);
  const double accumulated = unit * (count + 1) * static_cast<double>(magnitude) / divisor;
  return {value, accumulated + (std::abs(value) + accumulated) * testing::unit_roundoff(dtype) * 1.001};
}

/// The terms of each result, results in row-major order. `axis` -1: all.
std::vector<std::vector<double>> groups_of(const Sizes& shape, const std::vector<double>& values, int axis) {
  if (axis < 0) return {values};
  const std::int64_t inner = product(Sizes(shape.begin() + axis + 1, shape.end()));
  const std::int64_t outer = product(Sizes(shape.begin(), shape.begin() + axis));
  std::vector<std::vector<double>> groups;
  for (std::int64_t o = 0; o < outer; ++o)
    for (std::int64_t i = 0; i < inner; ++i) {
      groups.emplace_back();
      for (std::int64_t k = 0; k < shape[axis]; ++k) groups.back().push_back(values[(o * shape[axis] + k) * inner + i]);
    }
  return groups;
}

Sizes without(Sizes shape, int axis) {
  shape.erase(shape.begin() + axis);
  return shape;
}

void expect_reduced(const Array& out, const Array& x, const Sizes& shape, ReduceOp op, int axis) {
  const auto groups = groups_of(shape, x.values(), axis);
  const std::vector<double> actual = out.values();
  ASSERT_EQ(actual.size(), groups.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const Expected expected = expected_of(op, groups[i], x.view().dtype);
    ASSERT_LE(std::abs(actual[i] - expected.value), expected.tolerance)
        << "result " << i << ": " << actual[i] << " instead of " << expected.value;
  }
}

constexpr ReduceOp kOps[] = {ReduceOp::sum, ReduceOp::max, ReduceOp::min, ReduceOp::mean};

TEST_P(Reduce, EveryAxisOfEveryLayout) {
  Random random(42);
  for (const Sizes& shape : {Sizes{1}, {257}, {7, 9}, {3, 1, 5}, {2, 33, 4, 5}, {2, 1, 2, 1, 3, 1, 2, 3}}) {
    for (const Sizes& stride : layouts(shape)) {
      const Array x = array(shape, stride).fill_random(random);
      const int rank = static_cast<int>(shape.size());
      for (int axis = 0; axis < rank; ++axis) {
        for (const ReduceOp op : kOps) {
          SCOPED_TRACE(describe(x.view()) + " axis " + std::to_string(axis) + " op " +
                       std::to_string(static_cast<int>(op)));
          const Sizes kept = without(shape, axis);
          const Array out = array(kept, layouts(kept).back());
          const std::vector<unsigned char> before = out.bytes();
          reduce(x.view(), out.view(), op, axis);
          expect_reduced(out, x, shape, op, axis);
          EXPECT_EQ(out.strays(before), 0);
        }
      }
    }
  }
}

TEST_P(Reduce, AllAxesOfEveryLayout) {
  Random random(43);
  for (const Sizes& shape : {Sizes{}, {1}, {257}, {7, 9}, {2, 33, 4, 5}}) {
    for (const Sizes& stride : layouts(shape)) {
      const Array x = array(shape, stride).fill_random(random);
      for (const ReduceOp op : kOps) {
        SCOPED_TRACE(describe(x.view()) + " op " + std::to_string(static_cast<int>(op)));
        const Array out = array({});
        reduce(x.view(), out.view(), op);
        expect_reduced(out, x, shape, op, -1);
      }
    }
  }
}

/// Sizes that are reduced by some lanes, by warps, by blocks, by columns, and in chunks; in the middle as well.
TEST_P(Reduce, LongAndWideAxes) {
  Random random(44);
  for (const Sizes& shape : {Sizes{300, 20}, {20, 300}, {3, 2100}, {2100, 3}, {2, 1500, 40}, {3, 37, 290}, {40001}}) {
    const Array x = array(shape).fill_random(random);
    for (int axis = 0; axis < static_cast<int>(shape.size()); ++axis)
      for (const ReduceOp op : kOps) {
        SCOPED_TRACE(describe(x.view()) + " axis " + std::to_string(axis) + " op " +
                     std::to_string(static_cast<int>(op)));
        const Sizes kept = without(shape, axis);
        const Array out = array(kept);
        reduce(x.view(), out.view(), op, axis);
        expect_reduced(out, x, shape, op, axis);
      }
  }
}

/// Where the array begins decides how it can be read, not what comes out.
TEST_P(Reduce, IsTheSameAtEveryAddress) {
  Random random(45);
  for (const Sizes& shape : {Sizes{9, 2100}, {2100, 24}}) {
    const Array plain = array(shape).fill_random(random);
    Array shifted = array({product(shape) + 1});
    std::vector<double> values = plain.values();
    values.insert(values.begin(), 0.0);
    shifted.set(values);
    TensorView moved = plain.view();
    moved.data = static_cast<char*>(shifted.view().data) + size_of(dtype());
    for (int axis = 0; axis < 2; ++axis) {
      const Array one = array(without(shape, axis));
      const Array other = array(without(shape, axis));
      reduce(plain.view(), one.view(), ReduceOp::sum, axis);
      reduce(moved, other.view(), ReduceOp::sum, axis);
      EXPECT_EQ(one.bytes(), other.bytes()) << describe(plain.view()) << " axis " << axis;
    }
  }
}

TEST_P(Reduce, NegativeAxesCountFromTheEnd) {
  Random random(4);
  const Array x = array({2, 3, 4}).fill_random(random);
  for (int axis = 0; axis < 3; ++axis) {
    const Array front = array(without({2, 3, 4}, axis));
    const Array back = array(without({2, 3, 4}, axis));
    reduce(x.view(), front.view(), ReduceOp::sum, axis);
    reduce(x.view(), back.view(), ReduceOp::sum, axis - 3);
    expect_equal(back.values(), front.values());
  }
}

TEST_P(Reduce, ReadsBroadcastInputs) {
  Random random(5);
  const Sizes shape = {6, 5};
  const Array x = array(shape, {0, 1}).fill_random(random);
  for (int axis = 0; axis < 2; ++axis) {
    const Array out = array(without(shape, axis));
    reduce(x.view(), out.view(), ReduceOp::sum, axis);
    expect_reduced(out, x, shape, ReduceOp::sum, axis);
  }
}

/// A running float32 sum of so many equal terms would be off by more than a percent.
TEST_P(Reduce, LongSumsStayAccurate) {
  constexpr std::int64_t kSize = 1 << 20;
  Array x = array({kSize});
  x.set(std::vector<double>(kSize, 0.01));
  const double term = round(0.01);
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::mean}) {
    const Array out = array({});
    reduce(x.view(), out.view(), op);
    const double exact = op == ReduceOp::sum ? term * kSize : term;
    const double unit = testing::unit_roundoff(dtype() == DType::float64 ? DType::float64 : DType::float32);
    EXPECT_NEAR(out.values()[0], exact, exact * (testing::unit_roundoff(dtype()) + 256 * unit));
  }
}

TEST_P(Reduce, IsTheSameFromRunToRun) {
  Random random(6);
  const Array x = array({50000}).fill_random(random);
  const Array first = array({});
  reduce(x.view(), first.view(), ReduceOp::sum);
  for (int run = 0; run < 3; ++run) {
    const Array again = array({});
    reduce(x.view(), again.view(), ReduceOp::sum);
    EXPECT_EQ(again.bytes(), first.bytes());
  }
}

/// Sizes that threads of the CPU share: by results, by columns, by pieces of one result, the last ones not whole.
TEST_P(Reduce, IsTheSameWithAnyNumberOfThreads) {
  if (device().type != DeviceType::cpu) GTEST_SKIP() << "the CPU's threads";
  const int before = num_threads();
  Random random(7);
  for (const Sizes& shape : {Sizes{140001}, {2, 70001}, {70001, 2}, {700, 101}}) {
    const Array x = array(shape).fill_random(random);
    for (int axis = -1; axis < static_cast<int>(shape.size()); ++axis)
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::min}) {
        SCOPED_TRACE(describe(x.view()) + " axis " + std::to_string(axis) + " op " +
                     std::to_string(static_cast<int>(op)));
        const Array alone = array(axis < 0 ? Sizes{} : without(shape, axis));
        const Array shared = array(axis < 0 ? Sizes{} : without(shape, axis));
        const auto run = [&](int threads, const Array& out) {
          set_num_threads(threads);
          axis < 0 ? reduce(x.view(), out.view(), op) : reduce(x.view(), out.view(), op, axis);
        };
        run(1, alone);
        run(5, shared);
        expect_reduced(alone, x, shape, op, axis);
        EXPECT_EQ(shared.bytes(), alone.bytes());
      }
  }
  set_num_threads(before);
}

TEST_P(Reduce, NaNAnywhereGivesNaN) {
  Random random(8);
  const Sizes shape = {3, 300};
  for (const std::int64_t place : {0, 1, 150, 299}) {
    Array x = array(shape).fill_random(random);
    std::vector<double> values = x.values();
    values[300 + place] = kNaN;  // in the middle row
    x.set(values);
    for (const ReduceOp op : kOps) {
      SCOPED_TRACE("place " + std::to_string(place) + " op " + std::to_string(static_cast<int>(op)));
      const Array rows = array({3});
      reduce(x.view(), rows.view(), op, 1);
      EXPECT_FALSE(std::isnan(rows.values()[0]));
      EXPECT_TRUE(std::isnan(rows.values()[1]));
      EXPECT_FALSE(std::isnan(rows.values()[2]));
      const Array all = array({});
      reduce(x.view(), all.view(), op);
      EXPECT_TRUE(std::isnan(all.values()[0]));
    }
  }
}

TEST_P(Reduce, KnowsInfinity) {
  Array x = array({2, 2});
  x.set({-kInfinity, -kInfinity, kInfinity, -1});
  const Array out = array({2});
  const auto reduced = [&](ReduceOp op) {
    reduce(x.view(), out.view(), op, 1);
    return out.values();
  };
  expect_equal(reduced(ReduceOp::max), {-kInfinity, kInfinity});
  expect_equal(reduced(ReduceOp::min), {-kInfinity, -1});
  expect_equal(reduced(ReduceOp::sum), {-kInfinity, kInfinity});
}

TEST_P(Reduce, OfNoElements) {
  const Array x = array({0, 3});
  const Array out = array({3});
  reduce(x.view(), out.view(), ReduceOp::sum, 0);
  expect_equal(out.values(), {0, 0, 0});
  reduce(x.view(), out.view(), ReduceOp::mean, 0);
  expect_equal(out.values(), {kNaN, kNaN, kNaN});
  const std::vector<unsigned char> before = out.bytes();
  EXPECT_THROW(reduce(x.view(), out.view(), ReduceOp::max, 0), InvalidArgument);
  EXPECT_THROW(reduce(x.view(), out.view(), ReduceOp::min, 0), InvalidArgument);
  EXPECT_EQ(out.bytes(), before);

  const Array one = array({});
  reduce(x.view(), one.view(), ReduceOp::sum);
  expect_equal(one.values(), {0});
}

TEST_P(Reduce, ToNoResultsDoesNothing) {
  const TensorView x = TensorView::contiguous(nullptr, dtype(), device(), {0, 3});
  const TensorView out = TensorView::contiguous(nullptr, dtype(), device(), {0});
  for (const ReduceOp op : kOps) EXPECT_NO_THROW(reduce(x, out, op, 1));
}

// ---- bad input ------------------------------------------------------------------------------------------------------

struct BadCall {
  const char* what;
  std::function<void()> call;
  std::vector<std::string> says;
};

TensorView with(TensorView view, const std::function<void(TensorView&)>& change) {
  change(view);
  return view;
}

/// Each call throws exactly `Error`, says what it must, and leaves every byte of the arrays as it was.
template <class Error>
void expect_refused(const std::vector<BadCall>& calls, const std::vector<const Array*>& arrays) {
  std::vector<std::vector<unsigned char>> before;
  for (const Array* array : arrays) before.push_back(array->bytes());
  for (const BadCall& bad : calls) {
    SCOPED_TRACE(bad.what);
    std::string message;
    try {
      bad.call();
      ADD_FAILURE() << "was not refused";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(typeid(error), typeid(Error));
      message = error.what();
    }
    for (const std::string& part : bad.says) EXPECT_NE(message.find(part), std::string::npos) << message;
    for (std::size_t i = 0; i < arrays.size(); ++i) EXPECT_EQ(arrays[i]->bytes(), before[i]) << "array " << i;
  }
}

class BadInput : public ::testing::TestWithParam<Device> {
 protected:
  Device device() const { return GetParam(); }

  const Array a_{device(), DType::float32, {3, 4}};
  const Array b_{device(), DType::float32, {3, 4}};
  const Array out_{device(), DType::float32, {3, 4}};
  const Array half_{device(), DType::float16, {3, 4}};
  const Array row_{device(), DType::float32, {4}};
  const TensorView a = a_.view();
  const TensorView b = b_.view();
  const TensorView out = out_.view();
  const TensorView half = half_.view();
  const TensorView row = row_.view();
  const std::vector<const Array*> arrays = {&a_, &b_, &out_, &half_, &row_};
};

INSTANTIATE_TEST_SUITE_P(Devices, BadInput, ::testing::ValuesIn(testing::test_devices()),
                         [](const auto& info) { return testing::test_name(info.param); });

TEST_P(BadInput, VectorAddRefusesDTypes) {
  const TensorView integers = with(a, [](TensorView& t) { t.dtype = DType::int32; });
  expect_refused<InvalidType>(
      {
          {"integers", [&] { vector_add(integers, integers, integers); }, {"int32 (3, 4)", "float16", "float64"}},
          {"mixed inputs", [&] { vector_add(a, half, out); }, {"b is float16", "a is float32"}},
          {"mixed output", [&] { vector_add(a, b, half); }, {"out is float16", "a is float32"}},
      },
      arrays);
}

TEST_P(BadInput, VectorAddRefusesShapesAndMemory) {
  const auto moved = [&](const TensorView& t, std::int64_t bytes) {
    return with(t, [bytes](TensorView& view) { view.data = static_cast<char*>(view.data) + bytes; });
  };
  const TensorView smaller = with(a, [](TensorView& t) { t.shape[1] = 3; });
  const TensorView negative = with(a, [](TensorView& t) { t.shape[0] = -3; });
  const TensorView folded = with(out, [](TensorView& t) { t.stride[0] = 0; });
  const TensorView null = with(a, [](TensorView& t) { t.data = nullptr; });
  const TensorView elsewhere = with(a, [this](TensorView& t) {
    t.device = device().type == DeviceType::cpu ? Device{DeviceType::cuda, 0} : Device{DeviceType::cpu, 0};
  });
  const TensorView none = {};
  expect_refused<InvalidArgument>(
      {
          {"missing a", [&] { vector_add(none, b, out); }, {"a is missing"}},
          {"missing b", [&] { vector_add(a, none, out); }, {"b is missing"}},
          {"missing out", [&] { vector_add(a, b, none); }, {"out is missing"}},
          {"another rank", [&] { vector_add(a, row, out); }, {"(4,)", "(3, 4)"}},
          {"another size", [&] { vector_add(a, b, smaller); }, {"out", "(3, 3)", "(3, 4)"}},
          {"negative size", [&] { vector_add(negative, b, out); }, {"-3"}},
          {"null input", [&] { vector_add(a, null, out); }, {"b", "null"}},
          {"null output", [&] { vector_add(a, b, null); }, {"out", "null"}},
          {"two devices", [&] { vector_add(a, elsewhere, out); }, {"cpu", "cuda:0"}},
          {"out folded", [&] { vector_add(a, b, folded); }, {"out", "share memory"}},
          {"out overlaps a", [&] { vector_add(a, b, moved(a, 4)); }, {"out overlaps a"}},
          {"out overlaps b", [&] { vector_add(a, b, moved(b, -4)); }, {"out overlaps b"}},
          {"misaligned", [&] { vector_add(moved(a, 2), b, out); }, {"a", "multiple"}},
      },
      arrays);
}

TEST_P(BadInput, ReduceRefusesAxesShapesAndMemory) {
  const TensorView scalar = with(row, [](TensorView& t) { t.rank = 0; });
  const TensorView null = with(row, [](TensorView& t) { t.data = nullptr; });
  const TensorView folded = with(row, [](TensorView& t) { t.stride[0] = 0; });
  const TensorView empty = with(a, [](TensorView& t) { t.shape[0] = 0; });
  const TensorView inside = with(a, [](TensorView& t) {
    t.rank = 1;
    t.shape[0] = 4;
    t.stride[0] = 1;
  });
  const auto sum = ReduceOp::sum;
  expect_refused<InvalidArgument>(
      {
          {"missing x", [&] { reduce({}, row, sum, 0); }, {"x is missing"}},
          {"missing out", [&] { reduce(a, {}, sum, 0); }, {"out is missing"}},
          {"axis too large", [&] { reduce(a, row, sum, 2); }, {"axis 2", "-2 to 1"}},
          {"axis too small", [&] { reduce(a, row, sum, -3); }, {"axis -3", "-2 to 1"}},
          {"axis of a scalar", [&] { reduce(scalar, with(out, [](auto& t) { t.rank = 0; }), sum, 0); }, {"axis 0"}},
          {"out of the other axis", [&] { reduce(a, row, sum, 1); }, {"(4,)", "(3,)", "axis 1"}},
          {"out of x's shape", [&] { reduce(a, out, sum, 0); }, {"(3, 4)", "(4,)"}},
          {"out too large for all", [&] { reduce(a, row, sum); }, {"(4,)", "()"}},
          {"null out", [&] { reduce(a, null, sum, 0); }, {"out", "null"}},
          {"out folded", [&] { reduce(a, folded, sum, 0); }, {"out", "share memory"}},
          {"out inside x", [&] { reduce(a, inside, sum, 0); }, {"out overlaps x"}},
          {"unknown op", [&] { reduce(a, row, static_cast<ReduceOp>(9), 0); }, {"9", "sum"}},
          {"empty max", [&] { reduce(empty, row, ReduceOp::max, 0); }, {"(0, 4)", "maximum"}},
          {"empty min", [&] { reduce(empty, row, ReduceOp::min, 0); }, {"(0, 4)", "minimum"}},
      },
      arrays);
  expect_refused<InvalidType>({{"mixed dtypes", [&] { reduce(half, row, sum, 0); }, {"float32", "float16"}}}, arrays);
}

TEST(BadDevice, OneThatDoesNotExistIsUnsupported) {
  float data[2] = {};
  const TensorView view = TensorView::contiguous(data, DType::float32, {DeviceType::cuda, device_count()}, {1});
  const TensorView other = TensorView::contiguous(data + 1, DType::float32, view.device, {1});
  EXPECT_THROW(vector_add(view, view, other), Unsupported);
}

}  // namespace
}  // namespace flashcore
