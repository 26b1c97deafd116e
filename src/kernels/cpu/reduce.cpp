// Reductions on the CPU. How numbers are grouped depends on sizes and strides alone, so that the result has the same
// bits whatever the number of threads.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../semantics.h"
#include "executor.h"
#include "flashcore/primitives.h"
#include "flashcore/threads.h"
#include "kernels.h"
#include "lines.h"
#include "rows.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

constexpr int kLanes = 16;  // numbers that are added up side by side
constexpr std::int64_t kBlock = 32 * kLanes;
constexpr int kColumns = 64;  // results that are taken side by side

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

/// The largest of a stream of numbers, or NaN if one of them is.
template <class Acc>
class Largest {
 public:
  void add(Acc x) {
    is_nan_ |= x != x;
    best_ = x > best_ ? x : best_;
  }
  Acc total() const { return is_nan_ ? std::numeric_limits<Acc>::quiet_NaN() : best_; }

 private:
  Acc best_ = kMinusInfinity<Acc>;
  bool is_nan_ = false;
};

/// Sums, and means before they are divided.
struct Sum {
  template <class Acc>
  using Total = PairwiseSum<Acc>;

  /// Of so many elements, at most a block.
  template <class Acc, class T>
  Acc block(const T* x, std::int64_t step, std::int64_t count) const {
    Acc lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int n = 0; n < kLanes; ++n) lanes[n] += load(x[(i + n) * step]);
    for (; i < count; ++i) lanes[i % kLanes] += load(x[i * step]);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int n = 0; n < half; ++n) lanes[n] += lanes[n + half];
    return lanes[0];
  }

  /// Of so many rows, each column by itself.
  template <class Acc, class T>
  void rows(Acc* sums, int columns, const T* x, std::int64_t step, std::int64_t down, std::int64_t count) const {
    std::fill_n(sums, columns, Acc(0));
    for (std::int64_t row = 0; row < count; ++row)
      for (int n = 0; n < columns; ++n) sums[n] += load(x[row * down + n * step]);
  }
};

/// Maxima, or with a sign of −1 minima before they are turned around.
struct Extreme {
  int sign;

  template <class Acc>
  using Total = Largest<Acc>;

  template <class Acc, class T>
  Acc block(const T* x, std::int64_t step, std::int64_t count) const {
    Side<Acc, kLanes> lanes;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int n = 0; n < kLanes; ++n) lanes.add(n, Acc(sign) * load(x[(i + n) * step]));
    for (; i < count; ++i) lanes.add(static_cast<int>(i % kLanes), Acc(sign) * load(x[i * step]));
    Largest<Acc> all;
    for (int n = 0; n < kLanes; ++n) all.add(lanes.total(n));
    return all.total();
  }

  template <class Acc, class T>
  void rows(Acc* largest, int columns, const T* x, std::int64_t step, std::int64_t down, std::int64_t count) const {
    Side<Acc, kColumns> totals;
    for (std::int64_t row = 0; row < count; ++row)
      for (int n = 0; n < columns; ++n) totals.add(n, Acc(sign) * load(x[row * down + n * step]));
    for (int n = 0; n < columns; ++n) largest[n] = totals.total(n);
  }

 private:
  /// Maxima side by side, and the NaNs that they would hide: arrays apart, so that several are taken at once.
  template <class Acc, int kCount>
  struct Side {
    Acc best[kCount];
    Acc nan[kCount] = {};

    Side() { std::fill_n(best, kCount, kMinusInfinity<Acc>); }
    void add(int n, Acc x) {
      best[n] = x > best[n] ? x : best[n];
      nan[n] = x != x ? x : nan[n];
    }
    Acc total(int n) const { return nan[n] != nan[n] ? nan[n] : best[n]; }
  };
};

template <class T, class Op>
class Reduction {
 public:
  using Acc = typename Accumulator<T>::type;
  using Total = typename Op::template Total<Acc>;

  Reduction(const ReduceParams& params, Op op) : p_(params), op_(op), inner_(params.reduced, kGrain) {}

