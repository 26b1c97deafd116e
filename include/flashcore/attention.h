// Attention: the options, the forward and backward calls, the decode call, plans and explanations.
//
// One definition holds for every device, dtype and kernel. For query i and key j of one sequence and head:
//
//   s(i,j) = softcap · tanh(scale · q_i·k_j / softcap)              (without softcap: scale · q_i·k_j)
//          − slope_h · |i + seqlen_k − seqlen_q − j|                (ALiBi, Press et al. 2022)
//          + bias(b,h,i,j)
//   s(i,j) = −inf   where the window, the causal rule, the boolean mask or a length excludes j
//   lse(i) = log( Σ_j exp s(i,j) + exp sink_h )                     (natural log; the sink only if given)
//   out(i) = Σ_j exp(s(i,j) − lse(i)) · dropout(i,j) · v_j          (a sink has no value)
//
// A query that sees no key has out = 0, lse = −inf and zero gradients, also where there is a sink. Inputs are stored in
// their dtype, sums are taken in float32 (float64 for float64). NaN or Inf in what is excluded does no harm.
// The algorithm is online softmax in blocks (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "flashcore/tensor.h"

namespace flashcore {

/// The order of the dimensions of q, k, v and out.
enum class Layout : std::uint8_t {
  bhsd,  ///< (batch, heads, seqlen, head_dim): torch's scaled_dot_product_attention
  bshd,  ///< (batch, seqlen, heads, head_dim): flash-attn, JAX, xFormers
  thd,   ///< (total tokens, heads, head_dim): packed sequences, with `Sequences`
};

enum class Causal : std::uint8_t {
  none,
  square,        ///< key j ≤ query i; an error unless seqlen_q == seqlen_k
  top_left,      ///< j ≤ i
  bottom_right,  ///< j ≤ i + seqlen_k − seqlen_q
};

/// Which keys a query may see by position. Causal rule and window compose.
///
/// The window is inclusive: i + shift − left ≤ j ≤ i + shift + right, with shift = seqlen_k − seqlen_q, or 0 where the
/// causal rule is top_left. −1 is unbounded.
struct Mask {
  Causal kind = Causal::none;
  std::int64_t left = -1;
  std::int64_t right = -1;

