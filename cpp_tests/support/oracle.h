// The oracle: attention in float64 as the definition in flashcore/attention.h reads, with every matrix written out.
//
// Independent on purpose: it shares no code with the library. What sequences, pages and caches mean is resolved before
// (attention_case.cpp), so that the oracle sees one dense (batch, heads, rows, columns) array a tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "array4.h"

namespace flashcore::testing {

/// Which corner the diagonal of the causal rule and of the window starts from.
enum class Corner { top_left, bottom_right };

struct OracleCall {
  Array4 q = {}, k = {}, v = {};  ///< (batch, heads, rows, dim). Rows at or beyond a sequence's length do not exist
  std::vector<std::int64_t> seqlen_q = {}, seqlen_k = {};  ///< a length for each batch
  bool causal = false;
  Corner corner = Corner::bottom_right;
  std::int64_t window_left = -1, window_right = -1;
  double scale = 1;
  double softcap = 0;
  double dropout_p = 0;
  std::uint64_t seed = 0;
  Array4 keep = {}, bias = {};                            ///< broadcastable to (batch, heads_q, seqlen_q, seqlen_k)
  Array4 alibi = {}, sinks = {};                          ///< broadcastable to (batch, heads_q, 1, 1)
  Array4 q_descale = {}, k_descale = {}, v_descale = {};  ///< (batch, heads_k, 1, 1)
};

/// Whether the causal rule, the window and the mask leave key j to query i. Lengths are not looked at.
bool oracle_visible(const OracleCall& call, std::int64_t batch, std::int64_t head, std::int64_t i, std::int64_t j);

/// What is done to every number of every matrix that is written out: nothing for the truth, rounding to a dtype for
/// what a plain implementation in that dtype would get.
using Rounding = std::function<double(double)>;
double exact(double x);

struct OracleResult {
  Array4 out;  ///< (batch, heads_q, rows, head_dim_v)
  Array4 lse;  ///< (batch, heads_q, rows, 1)
};
OracleResult oracle_forward(const OracleCall& call, const Rounding& rounding = exact);

struct OracleGrads {
  Array4 dq, dk, dv, dbias, dsinks;  ///< each in its tensor's own shape
};
/// `dlse` may be empty.
OracleGrads oracle_backward(const OracleCall& call, const Array4& dout, const Array4& dlse,
                            const Rounding& rounding = exact);

/// What the roundings of a backward pass are relative to. Gradients are sums that partly, or even wholly, cancel: for
/// each the largest sum of absolute values that goes into one of its elements.
struct GradSizes {
  double dq, dk, dv, dbias;
  /// dsinks is a handful of long sums. A backward pass is given `out` as it was stored: the largest standard deviation
  /// that a sum gets where every number of `out` is wrong by one part at random.
  double dsinks_noise;
};
GradSizes oracle_grad_sizes(const OracleCall& call, const Array4& dout, const Array4& dlse);

/// Every row i of batch b turned by the angles of position first[b] + i. cos, sin: (1, 1, positions, pairs).
Array4 oracle_rotary(const Array4& x, const std::vector<std::int64_t>& first, const Array4& cos, const Array4& sin,
                     bool interleaved);

/// The rows of `extra` written into `cache` from row first[b] on.
Array4 oracle_append(const Array4& cache, const std::vector<std::int64_t>& first, const Array4& extra);

/// Two attentions over disjoint keys, merged.
OracleResult oracle_merge(const OracleResult& a, const OracleResult& b);

/// 32 random bits of the weight at (batch, head, query, key).
std::uint32_t oracle_random_word(std::uint64_t seed, std::int64_t batch, std::int64_t head, std::int64_t query,
                                 std::int64_t key);

}  // namespace flashcore::testing
