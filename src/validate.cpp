// validate: the caller's words -> a Problem and its Params. Every rule of a valid call is here or in the two files of
// checks beside this one (tensor_checks: one tensor; length_checks: the values of lengths and page tables).
#include "validate.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "flashcore/error.h"
#include "length_checks.h"
#include "tensor_checks.h"

namespace flashcore::detail {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;

/// Builds one Call: each member function takes in one group of arguments.
class CallBuilder {
 public:
  /// `call` is the one that is built.
  CallBuilder(Call& call, Phase phase, const AttentionOptions& options, Device device)
      : options_(options), layout_(options.layout), read_(device, options.layout), call_(call) {
    call_.device = device;
    problem().phase = phase;
  }

  void take_qkv(const TensorView& q, const TensorView& k, const TensorView& v);
  void take_caches(const DecodeInputs& in);
  void take_new_keys(const DecodeInputs& in);
  void take_rotary(const Rotary& rotary, const TensorView& q);
  void take_sequences(const Sequences& sequences);
  void take_options();
  void take_score_tensors(const TensorView& mask, const TensorView& bias, const TensorView& alibi,
                          const TensorView& sinks);
  void take_descales(const TensorView& q, const TensorView& k, const TensorView& v);
  void take_outputs(const AttentionOutputs& outputs);
  void take_gradients(const AttentionInputs& in, const AttentionCotangents& cotangents, const AttentionGrads& grads);
  void finish(Check check, Stream stream);

 private:
  Problem& problem() { return call_.problem; }
  Params& params() { return call_.params; }
  Sizes& size() { return call_.problem.size; }
  bool is_float8() const { return call_.problem.dtype == DType::float8_e4m3; }

  void take_sizes(const Rows& q, const Rows& k, const Rows& v, const char* k_name, const char* v_name);
  void take_causal_rule();
  void full_plane(std::int64_t (&full)[4]) const;
  void fill_size_params();