  static constexpr Mask none() { return {}; }
  static constexpr Mask causal() { return {Causal::square, -1, -1}; }
  static constexpr Mask top_left() { return {Causal::top_left, -1, -1}; }
  static constexpr Mask bottom_right() { return {Causal::bottom_right, -1, -1}; }
  constexpr Mask window(std::int64_t keys_left, std::int64_t keys_right) const { return {kind, keys_left, keys_right}; }
};

struct AttentionOptions {
  Layout layout = Layout::bhsd;
  Mask mask = {};
  std::optional<double> scale = {};  ///< default 1/√head_dim
  double softcap = 0;                ///< 0 is off
  double dropout_p = 0;              ///< probability in [0, 1) of dropping a weight; the rest is scaled by 1/(1−p)
  std::uint64_t seed = 0;            ///< of dropout: the same seed drops the same (batch, head, query, key) everywhere
  bool deterministic = false;        ///< backward: bitwise the same from run to run, in linear workspace
  /// A kernel by name or by whole words of one ("sm90"), and how it is to work ("cpu.decode:splits4", see tuning.h).
  /// Default: the one that is tuned for the problem, else the best.
  std::string_view kernel = {};
};

/// Packed sequences of different lengths ("varlen"), and lengths shorter than the tensors.
///
/// With cu_seqlens_q and cu_seqlens_k the layout is thd: sequence b owns the query rows
/// cu_seqlens_q[b] … cu_seqlens_q[b+1]−1, the same for keys. All int32 on the device of q. On the CPU their values are
/// checked; on CUDA they stay on the device and lengths are clamped to the tensors (FLASHCORE_CHECK=1 copies and checks
/// them, which synchronises).
struct Sequences {
  TensorView cu_seqlens_q = {};    ///< (batch + 1), starts with 0, never falls
  TensorView cu_seqlens_k = {};    ///< (batch + 1)
  TensorView seqused_k = {};       ///< (batch): only the first seqused_k[b] keys of b exist. Also without cu_seqlens
  std::int64_t max_seqlen_q = -1;  ///< −1: unknown; the total is then taken as the bound
  std::int64_t max_seqlen_k = -1;
};

/// What goes into attention. Shapes in bhsd; the optional ones are left empty.
struct AttentionInputs {
  TensorView q = {};             ///< (batch, heads_q, seqlen_q, head_dim), head_dim 1–256
  TensorView k = {};             ///< (batch, heads_k, seqlen_k, head_dim), heads_q a multiple of heads_k
  TensorView v = {};             ///< (batch, heads_k, seqlen_k, head_dim_v), head_dim_v 1–256
  TensorView mask = {};          ///< boolean, true = keep; broadcast to (batch, heads_q, seqlen_q, seqlen_k)
  TensorView bias = {};          ///< q's dtype or float32; broadcast to (batch, heads_q, seqlen_q, seqlen_k)
  TensorView alibi_slopes = {};  ///< float32, (heads_q) or (batch, heads_q)
  TensorView sinks = {};         ///< float32 or q's dtype, (heads_q): one logit a head
  TensorView q_descale = {};     ///< float32, (batch, heads_k): what float8 values are multiplied with
  TensorView k_descale = {};
  TensorView v_descale = {};
  Sequences sequences = {};
};

/// What attention writes.
struct AttentionOutputs {
  TensorView out = {};  ///< q's shape with head_dim_v; q's dtype (float8: bfloat16, float16 or float32)
  TensorView lse = {};  ///< optional in forward; float32 (float64), (batch, heads_q, seqlen_q), thd: (heads_q, total_q)
};

/// The gradients that come from above.
struct AttentionCotangents {
  TensorView dout = {};  ///< like out
  TensorView dlse = {};  ///< optional, like lse
};

/// The gradients to write. Leave empty what is not wanted.
struct AttentionGrads {
  TensorView dq = {};
  TensorView dk = {};
  TensorView dv = {};
  TensorView dbias = {};   ///< bias's own shape: summed over what was broadcast; bias's dtype or float32
  TensorView dsinks = {};  ///< like sinks
};

/// Rotary position embedding (RoFormer, Su et al. 2021), applied to q and to k_new in decode.
struct Rotary {
  TensorView cos = {};  ///< float32 or q's dtype, (positions, rotary_dim / 2), rotary_dim ≤ head_dim
  TensorView sin = {};
  bool interleaved = false;  ///< pairs (0,1),(2,3)… (GPT-J) instead of halves (GPT-NeoX)
};

/// Attention of a few new queries against a key/value cache. Shapes in bhsd.
struct DecodeInputs {
  TensorView q = {};        ///< (batch, heads_q, seqlen_q, head_dim)
  TensorView k_cache = {};  ///< (batch, heads_k, capacity, head_dim); paged: (pages, heads_k, page_size, head_dim)
  TensorView v_cache = {};  ///< the same with head_dim_v. Both caches are written where k_new is given
  TensorView cache_seqlens = {};  ///< int32 (batch): keys in the cache before this call
  TensorView block_table = {};    ///< int32 (batch, max_pages): page p of sequence b is k_cache[block_table[b][p]]
  TensorView k_new = {};  ///< (batch, heads_k, seqlen_new, head_dim): appended at cache_seqlens before attending
  TensorView v_new = {};  ///< (batch, heads_k, seqlen_new, head_dim_v)
  Rotary rotary = {};     ///< query i is at position length − seqlen_q + i, new key i at cache_seqlens + i
  TensorView mask = {};   ///< as in AttentionInputs, over (batch, heads_q, seqlen_q, capacity)
  TensorView bias = {};
  TensorView alibi_slopes = {};
  TensorView sinks = {};
  TensorView q_descale = {};
  TensorView k_descale = {};
  TensorView v_descale = {};
};

/// out = attention(q, k, v). One kernel chain on `stream`; nothing synchronises; safe in CUDA graph capture.
/// `out` must not overlap an input. Throws InvalidArgument, InvalidType, Unsupported, CudaError, OutOfMemory.
FLASHCORE_API void attention_forward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                     const AttentionOptions& options = {}, Stream stream = nullptr);

/// The gradients of attention_forward. `outputs` are the forward's results: out and lse are both needed.
FLASHCORE_API void attention_backward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                      const AttentionCotangents& cotangents, const AttentionGrads& grads,
                                      const AttentionOptions& options = {}, Stream stream = nullptr);

