// The CPU's reference backward: dq, dk, dv, dbias and dsinks, each in its own simple pass, in linear workspace.
//
// With p = exp(s − lse) and Δ_i = Σ_d dout·out − dlse, the gradient of a score is dS = p ∘ (dropout · dout·v − Δ): the
// gradient of lse enters each score with weight p, which is why Δ takes it up. A sink is a score whose value is 0, so
// its gradient is −exp(sink − lse) · Δ. Everything is summed in floats (doubles for float64) and rounded once.
#include <cmath>

#include "../semantics.h"
#include "kernels.h"
#include "rows.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

constexpr std::int64_t kBiasRows = 32;  // rows of dbias that are summed at a time

enum Slice { kInputs, kKeyGrads, kRows, kBiasTile };  // the workspace's parts

/// Numbers in each part of the workspace, for one sequence of `keys` keys.
struct Parts {
  std::int64_t inputs, key_grads, rows, bias_tile;
};

Parts parts_of(std::int64_t keys, std::int64_t dim, std::int64_t dim_v, bool with_bias) {
  return {keys * (dim + dim_v), keys * (dim + dim_v), 3 * keys + 2 * dim + dim_v,
          with_bias ? kBiasRows * std::max<std::int64_t>(keys, 1) : 0};
}

/// The indices that are summed into index `own` of dbias: itself, or all where bias was broadcast.
KeyRange summed_into(std::int64_t shape, std::int64_t own, std::int64_t extent) {
  return shape == 1 ? KeyRange{0, extent} : KeyRange{own, std::min(own + 1, extent)};
}

template <class T>
class Backward {
 public:
  using Acc = typename Accumulator<T>::type;

  Backward(const Params& params, const Plan& plan, void* workspace)
      : p_(params), dim_(p_.size.head_dim), dim_v_(p_.size.head_dim_v) {
    const std::int64_t keys = p_.size.seqlen_k;
    keys_ = slice<Acc>(workspace, plan.slices[kInputs]);
    values_ = keys_ + keys * dim_;
    key_grads_ = slice<Acc>(workspace, plan.slices[kKeyGrads]);
    value_grads_ = key_grads_ + keys * dim_;
    score_grads_ = slice<Acc>(workspace, plan.slices[kRows]);
    slopes_ = score_grads_ + keys;
    weights_ = slopes_ + keys;
    query_ = weights_ + keys;
    query_grad_ = query_ + dim_;
    dout_ = query_grad_ + dim_;
    bias_tile_ = slice<Acc>(workspace, plan.slices[kBiasTile]);
  }

  void run() {
    const GradParams& grad = p_.grad;
    if (grad.dq.data || grad.dk.data || grad.dv.data) input_gradients();
    if (grad.dbias.data) bias_gradient();
    if (grad.dsinks.data) sink_gradient();
  }

 private:
  std::int64_t group() const { return p_.size.heads_q / p_.size.heads_k; }

  Acc lse_of(const Sequence& s, std::int64_t head, std::int64_t i) const {
    return static_cast<const Acc*>(p_.lse.data)[row_offset(p_.lse, s, head, i)];
  }

  const T* row_of(const TensorParams& t, const Sequence& s, std::int64_t head, std::int64_t i) const {
    return static_cast<const T*>(t.data) + q_offset(t, s, head, i);
  }

  Acc delta_of(const Sequence& s, std::int64_t head, std::int64_t i) const {
    const T* dout = row_of(p_.grad.dout, s, head, i);
    const T* out = row_of(p_.out, s, head, i);
    Acc delta = 0;
    for (std::int64_t d = 0; d < dim_v_; ++d) delta += load(dout[d]) * load(out[d]);
    const RowParams& dlse = p_.grad.dlse;
    return dlse.data ? delta - static_cast<const Acc*>(dlse.data)[row_offset(dlse, s, head, i)] : delta;
  }

  void load_keys(const Sequence& s, std::int64_t head_k) {
    for (std::int64_t j = 0; j < s.seqlen_k; ++j) {
      load_row(keys_ + j * dim_, static_cast<const T*>(p_.k.data) + k_offset(p_, p_.k, s, head_k, j), dim_);
      load_row(values_ + j * dim_v_, static_cast<const T*>(p_.v.data) + k_offset(p_, p_.v, s, head_k, j), dim_v_);
    }
  }

