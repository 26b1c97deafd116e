// The CPU's small primitives: merging attention states, element-wise addition, reductions.
#include "flashcore/primitives.h"

#include <cmath>

#include "../semantics.h"
#include "kernels.h"
#include "rows.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

/// Walks an array in row-major order, line by line: a line is the last axis, or one element where there is none.
class Lines {
 public:
  explicit Lines(const ArrayParams& shape) : shape_(shape), outer_(std::max(shape.rank - 1, 0)) {
    length_ = shape.rank > 0 ? shape.shape[outer_] : 1;
    count_ = 1;
    for (int axis = 0; axis < outer_; ++axis) count_ *= shape.shape[axis];
    if (length_ == 0) count_ = 0;
  }

  std::int64_t count() const { return count_; }
  std::int64_t length() const { return length_; }

  /// Distance of neighbours on a line of an array of this shape.
  std::int64_t step(const ArrayParams& a) const { return a.rank > 0 ? a.stride[outer_] : 0; }

  /// Element offset of the current line's start.
  std::int64_t start(const ArrayParams& a) const {
    std::int64_t offset = 0;
    for (int axis = 0; axis < outer_; ++axis) offset += index_[axis] * a.stride[axis];
    return offset;
  }

  void next() {
    for (int axis = outer_ - 1; axis >= 0; --axis) {
      if (++index_[axis] < shape_.shape[axis]) return;
      index_[axis] = 0;
    }
  }

 private:
  const ArrayParams& shape_;
  int outer_;
  std::int64_t length_;
  std::int64_t count_;
  std::int64_t index_[kMaxRank] = {};
};

/// Pairwise summation of a stream of numbers: sums of equally many terms meet, as in a binary counter, so that the
/// rounding error grows with the logarithm of the count.
template <class Acc>
class PairwiseSum {
 public:
  void add(Acc x) {
    int level = 0;
    for (std::uint64_t n = count_++; n & 1; n >>= 1) x += partial_[level++];
    partial_[level] = x;
  }

  Acc total() const {
    Acc sum = 0;
    int level = 0;
    for (std::uint64_t n = count_; n != 0; n >>= 1, ++level)
      if (n & 1) sum += partial_[level];
    return sum;
  }

 private:
  Acc partial_[64] = {};
  std::uint64_t count_ = 0;
};

template <class T>
class Reduction {
 public:
  using Acc = typename Accumulator<T>::type;

  explicit Reduction(const ReduceParams& params) : p_(params), op_(static_cast<ReduceOp>(params.op)) {}

  void run() {
    Lines lines(p_.outer);
    for (std::int64_t n = 0; n < lines.count(); ++n, lines.next()) {
      const T* x = static_cast<const T*>(p_.outer.data) + lines.start(p_.outer);
      T* out = static_cast<T*>(p_.out.data) + lines.start(p_.out);
      for (std::int64_t i = 0; i < lines.length(); ++i)
        store(out[i * lines.step(p_.out)], one_result(x + i * lines.step(p_.outer)));
    }
  }

 private:
  Acc one_result(const T* x) const {
    switch (op_) {
      case ReduceOp::sum:
        return sum(x);
      case ReduceOp::mean:
        return sum(x) / static_cast<Acc>(p_.inner);
      default:
        return extreme(x);
    }
  }

  Acc sum(const T* x) const {
    constexpr std::int64_t kBlock = 64;  // terms that are simply added up
    PairwiseSum<Acc> total;
    Lines lines(p_.reduced);
    const std::int64_t step = lines.step(p_.reduced);
    for (std::int64_t n = 0; n < lines.count(); ++n, lines.next()) {
      const T* line = x + lines.start(p_.reduced);
      for (std::int64_t begin = 0; begin < lines.length(); begin += kBlock) {
        const std::int64_t end = std::min(begin + kBlock, lines.length());
        Acc block = 0;
        for (std::int64_t i = begin; i < end; ++i) block += load(line[i * step]);
        total.add(block);
      }
    }
    return total.total();
  }

