// reduce, one way of walking after the other: sizes around the limits between them, every place of a NaN, every
// address, results that call after call and graph after graph are the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../support/float_formats.h"
#include "../support/random.h"
#include "../support/strided_array.h"
#include "../support/test_device.h"
#include "flashcore/flashcore.h"
#include "flashcore/primitives.h"

namespace flashcore::testing {
namespace {

using Array = StridedArray;

constexpr ReduceOp kOps[] = {ReduceOp::sum, ReduceOp::max, ReduceOp::min, ReduceOp::mean};
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class ReduceWalks : public ::testing::TestWithParam<std::tuple<Device, DType>> {
 protected:
  Device device() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  std::int64_t element_bytes() const { return static_cast<std::int64_t>(size_of(dtype())); }
  std::int64_t vector() const { return 16 / element_bytes(); }  // elements that are read at once
  Array array(const Sizes& shape) const { return Array(device(), dtype(), shape); }

  /// A matrix and an axis for each way to walk: short rows of less and more vectors than a warp has lanes, rows of some
  /// warps, of a block, in chunks; columns that fill lines and that do not, in chunks and in one.
  struct Walk {
    Sizes shape;
    int axis;
  };
  std::vector<Walk> walks() const {
    const std::int64_t v = vector();
    return {{{70, 1 * v}, 1},    {{131, 5 * v}, 1},  {{65, 32 * v}, 1},      {{9, 33 * v}, 1},
            {{3, 300 * v}, 1},   {{2, 2049 * v}, 1}, {{3, 4096 * v + 3}, 1}, {{2, 9000 * v}, 1},
            {{300, 8 * v}, 0},   {{600, 9 * v}, 0},  {{2100, 3}, 0},         {{40, 70 * v}, 0},
            {{1100, 16 * v}, 0}, {{5000, 1 * v}, 0}, {{77, 11 * v + 1}, 1},  {{513, 2 * v + 1}, 0}};
  }
  static std::int64_t results(const Walk& walk) { return walk.shape[1 - walk.axis]; }
  static std::int64_t terms(const Walk& walk) { return walk.shape[walk.axis]; }
  /// Where term k of result r stands in row-major order.
  static std::size_t place(const Walk& walk, std::int64_t r, std::int64_t k) {
    return static_cast<std::size_t>(walk.axis == 1 ? r * walk.shape[1] + k : k * walk.shape[1] + r);
  }
};

std::string name_of_walk(const Sizes& shape, int axis, ReduceOp op) {
  return std::to_string(shape[0]) + " × " + std::to_string(shape[1]) + " axis " + std::to_string(axis) + " op " +
         std::to_string(static_cast<int>(op));
}

INSTANTIATE_TEST_SUITE_P(Devices, ReduceWalks,
                         ::testing::Combine(::testing::ValuesIn(test_devices()),
                                            ::testing::Values(DType::float16, DType::bfloat16, DType::float32,
                                                              DType::float64)),
                         [](const ::testing::TestParamInfo<std::tuple<Device, DType>>& info) {
                           return test_name(std::get<0>(info.param)) + "_" + name_of(std::get<1>(info.param));
                         });

/// Numbers of a few values, so that sums are exact in float32 and no term may be missed, doubled or misplaced: each
/// result has a count of ones and halves of its own.
TEST_P(ReduceWalks, CountEveryTermOnce) {
  Random random(1);
  for (const Walk& walk : walks()) {
    std::vector<double> values(static_cast<std::size_t>(walk.shape[0] * walk.shape[1]));
    for (double& x : values) x = 0.5 * static_cast<double>(random.integer(-2, 2));
    Array x = array(walk.shape);
    x.set(values);
    for (const ReduceOp op : kOps) {
      SCOPED_TRACE(name_of_walk(walk.shape, walk.axis, op));
      const Array out = array({results(walk)});
      const std::vector<unsigned char> before = out.bytes();
      reduce(x.view(), out.view(), op, walk.axis);
      EXPECT_EQ(out.strays(before), 0);
      const std::vector<double> actual = out.values();
      for (std::int64_t r = 0; r < results(walk); ++r) {
        double sum = 0;
        double largest = -kInfinity;
        double smallest = kInfinity;
        for (std::int64_t k = 0; k < terms(walk); ++k) {
          const double term = values[place(walk, r, k)];
          sum += term;
          largest = std::max(largest, term);
          smallest = std::min(smallest, term);
        }
        // The accumulator divides once more, in its own format, before the result is rounded.
        const double count = static_cast<double>(terms(walk));
        const double mean =
            dtype() == DType::float64 ? sum / count : static_cast<double>(static_cast<float>(sum / count));
        const double expected = op == ReduceOp::sum    ? rounded(dtype(), sum)
                                : op == ReduceOp::mean ? rounded(dtype(), mean)
                                : op == ReduceOp::max  ? largest
                                                       : smallest;
        ASSERT_EQ(actual[static_cast<std::size_t>(r)], expected) << "result " << r;
      }
    }
  }
}

/// One term stands out: first, last, in the middle, at the ends of vectors, of what threads and blocks take.
TEST_P(ReduceWalks, NoTermIsOverlookedWhereverItStands) {
  for (const Walk& walk : walks()) {
    const std::int64_t n = terms(walk);
    const std::int64_t r = results(walk) / 2;
    for (const std::int64_t k : {std::int64_t{0}, vector() - 1, n / 2, n - vector(), n - 1}) {
      if (k < 0 || k >= n) continue;
      for (const double special : {kNaN, kInfinity, -kInfinity}) {
        std::vector<double> values(static_cast<std::size_t>(walk.shape[0] * walk.shape[1]), 0.5);
        values[place(walk, r, k)] = special;
        Array x = array(walk.shape);
        x.set(values);
        for (const ReduceOp op : kOps) {
          SCOPED_TRACE(name_of_walk(walk.shape, walk.axis, op) + " term " + std::to_string(k) + " is " +
                       std::to_string(special));
          const Array out = array({results(walk)});
          reduce(x.view(), out.view(), op, walk.axis);
          const std::vector<double> actual = out.values();
          const bool hidden = (op == ReduceOp::max && special < 0) || (op == ReduceOp::min && special > 0);
          const double expected = hidden && n > 1 ? 0.5 : special;
          const double got = actual[static_cast<std::size_t>(r)];
          EXPECT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected) << got;
          for (std::int64_t other = 0; other < results(walk); ++other)
            ASSERT_TRUE(other == r || std::isfinite(actual[static_cast<std::size_t>(other)])) << "result " << other;
        }
      }
    }
  }
}

TEST_P(ReduceWalks, OppositeInfinitiesAreNaNInASumOnly) {
  for (const Walk& walk : walks()) {
    if (terms(walk) < 2) continue;
    std::vector<double> values(static_cast<std::size_t>(walk.shape[0] * walk.shape[1]), 1.0);
    values[place(walk, 0, 0)] = kInfinity;
    values[place(walk, 0, terms(walk) - 1)] = -kInfinity;
    Array x = array(walk.shape);
    x.set(values);
    const auto first = [&](ReduceOp op) {
      const Array out = array({results(walk)});
      reduce(x.view(), out.view(), op, walk.axis);
      return out.values()[0];
    };
    SCOPED_TRACE(name_of_walk(walk.shape, walk.axis, ReduceOp::sum));
    EXPECT_TRUE(std::isnan(first(ReduceOp::sum)));
    EXPECT_EQ(first(ReduceOp::max), kInfinity);
    EXPECT_EQ(first(ReduceOp::min), -kInfinity);
  }
}

/// One element further on nothing lies on 16 bytes any more. The bits are those of before, for sums of numbers that
/// have to be rounded as well.
TEST_P(ReduceWalks, AreTheSameAtEveryAddress) {
  Random random(2);
  for (const Walk& walk : walks()) {
    const Array plain = array(walk.shape).fill_random(random);
    std::vector<double> values = plain.values();
    values.insert(values.begin(), 0.0);
    Array shifted = array({static_cast<std::int64_t>(values.size())});
    shifted.set(values);
    TensorView moved = plain.view();
    moved.data = static_cast<char*>(shifted.view().data) + element_bytes();
    for (const int axis : {walk.axis, kAllAxes}) {
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::min}) {
        const Sizes kept = axis == kAllAxes ? Sizes{} : Sizes{results(walk)};
        const Array one = array(kept);
        const Array other = array(kept);
        reduce(plain.view(), one.view(), op, axis);
        reduce(moved, other.view(), op, axis);
        EXPECT_EQ(one.bytes(), other.bytes()) << name_of_walk(walk.shape, axis, op);
      }
    }
  }
}

