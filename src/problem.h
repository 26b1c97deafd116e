// Problem: what is asked, normalised and trusted. Facts only: no pointers, no strides, no device state.
//
// A Problem prints as one line and is read back from it ("the problem line"): the same words serve the log, test
// names, bench cases, bug reports and the command line. C++17: kernels include this header.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "flashcore/tensor.h"

namespace flashcore::detail {

enum class Phase : std::uint8_t { forward, backward, decode };

enum class CausalRule : std::uint8_t { none, top_left, bottom_right };

/// One bit for each thing that a kernel has to be taught. A row that does not list a bit refuses the problem.
enum Feature : std::uint32_t {
  kCausal = 1u << 0,
  kWindow = 1u << 1,
  kMask = 1u << 2,
  kBias = 1u << 3,
  kSoftcap = 1u << 4,
  kAlibi = 1u << 5,
  kSinks = 1u << 6,
  kDropout = 1u << 7,
  kVarlen = 1u << 8,
  kSequsedK = 1u << 9,
  kPaged = 1u << 10,
  kAppend = 1u << 11,
  kRotary = 1u << 12,
  kDescale = 1u << 13,
  kGroupedHeads = 1u << 14,
  kHeadDimV = 1u << 15,  // head_dim_v != head_dim
  kLse = 1u << 16,       // forward writes lse
  kDlse = 1u << 17,
  kDbias = 1u << 18,
  kDsinks = 1u << 19,
  kDeterministic = 1u << 20,
  kUnaligned = 1u << 21,  // some tensor's rows do not all start on 16-byte boundaries, or run backwards or repeat
  kCausalTopLeft = 1u << 22,
};
using FeatureSet = std::uint32_t;

/// "causal, window, …" for messages.
std::string describe_features(FeatureSet features);

/// Sizes in elements. In varlen seqlen_q and seqlen_k are the largest of any sequence (or the bound known for it), and
/// total_q, total_k the packed rows; otherwise total = batch · seqlen. In decode seqlen_k is the cache's capacity.
struct Sizes {
  std::int64_t batch = 0;
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_k = 0;
  std::int64_t total_q = 0;
  std::int64_t total_k = 0;
  std::int64_t heads_q = 0;
  std::int64_t heads_k = 0;
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;
};

struct Problem {
  Phase phase = Phase::forward;
  DType dtype = DType::float16;
  DType dtype_out = DType::float16;
  Sizes size = {};
  CausalRule causal = CausalRule::none;
  std::int64_t window_left = -1;  // -1: unbounded
  std::int64_t window_right = -1;
  double scale = 1;
  double softcap = 0;
  double dropout_p = 0;
  std::uint64_t seed = 0;
  std::int64_t page_size = 0;   // 0: not paged
  std::int64_t seqlen_new = 0;  // keys appended to the cache
  std::int64_t rotary_dim = 0;
  bool rotary_interleaved = false;
  FeatureSet flags = 0;  // the features that no other member tells: mask, bias, alibi, sinks, varlen, …

  std::int64_t group() const { return size.heads_k > 0 ? size.heads_q / size.heads_k : 1; }
};

/// Every feature the problem uses: the flags and those that the other members imply.
FeatureSet features_of(const Problem& problem);

bool operator==(const Problem& a, const Problem& b);
inline bool operator!=(const Problem& a, const Problem& b) { return !(a == b); }

/// The default scale, 1/√head_dim.
double default_scale(std::int64_t head_dim);

/// Brings a problem to its canonical form, so that equal questions are equal values: square causal masks become
/// bottom_right, rules that exclude nothing disappear.
void normalise(Problem& problem);

/// "fwd bf16 b2 q4096 k4096 h32/8 d128 causal". `parse_problem(to_line(p)) == p` for every normalised p.
std::string to_line(const Problem& problem);
/// Reads a line; the result is normalised. Throws InvalidArgument naming the words that cannot be read, are given
/// twice, or ask for what no call of that kind can do.
Problem parse_problem(std::string_view line);

}  // namespace flashcore::detail
