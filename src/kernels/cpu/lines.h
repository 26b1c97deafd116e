// Arrays of any rank as lines, the last axis being a line; and cut into pieces that threads can take.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace flashcore::cpu {

inline constexpr std::int64_t kGrain = 1 << 16;  // elements that are worth a task

/// Walks an array in row-major order, line by line: a line is the last axis, or one element where there is none.
class Lines {
 public:
  explicit Lines(const detail::ArrayParams& shape) : shape_(shape), outer_(std::max(shape.rank - 1, 0)) {
    length_ = shape.rank > 0 ? shape.shape[outer_] : 1;
    count_ = 1;
    for (int axis = 0; axis < outer_; ++axis) count_ *= shape.shape[axis];
    if (length_ == 0) count_ = 0;
  }

  std::int64_t count() const { return count_; }
  std::int64_t length() const { return length_; }

  /// Distance of neighbours on a line of an array of this shape.
  std::int64_t step(const detail::ArrayParams& a) const { return a.rank > 0 ? a.stride[outer_] : 0; }

  /// Element offset of the current line's start.
  std::int64_t start(const detail::ArrayParams& a) const {
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

  void go_to(std::int64_t line) {
    for (int axis = outer_ - 1; axis >= 0; --axis) {
      index_[axis] = line % shape_.shape[axis];
      line /= shape_.shape[axis];
    }
  }

 private:
  const detail::ArrayParams& shape_;
  int outer_;
  std::int64_t length_;
  std::int64_t count_;
  std::int64_t index_[kMaxRank] = {};
};

/// An array cut into pieces of about `grain` elements: some lines, or a part of one. The shape alone tells where.
class Pieces {
 public:
  Pieces(const detail::ArrayParams& shape, std::int64_t grain)
      : shape_(shape), grain_(std::max<std::int64_t>(grain, 1)) {
    const Lines lines(shape);
    if (lines.count() == 0) return;
    parts_ = (lines.length() + grain_ - 1) / grain_;
    lines_ = std::max<std::int64_t>(1, grain_ / lines.length());
    count_ = (lines.count() + lines_ - 1) / lines_ * parts_;
  }

  std::int64_t count() const { return count_; }

  /// body(lines, begin, end) for the elements [begin, end) of each line of a piece, where `lines` stands.
  template <class Body>
  void walk(std::int64_t piece, Body&& body) const {
    Lines lines(shape_);
    const std::int64_t first = piece / parts_ * lines_;
    const std::int64_t begin = piece % parts_ * grain_;
    const std::int64_t end = std::min(begin + grain_, lines.length());
    lines.go_to(first);
    for (std::int64_t n = first; n < std::min(first + lines_, lines.count()); ++n, lines.next())
      body(lines, begin, end);
  }

 private:
  const detail::ArrayParams& shape_;
  std::int64_t grain_;
  std::int64_t parts_ = 1;  // of a line
  std::int64_t lines_ = 1;  // of a piece
  std::int64_t count_ = 0;
};

}  // namespace flashcore::cpu