  Acc extreme(const T* x) const {
    const Acc sign = op_ == ReduceOp::max ? Acc(1) : Acc(-1);
    Acc best = kMinusInfinity<Acc>;
    Lines lines(p_.reduced);
    const std::int64_t step = lines.step(p_.reduced);
    for (std::int64_t n = 0; n < lines.count(); ++n, lines.next()) {
      const T* line = x + lines.start(p_.reduced);
      for (std::int64_t i = 0; i < lines.length(); ++i) {
        const Acc value = sign * load(line[i * step]);
        if (std::isnan(value)) return value;
        if (value > best) best = value;
      }
    }
    return sign * best;
  }

  const ReduceParams& p_;
  const ReduceOp op_;
};

/// One line of a sum. Where all three are dense the compiler sees steps of 1, and adds several elements at once.
template <class T>
void add_line(const T* a, std::int64_t step_a, const T* b, std::int64_t step_b, T* out, std::int64_t step_out,
              std::int64_t length) {
  if (step_a == 1 && step_b == 1 && step_out == 1) {
    for (std::int64_t i = 0; i < length; ++i) store(out[i], load(a[i]) + load(b[i]));
  } else {
    for (std::int64_t i = 0; i < length; ++i) store(out[i * step_out], load(a[i * step_a]) + load(b[i * step_b]));
  }
}

template <class T>
void merge_row(const MergeParams& p, std::int64_t batch, std::int64_t head, std::int64_t i) {
  using Acc = typename Accumulator<T>::type;
  const auto lse_at = [&](const RowParams& t) -> Acc& {
    return static_cast<Acc*>(t.data)[batch * t.batch + head * t.head + i * t.seq];
  };
  const auto row_at = [&](const TensorParams& t) {
    return static_cast<T*>(t.data) + batch * t.batch + head * t.head + i * t.seq;
  };
  const Acc lse_a = lse_at(p.lse_a);
  const Acc lse_b = lse_at(p.lse_b);
  const Acc max = std::max(lse_a, lse_b);
  const bool empty = lse_a == kMinusInfinity<Acc> && lse_b == kMinusInfinity<Acc>;
  const Acc weight_a = empty ? Acc(0) : std::exp(lse_a - max);
  const Acc weight_b = empty ? Acc(0) : std::exp(lse_b - max);
  const Acc sum = empty ? Acc(1) : weight_a + weight_b;
  const Acc share_a = weight_a / sum;
  const Acc share_b = weight_b / sum;
  const T* a = row_at(p.out_a);
  const T* b = row_at(p.out_b);
  T* out = row_at(p.out);
  for (int d = 0; d < p.size.head_dim_v; ++d) {
    const Acc from_a = share_a == 0 ? Acc(0) : share_a * load(a[d]);
    const Acc from_b = share_b == 0 ? Acc(0) : share_b * load(b[d]);
    store(out[d], from_a + from_b);
  }
  lse_at(p.lse) = empty ? kMinusInfinity<Acc> : max + std::log(sum);
}

}  // namespace

void merge_states(const MergeParams& p, int, Stream) {
  with_wide_storage(p.dtype, [&](auto storage) {
    for (std::int64_t batch = 0; batch < p.size.batch; ++batch)
      for (std::int64_t head = 0; head < p.size.heads_q; ++head)
        for (std::int64_t i = 0; i < p.size.seqlen_q; ++i) merge_row<decltype(storage)>(p, batch, head, i);
  });
}

void vector_add(const ArrayParams& a, const ArrayParams& b, const ArrayParams& out, int, Stream) {
  with_wide_storage(out.dtype, [&](auto storage) {
    using T = decltype(storage);
    Lines lines(out);
    for (std::int64_t n = 0; n < lines.count(); ++n, lines.next()) {
      const T* x = static_cast<const T*>(a.data) + lines.start(a);
      const T* y = static_cast<const T*>(b.data) + lines.start(b);
      T* z = static_cast<T*>(out.data) + lines.start(out);
      add_line(x, lines.step(a), y, lines.step(b), z, lines.step(out), lines.length());
    }
  });
}

void reduce(const ReduceParams& params, int, Stream) {
  with_wide_storage(params.out.dtype, [&](auto storage) { Reduction<decltype(storage)>(params).run(); });
}

}  // namespace flashcore::cpu
