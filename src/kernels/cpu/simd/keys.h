// The keys (or values) of one head in blocks of floats: where they lie if they are floats, else widened once a block.
#pragma once

#include "score_rules.h"

namespace flashcore::cpu {
namespace {

class KeyBlocks {
 public:
  /// `scratch` has room for floats(dim, most keys of a block). `column_reads` is how often products read a block by
  /// columns, about.
  KeyBlocks(const detail::Params& p, const detail::TensorParams& tensor, const detail::Sequence& s, std::int64_t head_k,
            int dim, float* scratch, std::int64_t column_reads = 0)
      : p_(p), tensor_(tensor), s_(s), head_k_(head_k), dim_(dim), scratch_(scratch), stride_(dim) {
    in_place_ = p.dtype == DType::float32 && !p.page.block_table && tensor.seq == dim;
    // Note: columns of rows that are a multiple of 512 bytes apart do not stay in L1, where they share few places. With
    // 8 rows to a tile a cache line is needed only twice, and to copy costs more.
    if (kTileRows < 8 && dim % 128 == 0 && column_reads >= kReadsForCopy) {
      in_place_ = false;
      stride_ = dim + kPadding;
    }
  }

  /// Floats that blocks of up to `keys` keys need.
  static std::int64_t floats(std::int64_t dim, int keys = kBlockKeys) { return keys * (dim + kPadding) + kLanes; }

  /// Keys [first, first + count). They stay valid until another block is asked for.
  KeyRows rows(std::int64_t first, int count) {
    if (in_place_) return {static_cast<const float*>(tensor_.data) + offset(first), stride_};
    if (first != first_) {
      first_ = first;
      finite_known_ = false;
      any_missing_ = false;
      with_storage(p_.dtype, [&](auto storage) { widen<decltype(storage)>(count); });
    }
    return {scratch_, stride_};
  }

  /// Whether the block just asked for holds neither NaN nor Inf.
  bool is_finite(std::int64_t first, int count) {
    const KeyRows block = rows(first, count);
    if (!finite_known_ || checked_ != first) {
      finite_ = all_finite(block.data, block.stride, count, dim_);
      finite_known_ = true;
      checked_ = first;
    }
    return finite_;
  }

  /// Keys of the current block whose page does not exist; null if there are none. They are 0 and not to be seen.
  const bool* missing() const { return any_missing_ ? missing_ : nullptr; }

  /// The address of a key, to be prefetched.
  const char* address(std::int64_t j) const {
    if (p_.page.block_table) return nullptr;
    const std::int64_t bytes = p_.dtype == DType::float32 ? 4 : 2;
    return static_cast<const char*>(tensor_.data) + offset(j) * bytes;
  }
  bool in_place() const { return in_place_; }

 private:
  static constexpr int kPadding = 16;
  static constexpr int kReadsForCopy = 4;

  FLASHCORE_INLINE std::int64_t offset(std::int64_t j) const { return detail::k_offset(p_, tensor_, s_, head_k_, j); }

  template <class T>
  void widen(int count) {
    for (int j = 0; j < count;) {
      int run = count - j;
      if (p_.page.block_table) {
        const std::int64_t left = p_.page.page_size - (first_ + j) % p_.page.page_size;
        run = static_cast<int>(min_of<std::int64_t>(run, left));
      }
      float* target = scratch_ + j * stride_;
      const std::int64_t from = offset(first_ + j);
      const bool is_missing = p_.page.block_table && from < 0;
      if (is_missing)
        std::memset(target, 0, static_cast<std::size_t>(run * stride_) * sizeof(float));
      else
        widen_rows(Rows<T>{static_cast<const T*>(tensor_.data) + from, tensor_.seq, run, dim_}, target, stride_);
      for (int i = 0; i < run; ++i) missing_[j + i] = is_missing;
      any_missing_ |= is_missing;
      j += run;
    }
  }

  const detail::Params& p_;
  const detail::TensorParams& tensor_;
  const detail::Sequence& s_;
  const std::int64_t head_k_;
  const int dim_;
  float* const scratch_;
  std::int64_t stride_;  // of a block's rows
  bool in_place_ = false;
  std::int64_t first_ = -1;  // of the block in scratch
  std::int64_t checked_ = -1;
  bool finite_known_ = false;
  bool finite_ = false;
  bool any_missing_ = false;
  bool missing_[kMostTileKeys];
};

}  // namespace
}  // namespace flashcore::cpu