/// Rows that overlap, a vector apart: very many of them in little memory, of more vectors than a warp has lanes.
TEST_P(ReduceWalks, ManyRowsOfSomeVectors) {
  if (device().type == DeviceType::cpu) GTEST_SKIP() << "a matter of the CUDA kernels";
  Random random(3);
  constexpr std::int64_t kRows = 65536 + 9;
  for (const std::int64_t vectors : {33, 100, 256, 257}) {
    const std::int64_t length = vectors * vector();
    std::vector<double> values(static_cast<std::size_t>((kRows - 1) * vector() + length + 1));
    for (double& x : values) x = 0.5 * static_cast<double>(random.integer(-2, 2));
    Array memory = array({static_cast<std::int64_t>(values.size())});
    memory.set(values);
    for (const std::int64_t skip : {0, 1}) {
      TensorView x = TensorView::contiguous(static_cast<char*>(memory.view().data) + skip * element_bytes(), dtype(),
                                            device(), {kRows, length});
      x.stride[0] = vector();
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::min}) {
        SCOPED_TRACE(name_of_walk({kRows, length}, 1, op) + " from element " + std::to_string(skip));
        const Array out = array({kRows});
        reduce(x, out.view(), op, 1);
        const std::vector<double> actual = out.values();
        for (std::int64_t row = 0; row < kRows; row += row + 8 < kRows && row >= 8 ? 509 : 1) {
          const auto begin = values.begin() + row * vector() + skip;
          double expected = kInfinity;
          if (op == ReduceOp::min) {
            expected = *std::min_element(begin, begin + length);
          } else {
            expected = 0;
            for (auto term = begin; term != begin + length; ++term) expected += *term;
          }
          ASSERT_EQ(actual[static_cast<std::size_t>(row)], rounded(dtype(), expected)) << "row " << row;
        }
      }
    }
  }
}

