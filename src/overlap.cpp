// Overlap: two views share a byte exactly if a sum of strides, each taken a bounded number of times, can be a certain
// number. The sum is searched from the largest stride down; nested layouts leave one or two choices at each step.
#include "overlap.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace flashcore::detail {
namespace {

struct Term {
  std::int64_t stride;  // bytes, positive
  std::int64_t most;    // the stride is taken 0 … most times
};

/// Asks whether Σ n_i · stride_i == target with 0 ≤ n_i ≤ most_i.
class BoundedSum {
 public:
  /// Terms of equal stride become one. Returns false where the largest sum would not fit in 64 bits.
  bool add(std::int64_t stride, std::int64_t most) {
    if (most == 0) return true;
    std::int64_t span = 0;
    if (__builtin_mul_overflow(stride, most, &span) || __builtin_add_overflow(total_, span, &total_)) return false;
    for (int i = 0; i < count_; ++i) {
      if (terms_[i].stride != stride) continue;
      terms_[i].most += most;
      return true;
    }
    terms_[count_++] = {stride, most};
    return true;
  }

  /// True also where the search would take too long.
  bool reaches(std::int64_t target) {
    std::sort(terms_, terms_ + count_, [](const Term& x, const Term& y) { return x.stride > y.stride; });
    return search(0, target, total_);
  }

 private:
  bool search(int i, std::int64_t target, std::int64_t largest) {
    if (target < 0 || target > largest) return false;
    if (target == 0 || target == largest) return true;
    if (++steps_ > kMaxSteps) return true;
    const auto [stride, most] = terms_[i];
    if (i + 1 == count_) return target % stride == 0;
    const std::int64_t rest = largest - stride * most;
    const std::int64_t high = std::min(most, target / stride);
    const std::int64_t low = target <= rest ? 0 : (target - rest + stride - 1) / stride;
    for (std::int64_t n = high; n >= low; --n)
      if (search(i + 1, target - n * stride, rest)) return true;
    return false;
  }

  static constexpr int kMaxSteps = 4096;
  Term terms_[2 * kMaxRank + 1] = {};
  int count_ = 0;
  int steps_ = 0;
  std::int64_t total_ = 0;
};

constexpr std::int64_t kFarthest = std::int64_t{1} << 60;  // no address is that far: keeps all later sums in 64 bits

/// The dimensions that matter, in bytes, with positive strides counted from the lowest address.
struct Extent {
  std::int64_t begin = 0;  // lowest address
  std::int64_t last = 0;   // address of the highest element, relative to begin
  std::int64_t size = 0;   // bytes of an element
  int rank = 0;
  Term dims[kMaxRank] = {};
  bool fits = true;  // false: it reaches farther than any address
};

bool is_empty(const TensorView& t) {
  return t.rank < 0 || std::any_of(t.shape.begin(), t.shape.begin() + t.rank, [](auto n) { return n <= 0; });
}

Extent extent_of(const TensorView& t) {
  Extent e;
  e.begin = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data));
  e.size = static_cast<std::int64_t>(size_of(t.dtype));
  for (int i = 0; i < t.rank; ++i) {
    const std::int64_t most = t.shape[i] - 1;
    std::int64_t stride = 0;
    std::int64_t span = 0;
    if (most == 0) continue;
    if (__builtin_mul_overflow(t.stride[i], e.size, &stride) || __builtin_mul_overflow(stride, most, &span) ||
        (span < 0 && (__builtin_add_overflow(e.begin, span, &e.begin) || __builtin_sub_overflow(0, span, &span))) ||
        __builtin_add_overflow(e.last, span, &e.last) || e.last > kFarthest || e.begin < -kFarthest) {
      e.fits = false;
      return e;
    }
    e.dims[e.rank++] = {stride < 0 ? -stride : stride, most};
  }
  return e;
}