  const AttentionOptions& options_;
  Layout layout_;
  TensorReader read_;
  Call& call_;
  Rows q_;
  Rows k_;
  Rows v_;
  bool same_lengths_ = false;  // varlen: queries and keys are cut by the very same offsets
};

void CallBuilder::take_sizes(const Rows& q, const Rows& k, const Rows& v, const char* k_name, const char* v_name) {
  const auto text = [](std::int64_t x) { return std::to_string(x); };
  if (q.heads < 1 || k.heads < 1) throw InvalidArgument("q and " + std::string(k_name) + " need at least 1 head");
  if (q.heads % k.heads != 0)
    throw InvalidArgument("q has " + text(q.heads) + " heads and " + k_name + " has " + text(k.heads) +
                          "; the heads of q must be a multiple of those of " + k_name);
  if (k.heads != v.heads)
    throw InvalidArgument(std::string(k_name) + " has " + text(k.heads) + " heads, but " + v_name + " has " +
                          text(v.heads));
  if (q.dim != k.dim)
    throw InvalidArgument("q has head_dim " + text(q.dim) + ", but " + k_name + " has " + text(k.dim));
  for (const std::int64_t dim : {q.dim, v.dim})
    if (dim < 1 || dim > kMaxHeadDim)
      throw InvalidArgument("head_dim " + text(dim) + " given; 1 to " + text(kMaxHeadDim) + " is allowed");
  size().batch = q.batch;
  size().seqlen_q = size().total_q = q.seq;
  size().heads_q = q.heads;
  size().heads_k = k.heads;
  size().head_dim = q.dim;
  size().head_dim_v = v.dim;
  q_ = q;
  k_ = k;
  v_ = v;
  params().q = q.params;
  params().k = k.params;
  params().v = v.params;
}

void CallBuilder::take_qkv(const TensorView& q, const TensorView& k, const TensorView& v) {
  const Rows q_rows = read_.rows(q, "q");
  read_.require_dtype(q, "q", {DType::float16, DType::bfloat16, DType::float32, DType::float64, DType::float8_e4m3});
  const Rows k_rows = read_.rows(k, "k");
  const Rows v_rows = read_.rows(v, "v");
  read_.require_dtype(k, "k (like q)", {q.dtype});
  read_.require_dtype(v, "v (like q)", {q.dtype});
  take_sizes(q_rows, k_rows, v_rows, "k", "v");
  if (k_.batch != q_.batch || v_.batch != q_.batch)
    throw InvalidArgument("q, k and v have batch sizes " + std::to_string(q_.batch) + ", " + std::to_string(k_.batch) +
                          " and " + std::to_string(v_.batch) + "; they must be equal");
  if (k_.seq != v_.seq)
    throw InvalidArgument("k has " + std::to_string(k_.seq) + " keys, but v has " + std::to_string(v_.seq));
  problem().dtype = q.dtype;
  size().seqlen_k = size().total_k = k_.seq;
  read_.reads(q, "q");
  read_.reads(k, "k");
  read_.reads(v, "v");
}

void CallBuilder::take_caches(const DecodeInputs& in) {
  if (layout_ == Layout::thd) throw InvalidArgument("decode takes layout \"bhsd\" or \"bshd\", got \"thd\"");
  const Rows q = read_.rows(in.q, "q");
  read_.require_dtype(in.q, "q", {DType::float16, DType::bfloat16, DType::float32, DType::float64, DType::float8_e4m3});
  const Rows k = read_.rows(in.k_cache, "k_cache");
  const Rows v = read_.rows(in.v_cache, "v_cache");
  read_.require_dtype(in.k_cache, "k_cache (like q)", {in.q.dtype});
  read_.require_dtype(in.v_cache, "v_cache (like q)", {in.q.dtype});
  take_sizes(q, k, v, "k_cache", "v_cache");
  problem().dtype = in.q.dtype;
  if (k.batch != v.batch || k.seq != v.seq)
    throw InvalidArgument("k_cache and v_cache must agree but for head_dim, got " + describe(in.k_cache) + " and " +
                          describe(in.v_cache));
  if (!in.cache_seqlens) throw InvalidArgument("cache_seqlens is missing: an int32 tensor of shape (batch,)");
  params().sequence.seqused_k = read_.lengths(in.cache_seqlens, "cache_seqlens", q.batch);
  if (in.block_table) {
    read_.require_device(in.block_table, "block_table");
    read_.require_dtype(in.block_table, "block_table", {DType::int32});
    const TensorView& t = in.block_table;
    if (t.rank != 2 || t.shape[0] != q.batch || (t.numel() > 0 && t.shape[1] > 1 && t.stride[1] != 1))
      throw InvalidArgument("block_table must have shape (" + std::to_string(q.batch) +
                            ", max_pages) with contiguous rows, got " + describe(t));
    if (k.seq < 1) throw InvalidArgument("a paged cache needs pages of at least 1 key, got " + describe(in.k_cache));
    params().page = {static_cast<const std::int32_t*>(t.data), t.shape[0] > 1 ? t.stride[0] : 0, k.seq, k.batch,
                     t.shape[1]};
    problem().page_size = k.seq;
    size().seqlen_k = t.shape[1] * k.seq;
  } else {
    if (k.batch != q.batch)
      throw InvalidArgument("k_cache has batch size " + std::to_string(k.batch) + ", but q has " +
                            std::to_string(q.batch) + "; a paged cache needs block_table");
    size().seqlen_k = k.seq;
  }
  size().total_k = size().batch * size().seqlen_k;
  read_.reads(in.q, "q");
  read_.reads(in.cache_seqlens, "cache_seqlens");
  read_.reads(in.block_table, "block_table");
  if (!in.k_new) {
    read_.reads(in.k_cache, "k_cache");
    read_.reads(in.v_cache, "v_cache");
  }
}

void CallBuilder::take_new_keys(const DecodeInputs& in) {
  if (static_cast<bool>(in.k_new) != static_cast<bool>(in.v_new))
    throw InvalidArgument("k_new and v_new must be given together, got only " +
                          std::string(in.k_new ? "k_new" : "v_new"));
  if (!in.k_new) return;
  Rows like = k_;
  like.batch = q_.batch;
  like.seq = read_.rows(in.k_new, "k_new").seq;
  params().append.k_new = read_.rows(in.k_new, "k_new", like, k_.dim).params;
  params().append.v_new = read_.rows(in.v_new, "v_new", like, v_.dim).params;
  read_.require_dtype(in.k_new, "k_new (like the cache)", {in.k_cache.dtype});
  read_.require_dtype(in.v_new, "v_new (like the cache)", {in.v_cache.dtype});
  problem().seqlen_new = params().sequence.seqlen_new = like.seq;
  read_.reads(in.k_new, "k_new");
  read_.reads(in.v_new, "v_new");
  read_.writes(in.k_cache, "k_cache");
  read_.writes(in.v_cache, "v_cache");
}

void CallBuilder::take_rotary(const Rotary& rotary, const TensorView& q) {
  if (!rotary.cos && !rotary.sin) return;
  if (!rotary.cos || !rotary.sin) throw InvalidArgument("rotary_cos and rotary_sin must be given together");
  const TensorView& c = rotary.cos;
  const TensorView& s = rotary.sin;
  read_.require_device(c, "rotary_cos");
  read_.require_device(s, "rotary_sin");
  read_.require_dtype(c, "rotary_cos", {DType::float32, q.dtype});
  read_.require_dtype(s, "rotary_sin (like rotary_cos)", {c.dtype});
  const bool same = c.rank == 2 && s.rank == 2 && c.shape == s.shape;
  if (!same || c.shape[1] < 1 || 2 * c.shape[1] > size().head_dim)
    throw InvalidArgument(
        "rotary_cos and rotary_sin must have one shape (positions, rotary_dim / 2) with rotary_dim at "
        "most head_dim " +
        std::to_string(size().head_dim) + ", got " + describe(c) + " and " + describe(s));
  if (c.numel() > 0 && c.shape[1] > 1 && (c.stride[1] != 1 || s.stride[1] != 1))
    throw InvalidArgument("rotary_cos and rotary_sin must have contiguous rows");
  RotaryParams& r = params().rotary;
  r = {c.data,
       s.data,
       c.dtype,
       c.stride[0],
       s.stride[0],
       c.shape[0],
       static_cast<std::int32_t>(2 * c.shape[1]),
       rotary.interleaved};
  problem().rotary_dim = r.dim;
  problem().rotary_interleaved = rotary.interleaved;
  read_.reads(c, "rotary_cos");
  read_.reads(s, "rotary_sin");
}

void CallBuilder::take_sequences(const Sequences& s) {
  const bool packed = s.cu_seqlens_q || s.cu_seqlens_k;
  if (packed != (layout_ == Layout::thd))
    throw InvalidArgument(packed ? "cu_seqlens_q and cu_seqlens_k go with layout \"thd\""
                                 : "layout \"thd\" needs cu_seqlens_q and cu_seqlens_k");
  if (packed) {
    if (!s.cu_seqlens_q || !s.cu_seqlens_k)
      throw InvalidArgument("cu_seqlens_q and cu_seqlens_k must be given together");
    if (s.cu_seqlens_q.rank != 1 || s.cu_seqlens_q.shape[0] < 1)
      throw InvalidArgument("cu_seqlens_q must have shape (batch + 1,), got " + describe(s.cu_seqlens_q));
    const std::int64_t entries = s.cu_seqlens_q.shape[0];
    params().sequence.cu_seqlens_q = read_.lengths(s.cu_seqlens_q, "cu_seqlens_q", entries);
    params().sequence.cu_seqlens_k = read_.lengths(s.cu_seqlens_k, "cu_seqlens_k", entries);
    for (const std::int64_t longest : {s.max_seqlen_q, s.max_seqlen_k})
      if (longest < -1)
        throw InvalidArgument("max_seqlen " + std::to_string(longest) + " given; it must be at least 0");
    size().batch = entries - 1;
    size().seqlen_q = s.max_seqlen_q >= 0 ? std::min(s.max_seqlen_q, q_.seq) : q_.seq;
    size().seqlen_k = s.max_seqlen_k >= 0 ? std::min(s.max_seqlen_k, k_.seq) : k_.seq;
    problem().flags |= kVarlen;
    same_lengths_ = s.cu_seqlens_q.data == s.cu_seqlens_k.data && !s.seqused_k;
    read_.reads(s.cu_seqlens_q, "cu_seqlens_q");
    read_.reads(s.cu_seqlens_k, "cu_seqlens_k");
  }
  if (s.seqused_k) {
    params().sequence.seqused_k = read_.lengths(s.seqused_k, "seqused_k", size().batch);
    problem().flags |= kSequsedK;
    read_.reads(s.seqused_k, "seqused_k");
  }
}

void CallBuilder::take_causal_rule() {
  Problem& p = problem();
  const bool decode = p.phase == Phase::decode;
  switch (options_.mask.kind) {
    case Causal::none:
      return;
    case Causal::top_left:
      if (decode) throw InvalidArgument("decode is causal bottom-right; top_left was given");
      p.causal = CausalRule::top_left;
      return;
    case Causal::bottom_right:
      p.causal = CausalRule::bottom_right;
      return;
    case Causal::square:
      break;
  }
  p.causal = CausalRule::bottom_right;
  if (decode || same_lengths_) return;
  const bool fixed = (p.flags & (kVarlen | kSequsedK)) == 0;
  if (fixed && p.size.seqlen_q == p.size.seqlen_k) return;
  throw InvalidArgument((fixed ? "causal given with seqlen_q " + std::to_string(p.size.seqlen_q) + " and seqlen_k " +
                                     std::to_string(p.size.seqlen_k)
                               : std::string("causal given with lengths that may differ between queries and keys")) +
                        "; say which corner the diagonal starts from: \"top_left\" (key <= query) or \"bottom_right\" "
                        "(key <= query + seqlen_k - seqlen_q)");
}

void CallBuilder::take_options() {
  Problem& p = problem();
  take_causal_rule();
  const Mask& mask = options_.mask;
  if (mask.left < -1 || mask.right < -1)
    throw InvalidArgument("window (" + std::to_string(mask.left) + ", " + std::to_string(mask.right) +
                          ") given; each side must be at least 0, or -1 for unbounded");
  p.window_left = mask.left;
  p.window_right = mask.right;
  p.scale = options_.scale.value_or(default_scale(size().head_dim));
  p.softcap = options_.softcap;
  p.dropout_p = options_.dropout_p;
  p.seed = options_.seed;
  if (options_.deterministic) p.flags |= kDeterministic;
  if (!std::isfinite(p.scale)) throw InvalidArgument("scale " + std::to_string(p.scale) + " given; it must be finite");
  if (!(p.softcap >= 0) || !std::isfinite(p.softcap))
    throw InvalidArgument("softcap " + std::to_string(p.softcap) + " given; it must be 0 (off) or positive and finite");
  if (!(p.dropout_p >= 0 && p.dropout_p < 1))
    throw InvalidArgument("dropout_p " + std::to_string(p.dropout_p) + " given; it must lie in [0, 1)");
}

void CallBuilder::full_plane(std::int64_t (&full)[4]) const {
  const Sizes& s = call_.problem.size;
  full[0] = s.batch;
  full[1] = s.heads_q;
  full[2] = s.seqlen_q;
  full[3] = s.seqlen_k;
}

void CallBuilder::take_score_tensors(const TensorView& mask, const TensorView& bias, const TensorView& alibi,
                                     const TensorView& sinks) {
  Problem& p = problem();
  std::int64_t full[4];
  std::int64_t own[4];
  full_plane(full);
  if (mask) {
    if (mask.dtype != DType::boolean)
      throw InvalidType(std::string("mask must be boolean (true = keep), got ") + name_of(mask.dtype) +
                        "; an additive mask is given as bias");
    params().mask = read_.plane(mask, "mask", full, own);
    p.flags |= kMask;
    read_.reads(mask, "mask");
  }
  if (bias) {
    const DType other = is_float8() ? DType::bfloat16 : p.dtype;
    read_.require_dtype(bias, "bias", {other, DType::float32});
    params().bias = read_.plane(bias, "bias", full, own);
    p.flags |= kBias;
    read_.reads(bias, "bias");
  }
  if (alibi) {
    read_.require_dtype(alibi, "alibi_slopes", {DType::float32, p.dtype});
    params().alibi = read_.per_head(alibi, "alibi_slopes", p.size.batch, p.size.heads_q, true);
    p.flags |= kAlibi;
    read_.reads(alibi, "alibi_slopes");
  }
  if (sinks) {
    read_.require_dtype(sinks, "sinks", {DType::float32, p.dtype});
    params().sinks = read_.per_head(sinks, "sinks", p.size.batch, p.size.heads_q, false);
    p.flags |= kSinks;
    read_.reads(sinks, "sinks");
  }
}

void CallBuilder::take_descales(const TensorView& q, const TensorView& k, const TensorView& v) {
  const auto take = [this](const TensorView& t, const char* name, HeadParams& target) {
    if (!t) return;
    if (!is_float8())
      throw InvalidArgument(std::string(name) + " belongs to float8 inputs, but q is " + name_of(problem().dtype));
    read_.require_dtype(t, name, {DType::float32});
    target = read_.per_head(t, name, size().batch, size().heads_k, true);
    problem().flags |= kDescale;
    read_.reads(t, name);
  };
  take(q, "q_descale", params().q_descale);
  take(k, "k_descale", params().k_descale);
  take(v, "v_descale", params().v_descale);
}

void CallBuilder::take_outputs(const AttentionOutputs& outputs) {
  Problem& p = problem();
  const bool backward = p.phase == Phase::backward;
  params().out = read_.rows(outputs.out, "out", q_, size().head_dim_v).params;
  if (is_float8())
    read_.require_dtype(outputs.out, "out", {DType::bfloat16, DType::float16, DType::float32});
  else
    read_.require_dtype(outputs.out, "out (like q)", {p.dtype});
  p.dtype_out = outputs.out.dtype;
  if (backward && !outputs.lse) throw InvalidArgument("lse is missing: the backward pass needs the forward's lse");
  if (outputs.lse) {
    params().lse = read_.row_numbers(outputs.lse, "lse", q_, p.dtype);
    if (!backward) p.flags |= kLse;
  }
  if (backward) {
    read_.reads(outputs.out, "out");
    read_.reads(outputs.lse, "lse");
  } else {
    read_.writes(outputs.out, "out");
    read_.writes(outputs.lse, "lse");
  }
}

void CallBuilder::take_gradients(const AttentionInputs& in, const AttentionCotangents& cotangents,
                                 const AttentionGrads& grads) {
  Problem& p = problem();
  GradParams& g = params().grad;
  g.dout = read_.rows(cotangents.dout, "dout", q_, size().head_dim_v).params;
  read_.require_dtype(cotangents.dout, "dout (like out)", {p.dtype_out});
  read_.reads(cotangents.dout, "dout");
  if (cotangents.dlse) {
    g.dlse = read_.row_numbers(cotangents.dlse, "dlse", q_, p.dtype);
    p.flags |= kDlse;
    read_.reads(cotangents.dlse, "dlse");
  }
  const auto take = [&](const TensorView& t, const char* name, const Rows& like, TensorParams& target) {
    if (!t) return;
    target = read_.rows(t, name, like, like.dim).params;
    read_.require_dtype(t, name, {p.dtype});
    read_.writes(t, name);
  };
  take(grads.dq, "dq", q_, g.dq);
  take(grads.dk, "dk", k_, g.dk);
  take(grads.dv, "dv", v_, g.dv);
  if (grads.dbias) {
    if (!in.bias) throw InvalidArgument("dbias is asked for, but no bias was given");
    std::int64_t full[4];
    std::int64_t of_bias[4];
    full_plane(full);
    read_.plane(in.bias, "bias", full, of_bias);
    read_.require_dtype(grads.dbias, "dbias", {in.bias.dtype, DType::float32});
    g.dbias = read_.plane(grads.dbias, "dbias", full, g.dbias_shape);
    for (int axis = 0; axis < 4; ++axis)
      if (g.dbias_shape[axis] != of_bias[axis])
        throw InvalidArgument("dbias must have the shape of bias, " + describe(in.bias) + ", got " +
                              describe(grads.dbias));
    p.flags |= kDbias;
    read_.writes(grads.dbias, "dbias");
  }
  if (grads.dsinks) {
    if (!in.sinks) throw InvalidArgument("dsinks is asked for, but no sinks were given");
    read_.require_dtype(grads.dsinks, "dsinks", {in.sinks.dtype, DType::float32});
    g.dsinks = read_.per_head(grads.dsinks, "dsinks", size().batch, size().heads_q, false);
    p.flags |= kDsinks;
    read_.writes(grads.dsinks, "dsinks");
  }
}

void CallBuilder::fill_size_params() {
  const Problem& p = problem();
  Params& out = params();
  const Sizes& s = p.size;
  out.dtype = p.dtype;
  out.dtype_out = p.dtype_out;
  out.size = {s.batch,
              s.seqlen_q,
              s.seqlen_k,
              s.total_q,
              s.total_k,
              static_cast<std::int32_t>(s.heads_q),
              static_cast<std::int32_t>(s.heads_k),
              static_cast<std::int32_t>(s.head_dim),
              static_cast<std::int32_t>(s.head_dim_v)};
  out.position = {p.causal != CausalRule::none, p.causal == CausalRule::top_left, p.window_left, p.window_right};
  out.score = {p.scale, p.softcap};
  if (p.dropout_p > 0)
    out.dropout = {p.seed, static_cast<std::uint32_t>(std::floor(std::ldexp(p.dropout_p, 32))), 1 / (1 - p.dropout_p)};
}

void CallBuilder::finish(Check check, Stream stream) {
  read_.finish(check == Check::everything);
  if (read_.unaligned()) problem().flags |= kUnaligned;
  normalise(problem());
  fill_size_params();
  if (check == Check::everything) check_lengths(problem(), params(), call_.device, stream);
}

CallBuilder common_part(Call& call, Phase phase, const AttentionInputs& in, const AttentionOutputs& outputs,
                        const AttentionOptions& options) {
  CallBuilder builder(call, phase, options, in.q.device);
  builder.take_qkv(in.q, in.k, in.v);
  builder.take_sequences(in.sequences);
  builder.take_options();
  builder.take_score_tensors(in.mask, in.bias, in.alibi_slopes, in.sinks);
  builder.take_descales(in.q_descale, in.k_descale, in.v_descale);
  builder.take_outputs(outputs);
  return builder;
}

}  // namespace

Call validate(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options,
              Check check, Stream stream) {
  Call call;
  common_part(call, Phase::forward, inputs, outputs, options).finish(check, stream);
  return call;
}

Call validate(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
              const AttentionGrads& grads, const AttentionOptions& options, Check check, Stream stream) {
  Call call;
  CallBuilder builder = common_part(call, Phase::backward, inputs, outputs, options);
  builder.take_gradients(inputs, cotangents, grads);
  builder.finish(check, stream);
  return call;
}

Call validate(const DecodeInputs& in, const AttentionOutputs& outputs, const AttentionOptions& options, Check check,
              Stream stream) {
  Call call;
  CallBuilder builder(call, Phase::decode, options, in.q.device);
  builder.take_caches(in);
  builder.take_new_keys(in);
  builder.take_rotary(in.rotary, in.q);
  builder.take_options();
  builder.take_score_tensors(in.mask, in.bias, in.alibi_slopes, in.sinks);
  builder.take_descales(in.q_descale, in.k_descale, in.v_descale);
  builder.take_outputs(outputs);
  builder.finish(check, stream);
  return call;
}

}  // namespace flashcore::detail