/// Results with gaps between them, from rows and columns with gaps.
TEST_P(ReduceWalks, KeepStridesOfBothSides) {
  Random random(4);
  for (const Walk& walk : walks()) {
    const Sizes& shape = walk.shape;
    for (const Sizes& stride :
         {Sizes{(shape[1] / vector() + 2) * vector(), 1}, Sizes{2 * shape[1], 2}, Sizes{-shape[1], 1}}) {
      std::vector<double> values(static_cast<std::size_t>(shape[0] * shape[1]));
      for (double& x : values) x = static_cast<double>(random.integer(-99, 99));
      Array x(device(), dtype(), shape, stride);
      x.set(values);
      const Array out(device(), dtype(), {results(walk)}, {3});
      const std::vector<unsigned char> before = out.bytes();
      reduce(x.view(), out.view(), ReduceOp::max, walk.axis);
      EXPECT_EQ(out.strays(before), 0);
      const std::vector<double> actual = out.values();
      for (std::int64_t r = 0; r < results(walk); ++r) {
        double largest = -kInfinity;
        for (std::int64_t k = 0; k < terms(walk); ++k) largest = std::max(largest, values[place(walk, r, k)]);
        ASSERT_EQ(actual[static_cast<std::size_t>(r)], largest)
            << name_of_walk(shape, walk.axis, ReduceOp::max) << ", row stride " << stride[0] << ", result " << r;
      }
    }
  }
}