/// True if every stride steps over all that the dimensions after it span: row-major, with or without gaps.
bool is_row_major(const TensorView& t) {
  std::int64_t end = 1;  // elements spanned by the dimensions so far
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    std::int64_t span = 0;
    if (t.stride[i] < end || __builtin_mul_overflow(t.stride[i], t.shape[i] - 1, &span) ||
        __builtin_add_overflow(end, span, &end))
      return false;
  }
  return true;
}

}  // namespace

ByteRange byte_range(const TensorView& t) {
  const auto size = static_cast<std::int64_t>(size_of(t.dtype));
  const auto data = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data));
  ByteRange range{data, data};
  for (int i = 0; i < t.rank; ++i) {
    if (t.shape[i] <= 0) return {data, data};
    std::int64_t span = 0;
    std::int64_t& side = t.stride[i] < 0 ? range.begin : range.end;
    if (__builtin_mul_overflow(t.stride[i], t.shape[i] - 1, &span) || __builtin_mul_overflow(span, size, &span) ||
        __builtin_add_overflow(side, span, &side))
      return {std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max()};
  }
  if (t.rank >= 0) range.end += size;
  return range;
}

bool may_overlap(const TensorView& a, const TensorView& b) {
  if (is_empty(a) || is_empty(b)) return false;
  const Extent x = extent_of(a);
  const Extent y = extent_of(b);
  if (!x.fits || !y.fits) return true;
  const auto before = [](const Extent& p, const Extent& q) { return p.begin + p.last + p.size <= q.begin; };
  if (before(x, y) || before(y, x)) return false;
  // Some byte is common if  x.begin + Σ n·stride + byte  ==  y.begin + Σ m·stride + byte.  Counting y's terms down
  // from their largest values turns both sides into one sum.
  const std::int64_t target = y.begin - x.begin + y.last + y.size - 1;
  BoundedSum sum;
  bool fits = sum.add(1, x.size - 1 + y.size - 1);
  for (int i = 0; fits && i < x.rank; ++i)
    if (x.dims[i].stride > 0) fits = sum.add(x.dims[i].stride, x.dims[i].most);
  for (int i = 0; fits && i < y.rank; ++i)
    if (y.dims[i].stride > 0) fits = sum.add(y.dims[i].stride, y.dims[i].most);
  return !fits || sum.reaches(target);
}

bool overlaps_itself(const TensorView& t) {
  if (is_empty(t) || is_row_major(t)) return false;
  Extent e = extent_of(t);
  if (!e.fits) return true;
  std::sort(e.dims, e.dims + e.rank, [](const Term& x, const Term& y) { return x.stride < y.stride; });
  std::int64_t end = e.size;  // one past the highest byte of the dimensions so far
  bool nested = true;
  for (int i = 0; nested && i < e.rank; ++i) {
    nested = e.dims[i].stride >= end;
    end += e.dims[i].stride * e.dims[i].most;
  }
  if (nested) return false;
  // Strides that are not nested may still keep the elements apart. Two elements share a byte if their indices differ
  // by d ≠ 0 with |Σ d·stride| < size. For each dimension k in turn let d_k ≥ 1 and the others be anything.
  for (int k = 0; k < e.rank; ++k) {
    if (e.dims[k].stride == 0) return true;
    BoundedSum sum;
    std::int64_t target = e.size - 1 - e.dims[k].stride;
    bool fits = sum.add(1, 2 * (e.size - 1)) && sum.add(e.dims[k].stride, e.dims[k].most - 1);
    for (int i = 0; fits && i < e.rank; ++i) {
      if (i == k) continue;
      fits = sum.add(e.dims[i].stride, 2 * e.dims[i].most);
      target += e.dims[i].stride * e.dims[i].most;
    }
    if (!fits || sum.reaches(target)) return true;
  }
  return false;
}

bool is_same_view(const TensorView& a, const TensorView& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.device != b.device || a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.stride[i] != b.stride[i])) return false;
  return true;
}

}  // namespace flashcore::detail
