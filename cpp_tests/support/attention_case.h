// AttentionCase: a problem line made into tensors of random numbers, run by the library and judged by the oracle.
//
// What no query may see (masked keys, rows beyond a length, gaps between rows) holds NaN, so every case also proves
// that what is excluded is never multiplied.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "array4.h"
#include "oracle.h"
#include "problem.h"
#include "random.h"
#include "test_tensor.h"

namespace flashcore::testing {

/// How the tensors of a case lie in memory, and which of their allowed forms they take.
struct Variant {
  const char* name;
  Layout layout;                  // varlen takes thd whatever stands here
  std::int64_t gap;               // elements between rows
  std::array<bool, 4> mask_axes;  // false: the mask is broadcast along this axis
  std::array<bool, 4> bias_axes;
  bool side_in_float32;  // bias, sinks and rotary tables: float32 instead of q's dtype
  bool alibi_per_batch;
};

/// The variants that every case is run in.
const std::vector<Variant>& all_variants();

class AttentionCase {
 public:
  AttentionCase(const detail::Problem& problem, Device device, const Variant& variant = all_variants()[0],
                std::uint64_t seed = 1);

  AttentionInputs inputs() const;
  DecodeInputs decode_inputs() const;
  AttentionOutputs outputs() const;
  AttentionCotangents cotangents() const;
  AttentionGrads grads() const;

  /// Runs the public call of the problem's phase and brings the results to the host.
  void run(Stream stream = nullptr);
  void download();
  Support supports() const;
  /// Fails the test where a result is wrong or where something beside the results was written.
  void check() const;

  /// Every byte of every tensor that the call may write: for "bitwise the same" and "untouched".
  std::vector<std::vector<unsigned char>> output_bytes() const;

  AttentionOptions options;  ///< as the problem line says; `kernel` and others may be changed before run
  detail::Problem problem;
  OracleCall oracle;  ///< the same call for the oracle; its k and v hold what was appended

  TestTensor q, k, v, out, lse;  ///< decode: k and v are the caches
  TestTensor mask, bias, alibi, sinks, q_descale, k_descale, v_descale;
  TestTensor cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;  ///< decode: seqused_k is cache_seqlens
  TestTensor k_new, v_new, cos, sin;
  TestTensor dout, dlse, dq, dk, dv, dbias, dsinks;

 private:
  using Lengths = std::vector<std::int64_t>;

  void make_lengths();
  void make_pages();
  void make_score_tensors();
  void make_rows();
  void make_new_keys();
  void make_rotary();
  void make_outputs();
  void make_gradients();
  void hide_what_no_query_sees();
  void place_rows();
  void upload();
  void make_options();

  TestTensor rows_tensor(DType dtype, std::int64_t batch, std::int64_t heads, std::int64_t seq, std::int64_t total,
                         std::int64_t dim) const;
  TestTensor query_rows(DType dtype, std::int64_t dim) const;
  TestTensor key_rows(std::int64_t dim) const;
  TestTensor row_numbers(DType dtype) const;
  Array4 random_rows(std::int64_t heads, std::int64_t seq, std::int64_t dim);
  Array4 random_plane(const std::array<bool, 4>& axes, DType dtype);
  TestTensor plane_tensor(DType dtype, const Array4& values) const;
  TestTensor per_head(DType dtype, const Array4& values) const;

  Index query_index(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) const;
  Index key_index(std::int64_t b, std::int64_t h, std::int64_t j, std::int64_t d) const;
  Index lse_index(std::int64_t b, std::int64_t h, std::int64_t i) const;
  void put_queries(TestTensor& t, const Array4& values) const;
  void put_keys(TestTensor& t, const Array4& values) const;
  Array4 get_queries(const TestTensor& t) const;
  Array4 get_keys(const TestTensor& t) const;
  Array4 get_lse() const;

  void check_forward() const;
  void check_backward() const;
  void check_cache() const;
  void check_rows_of_nobody(const TestTensor& t, double expected, const char* name) const;

  bool packed() const { return (problem.flags & detail::kVarlen) != 0; }
  bool decode() const { return problem.phase == detail::Phase::decode; }
  bool has(detail::Feature feature) const { return (problem.flags & feature) != 0; }
  DType side_dtype() const;
  DType lse_dtype() const;

  Device device_;
  Variant variant_;
  Random random_;
  Layout layout_;
  Lengths extent_q_, extent_k_;  // rows that a sequence owns
  Lengths begin_q_, begin_k_;    // varlen: its first packed row
  Lengths cached_;               // decode: keys before the call
  std::vector<std::vector<std::int64_t>> pages_;
  Array4 dout_values_, dlse_values_, k_appended_, v_appended_;
  std::vector<unsigned char> k_before_, v_before_;
};

}  // namespace flashcore::testing