  void run() const {
    const Lines outer(p_.outer);
    const std::int64_t results = outer.count() * outer.length();
    const int threads = results * p_.inner < kGrain ? 1 : num_threads();
    if (results < kColumns && inner_.count() > 1) return take_results_by_pieces(threads);
    const bool columns =
        p_.reduced.rank == 1 && outer.length() > 1 && std::abs(outer.step(p_.outer)) < std::abs(p_.reduced.stride[0]);
    const std::int64_t grain = kGrain / std::max<std::int64_t>(p_.inner, 1);
    const Pieces pieces(p_.outer, columns ? std::max<std::int64_t>(grain, kColumns) : grain);
    parallel_for(pieces.count(), threads, [&](std::int64_t piece) {
      pieces.walk(piece, [&](const Lines& lines, std::int64_t begin, std::int64_t end) {
        const T* x = source(lines);
        T* out = target(lines);
        const std::int64_t step = lines.step(p_.outer);
        const std::int64_t out_step = lines.step(p_.out);
        if (columns) return take_columns(x, step, out, out_step, begin, end);
        for (std::int64_t i = begin; i < end; ++i) finish(out[i * out_step], whole(x + i * step));
      });
    });
  }

 private:
  const T* source(const Lines& lines) const { return static_cast<const T*>(p_.outer.data) + lines.start(p_.outer); }
  T* target(const Lines& lines) const { return static_cast<T*>(p_.out.data) + lines.start(p_.out); }

  void finish(T& out, Acc value) const {
    if (static_cast<ReduceOp>(p_.op) == ReduceOp::mean) value /= static_cast<Acc>(p_.inner);
    if (static_cast<ReduceOp>(p_.op) == ReduceOp::min) value = -value;
    store(out, value);
  }

  /// Of one result, what a piece of its elements comes to.
  Acc part(const T* x, std::int64_t piece) const {
    Total total;
    inner_.walk(piece, [&](const Lines& lines, std::int64_t begin, std::int64_t end) {
      const std::int64_t step = lines.step(p_.reduced);
      const T* line = x + lines.start(p_.reduced);
      for (std::int64_t i = begin; i < end; i += kBlock) {
        const std::int64_t count = std::min(kBlock, end - i);
        // A step that the compiler knows to be 1 lets it take several elements at once.
        total.add(step == 1 ? op_.template block<Acc>(line + i, 1, count)
                            : op_.template block<Acc>(line + i * step, step, count));
      }
    });
    return total.total();
  }

  Acc whole(const T* x) const {
    Total total;
    for (std::int64_t piece = 0; piece < inner_.count(); ++piece) total.add(part(x, piece));
    return total.total();
  }

  /// Few results of many elements: threads share the elements of each.
  void take_results_by_pieces(int threads) const {
    std::vector<Acc> parts(static_cast<std::size_t>(inner_.count()));
    Lines lines(p_.outer);
    for (std::int64_t n = 0; n < lines.count(); ++n, lines.next())
      for (std::int64_t i = 0; i < lines.length(); ++i) {
        const T* x = source(lines) + i * lines.step(p_.outer);
        parallel_for(inner_.count(), threads,
                     [&](std::int64_t piece) { parts[static_cast<std::size_t>(piece)] = part(x, piece); });
        Total total;
        for (const Acc value : parts) total.add(value);
        finish(target(lines)[i * lines.step(p_.out)], total.total());
      }
  }

  /// Results whose elements lie far apart, but beside each other's: row by row, many results at a time.
  void take_columns(const T* x, std::int64_t step, T* out, std::int64_t out_step, std::int64_t begin,
                    std::int64_t end) const {
    constexpr std::int64_t kRows = 32;  // that are simply added up
    const std::int64_t down = p_.reduced.stride[0];
    for (std::int64_t first = begin; first < end; first += kColumns) {
      const auto columns = static_cast<int>(std::min<std::int64_t>(kColumns, end - first));
      Total totals[kColumns];
      for (std::int64_t row = 0; row < p_.inner; row += kRows) {
        Acc sums[kColumns];
        op_.template rows<Acc>(sums, columns, x + first * step + row * down, step, down,
                               std::min(kRows, p_.inner - row));
        for (int n = 0; n < columns; ++n) totals[n].add(sums[n]);
      }
      for (int n = 0; n < columns; ++n) finish(out[(first + n) * out_step], totals[n].total());
    }
  }

  const ReduceParams& p_;
  const Op op_;
  const Pieces inner_;
};

}  // namespace

void reduce(const ReduceParams& params, int, Stream) {
  const auto op = static_cast<ReduceOp>(params.op);
  with_wide_storage(params.out.dtype, [&](auto storage) {
    using T = decltype(storage);
    if (op == ReduceOp::sum || op == ReduceOp::mean) return Reduction<T, Sum>(params, Sum{}).run();
    Reduction<T, Extreme>(params, Extreme{op == ReduceOp::max ? 1 : -1}).run();
  });
}

}  // namespace flashcore::cpu