  /// For query i and each key of the returned range: the gradient of its score, the softcap's slope, and its weight
  /// after dropout. All three are 0 for a key that is excluded. The query and its dout are left in query_ and dout_.
  KeyRange score_gradients(const Sequence& s, std::int64_t head, std::int64_t i) {
    const KeyRange keys = visible_keys(p_.position, s, i);
    const Acc lse = lse_of(s, head, i);
    if (keys.begin >= keys.end || lse == kMinusInfinity<Acc>) return {0, 0};
    load_row(query_, row_of(p_.q, s, head, i), dim_);
    load_row(dout_, row_of(p_.grad.dout, s, head, i), dim_v_);
    const Acc scale = static_cast<Acc>(p_.score.scale);
    const Acc alibi_slope = head_value<Acc>(p_.alibi, s.batch, head, 0);
    const Acc delta = delta_of(s, head, i);
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      score_grads_[j] = slopes_[j] = weights_[j] = 0;
      if (!kept_by_mask(p_.mask, s, head, i, j)) continue;
      const Acc product = dot(query_, keys_ + j * dim_, dim_);
      const Score<Acc> score = score_of(p_, s, head, i, j, product, scale, alibi_slope);
      if (score.value == kMinusInfinity<Acc>) continue;
      const Acc weight = std::exp(score.value - lse);
      const Acc factor = dropout_factor<Acc>(p_.dropout, s, head, i, j);
      const Acc weight_grad = factor == 0 ? Acc(0) : factor * dot(dout_, values_ + j * dim_v_, dim_v_);
      score_grads_[j] = weight * (weight_grad - delta);
      slopes_[j] = score.slope;
      weights_[j] = weight * factor;
    }
    return keys;
  }

  /// dq, dk, dv. Rows that no sequence owns, unused keys and empty queries keep the 0 that is written first.
  void input_gradients() {
    fill(p_.grad.dq, query_extents(p_, dim_), T{});
    fill(p_.grad.dk, key_extents(p_, dim_), T{});
    fill(p_.grad.dv, key_extents(p_, dim_v_), T{});
    for (std::int64_t batch = 0; batch < p_.size.batch; ++batch) {
      const Sequence s = sequence_of(p_, batch);
      for (std::int64_t head_k = 0; head_k < p_.size.heads_k; ++head_k) {
        load_keys(s, head_k);
        std::fill_n(key_grads_, s.seqlen_k * dim_, Acc(0));
        std::fill_n(value_grads_, s.seqlen_k * dim_v_, Acc(0));
        for (std::int64_t head = head_k * group(); head < (head_k + 1) * group(); ++head)
          for (std::int64_t i = 0; i < s.seqlen_q; ++i) add_query(s, head, i);
        store_key_gradients(s, head_k);
      }
    }
  }

  void add_query(const Sequence& s, std::int64_t head, std::int64_t i) {
    const KeyRange keys = score_gradients(s, head, i);
    const Acc scale = static_cast<Acc>(p_.score.scale);
    std::fill_n(query_grad_, dim_, Acc(0));
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      const Acc product_grad = score_grads_[j] * slopes_[j] * scale;
      add_scaled(query_grad_, product_grad, keys_ + j * dim_, dim_);
      add_scaled(key_grads_ + j * dim_, product_grad, query_, dim_);
      add_scaled(value_grads_ + j * dim_v_, weights_[j], dout_, dim_v_);
    }
    const TensorParams& dq = p_.grad.dq;
    if (dq.data) store_row(static_cast<T*>(dq.data) + q_offset(dq, s, head, i), query_grad_, dim_);
  }

  void store_key_gradients(const Sequence& s, std::int64_t head_k) {
    const TensorParams& dk = p_.grad.dk;
    const TensorParams& dv = p_.grad.dv;
    for (std::int64_t j = 0; j < s.seqlen_k; ++j) {
      if (dk.data) store_row(static_cast<T*>(dk.data) + k_offset(p_, dk, s, head_k, j), key_grads_ + j * dim_, dim_);
      if (dv.data)
        store_row(static_cast<T*>(dv.data) + k_offset(p_, dv, s, head_k, j), value_grads_ + j * dim_v_, dim_v_);
    }
  }

  /// dbias, tile by tile of its own shape: everything that was broadcast from a tile is summed before it is rounded.
  void bias_gradient() {
    const std::int64_t (&shape)[4] = p_.grad.dbias_shape;
    for (std::int64_t b = 0; b < shape[0]; ++b)
      for (std::int64_t h = 0; h < shape[1]; ++h)
        for (std::int64_t first = 0; first < shape[2]; first += kBiasRows)
          bias_tile(b, h, first, std::min(kBiasRows, shape[2] - first));
  }

  void bias_tile(std::int64_t own_batch, std::int64_t own_head, std::int64_t first, std::int64_t rows) {
    const std::int64_t (&shape)[4] = p_.grad.dbias_shape;
    const KeyRange batches = summed_into(shape[0], own_batch, p_.size.batch);
    const KeyRange heads = summed_into(shape[1], own_head, p_.size.heads_q);
    std::fill_n(bias_tile_, rows * shape[3], Acc(0));
    for (std::int64_t batch = batches.begin; batch < batches.end; ++batch) {
      const Sequence s = sequence_of(p_, batch);
      for (std::int64_t head = heads.begin; head < heads.end; ++head) {
        load_keys(s, head / group());
        for (std::int64_t r = 0; r < rows; ++r) add_bias_row(s, head, first + r, bias_tile_ + r * shape[3]);
      }
    }
    const PlaneParams& dbias = p_.grad.dbias;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t j = 0; j < shape[3]; ++j)
        store_as(dbias.data, dbias.dtype, plane_offset(dbias, own_batch, own_head, first + r, j),
                 bias_tile_[r * shape[3] + j]);
  }

  void add_bias_row(const Sequence& s, std::int64_t head, std::int64_t own_query, Acc* row) {
    const std::int64_t (&shape)[4] = p_.grad.dbias_shape;
    const KeyRange queries = summed_into(shape[2], own_query, s.seqlen_q);
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      const KeyRange keys = score_gradients(s, head, i);
      for (std::int64_t j = keys.begin; j < keys.end; ++j) row[shape[3] == 1 ? 0 : j] += score_grads_[j];
    }
  }

  void sink_gradient() {
    for (std::int64_t head = 0; head < p_.size.heads_q; ++head) {
      const double sink = head_value<double>(p_.sinks, 0, head, 0);
      double sum = 0;
      for (std::int64_t batch = 0; batch < p_.size.batch; ++batch) {
        const Sequence s = sequence_of(p_, batch);
        for (std::int64_t i = 0; i < s.seqlen_q; ++i) {
          const double lse = lse_of(s, head, i);
          if (lse != kMinusInfinity<double>) sum -= std::exp(sink - lse) * delta_of(s, head, i);
        }
      }
      store_as(p_.grad.dsinks.data, p_.grad.dsinks.dtype, head * p_.grad.dsinks.head, sum);
    }
  }

  const Params& p_;
  const std::int64_t dim_;
  const std::int64_t dim_v_;
  Acc* keys_;         // (seqlen_k, head_dim): one head's keys as floats
  Acc* values_;       // (seqlen_k, head_dim_v)
  Acc* key_grads_;    // (seqlen_k, head_dim)
  Acc* value_grads_;  // (seqlen_k, head_dim_v)
  Acc* score_grads_;  // (seqlen_k), of one query; the next two as well
  Acc* slopes_;
  Acc* weights_;
  Acc* query_;       // (head_dim)
  Acc* query_grad_;  // (head_dim)
  Acc* dout_;        // (head_dim_v)
  Acc* bias_tile_;   // (kBiasRows, seqlen_k)
};

}  // namespace

void plan_backward(const Problem& problem, const DeviceInfo&, Plan& plan) {
  const std::size_t number = problem.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  const Parts parts =
      parts_of(problem.size.seqlen_k, problem.size.head_dim, problem.size.head_dim_v, (problem.flags & kDbias) != 0);
  const auto add = [&](Slice part, std::int64_t numbers) {
    plan.slices[part] = plan.workspace.add(static_cast<std::size_t>(numbers) * number);
  };
  add(kInputs, parts.inputs);
  add(kKeyGrads, parts.key_grads);
  add(kRows, parts.rows);
  add(kBiasTile, parts.bias_tile);
}

void launch_backward(const Plan& plan, const Params& params, void* workspace, Stream) {
  with_wide_storage(params.dtype, [&](auto storage) { Backward<decltype(storage)>(params, plan, workspace).run(); });
}

}  // namespace flashcore::cpu