TEST_P(ReduceWalks, AreTheSameFromRunToRun) {
  Random random(5);
  for (const Walk& walk : walks()) {
    const Array x = array(walk.shape).fill_random(random);
    for (const int axis : {walk.axis, kAllAxes}) {
      const Sizes kept = axis == kAllAxes ? Sizes{} : Sizes{results(walk)};
      const Array first = array(kept);
      reduce(x.view(), first.view(), ReduceOp::sum, axis);
      for (int run = 0; run < 3; ++run) {
        const Array again = array(kept);
        reduce(x.view(), again.view(), ReduceOp::sum, axis);
        EXPECT_EQ(again.bytes(), first.bytes()) << name_of_walk(walk.shape, axis, ReduceOp::sum);
      }
    }
  }
}

/// A call starts while the one before it ends: it must still find what that one has written. Largest numbers of largest
/// numbers are exact; each call has rows of its own, so that old results are wrong.
TEST_P(ReduceWalks, SeeWhatTheCallBeforeHasWritten) {
  Random random(6);
  constexpr std::int64_t kRows = 5000;
  constexpr int kCalls = 20;
  const std::int64_t length = 4 * vector();
  const TestStream stream(device());
  const Array middle = array({kRows});
  std::vector<Array> inputs;
  std::vector<Array> outs;
  for (int call = 0; call < kCalls; ++call) {
    std::vector<double> values(static_cast<std::size_t>(kRows * length));
    for (double& x : values) x = static_cast<double>(random.integer(-100, call));
    inputs.push_back(array({kRows, length}));
    inputs.back().set(values);
    outs.push_back(array({}));
  }
  for (int call = 0; call < kCalls; ++call) {
    reduce(inputs[call].view(), middle.view(), ReduceOp::max, 1, stream.get());
    reduce(middle.view(), outs[call].view(), ReduceOp::max, kAllAxes, stream.get());
  }
  stream.synchronize();
  for (int call = 0; call < kCalls; ++call) {
    const std::vector<double> values = inputs[call].values();
    EXPECT_EQ(outs[call].values()[0], *std::max_element(values.begin(), values.end())) << "call " << call;
  }
}

/// A captured call has one tag for all its replays, and memory that others may have written to in between.
TEST_P(ReduceWalks, CanBeReplayed) {
  if (device().type == DeviceType::cpu) GTEST_SKIP() << "there are no graphs on the CPU";
  Random random(7);
  for (const Walk& walk : walks()) {
    const Array x = array(walk.shape).fill_random(random);
    for (const int axis : {walk.axis, kAllAxes}) {
      const Sizes kept = axis == kAllAxes ? Sizes{} : Sizes{results(walk)};
      const Array eager = array(kept);
      reduce(x.view(), eager.view(), ReduceOp::sum, axis);
      const Array first = array(kept);
      const Array second = array(kept);
      const TestStream stream(device());
      stream.capture_and_replay(
          [&] {
            reduce(x.view(), first.view(), ReduceOp::sum, axis, stream.get());
            reduce(x.view(), second.view(), ReduceOp::sum, axis, stream.get());
          },
          3);
      EXPECT_EQ(first.bytes(), eager.bytes()) << name_of_walk(walk.shape, axis, ReduceOp::sum);
      EXPECT_EQ(second.bytes(), eager.bytes()) << name_of_walk(walk.shape, axis, ReduceOp::sum);
    }
  }
}

}  // namespace
}  // namespace flashcore::testing