/// Appends k_new and v_new to the cache (if given), then attends. options.mask.kind: none or bottom_right.
FLASHCORE_API void attention_decode(const DecodeInputs& inputs, const AttentionOutputs& outputs,
                                    const AttentionOptions& options = {}, Stream stream = nullptr);

/// Two attention results over disjoint sets of keys.
struct AttentionState {
  TensorView out = {};  ///< (batch, heads, seqlen, head_dim_v)
  TensorView lse = {};  ///< float32 (float64), (batch, heads, seqlen)
};

/// merged = the attention over the union of the keys of `a` and `b`: out and lse. Layout of `out` as given by
/// `layout` (bhsd, bshd, or thd with lse (heads, total)). `merged` may be `a` or `b` itself.
FLASHCORE_API void merge_states(const AttentionState& a, const AttentionState& b, const AttentionState& merged,
                                Layout layout = Layout::bhsd, Stream stream = nullptr);

/// A call that was checked and dispatched once, to be run many times. The data pointers of the tensors given here are
/// not read; `run` takes others of the same shapes, strides, dtypes and alignment, and never allocates. A plan is
/// immutable: any number of threads may run it.
class FLASHCORE_API AttentionPlan {
 public:
  static AttentionPlan forward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                               const AttentionOptions& options = {});
  static AttentionPlan backward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                const AttentionCotangents& cotangents, const AttentionGrads& grads,
                                const AttentionOptions& options = {});
  static AttentionPlan decode(const DecodeInputs& inputs, const AttentionOutputs& outputs,
                              const AttentionOptions& options = {});

  std::size_t workspace_bytes() const noexcept;  ///< device memory that `run` needs, 256-byte aligned
  std::string kernel() const;                    ///< name of the chosen kernel
  std::string describe() const;                  ///< the problem line, the kernel, the workspace

  /// `workspace` may be null where workspace_bytes() is 0. Each `run` is for the plan made by its namesake; the tensors
  /// must describe the planned problem again, otherwise InvalidArgument.
  void run(const AttentionInputs& inputs, const AttentionOutputs& outputs, void* workspace, Stream stream) const;
  void run(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
           const AttentionGrads& grads, void* workspace, Stream stream) const;
  void run(const DecodeInputs& inputs, const AttentionOutputs& outputs, void* workspace, Stream stream) const;

 private:
  struct State;
  explicit AttentionPlan(std::shared_ptr<const State> state);
  std::shared_ptr<const State> state_;
};

/// The answer of `supports`.
struct Support {
  bool ok = false;
  std::string kernel;  ///< the kernel that would run
  std::string why;     ///< where not ok: the message that the call would throw
};

/// Whether attention_forward would run this call: the same checks, but data is not read and nothing throws.
FLASHCORE_API Support supports(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                               const AttentionOptions& options = {});
FLASHCORE_API Support supports(const DecodeInputs& inputs, const AttentionOutputs& outputs,
                               const AttentionOptions& options = {});
FLASHCORE_API Support supports(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                               const AttentionCotangents& cotangents, const AttentionGrads& grads,
                               const AttentionOptions& options = {});

/// The problem line, the chosen kernel and its workspace, and for every other kernel why it was not chosen.
FLASHCORE_API std::string explain(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                  const AttentionOptions& options = {});
FLASHCORE_API std::string explain(const DecodeInputs& inputs, const AttentionOutputs& outputs,
                                  const AttentionOptions& options = {});
FLASHCORE_API std::string explain(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                  const AttentionCotangents& cotangents, const AttentionGrads& grads,
                                  const AttentionOptions& options = {});

/// The same for a problem line such as "fwd bf16 b2 q4096 k4096 h32/8 d128 causal", with `kernel` as in
/// `AttentionOptions`. The grammar is in `problem_line_help()`. Throws InvalidArgument for a line that cannot be read.
FLASHCORE_API std::string explain(std::string_view problem_line, Device device, std::string_view kernel = {});

/// The line in canonical form: words in order, defaults left out.
FLASHCORE_API std::string canonical_problem_line(std::string_view problem_line);
FLASHCORE_API std::string problem_line_help();

}  // namespace flashcore
