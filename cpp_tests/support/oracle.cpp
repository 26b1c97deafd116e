// The oracle: attention in float64, one sequence and head at a time, as matrices.
#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flashcore::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// A matrix of one sequence and head.
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t columns)
      : rows(rows), columns(columns), values(static_cast<std::size_t>(rows * columns)) {}
  double& operator()(std::int64_t i, std::int64_t j) { return values[static_cast<std::size_t>(i * columns + j)]; }
  double operator()(std::int64_t i, std::int64_t j) const { return values[static_cast<std::size_t>(i * columns + j)]; }

  std::int64_t rows, columns;
  std::vector<double> values;
};

Matrix head_of(const Array4& x, std::int64_t batch, std::int64_t head, std::int64_t rows, double factor = 1) {
  Matrix m(rows, x.size(3));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t d = 0; d < m.columns; ++d) m(i, d) = factor * x(batch, head, i, d);
  return m;
}

Matrix absolute(Matrix m) {
  for (double& x : m.values) x = std::fabs(x);
  return m;
}

Matrix transposed(const Matrix& a) {
  Matrix t(a.columns, a.rows);
  for (std::int64_t i = 0; i < a.rows; ++i)
    for (std::int64_t j = 0; j < a.columns; ++j) t(j, i) = a(i, j);
  return t;
}

/// a · b. A zero in `a` means "not there": what stands in b's row is not looked at.
Matrix product(const Matrix& a, const Matrix& b, const Rounding& rounding) {
  Matrix c(a.rows, b.columns);
  for (std::int64_t i = 0; i < a.rows; ++i)
    for (std::int64_t j = 0; j < a.columns; ++j) {
      if (a(i, j) == 0) continue;
      for (std::int64_t d = 0; d < b.columns; ++d) c(i, d) += a(i, j) * b(j, d);
    }
  for (double& x : c.values) x = rounding(x);
  return c;
}

void add_to(Array4& target, const Matrix& m, std::int64_t batch, std::int64_t head) {
  for (std::int64_t i = 0; i < m.rows; ++i)
    for (std::int64_t d = 0; d < m.columns; ++d) target(batch, head, i, d) += m(i, d);
}

/// One sequence and head of a call, and every matrix that leads to its output.
class Head {
 public:
  Head(const OracleCall& call, std::int64_t batch, std::int64_t head, const Rounding& rounding)
      : call_(call),
        batch_(batch),
        head_(head),
        kv_head_(head / (call.q.size(1) / call.k.size(1))),
        seqlen_q_(call.seqlen_q[static_cast<std::size_t>(batch)]),
        seqlen_k_(call.seqlen_k[static_cast<std::size_t>(batch)]),
        rounding_(rounding),
        q(head_of(call.q, batch, head, seqlen_q_, descale(call.q_descale))),
        k(head_of(call.k, batch, kv_head_, seqlen_k_, descale(call.k_descale))),
        v(head_of(call.v, batch, kv_head_, seqlen_k_, descale(call.v_descale))),
        weights(seqlen_q_, seqlen_k_),
        dots(product(q, transposed(k), exact)),
        slopes(seqlen_q_, seqlen_k_),
        dropout(seqlen_q_, seqlen_k_),
        lse(seqlen_q_, 1),
        sink_weights(seqlen_q_, 1) {
    for (std::int64_t i = 0; i < seqlen_q_; ++i) softmax_row(i);
  }

  std::int64_t kv_head() const { return kv_head_; }
  std::int64_t seqlen_q() const { return seqlen_q_; }
  std::int64_t seqlen_k() const { return seqlen_k_; }

  /// The weights after dropout.
  Matrix kept_weights() const {
    Matrix m = weights;
    for (std::size_t n = 0; n < m.values.size(); ++n) m.values[n] *= dropout.values[n];
    return m;
  }

 private:
  double descale(const Array4& factors) const { return factors ? factors(batch_, kv_head_, 0, 0) : 1; }

  /// The score of a visible pair; sets the softcap's slope there.
  double score(std::int64_t i, std::int64_t j) {
    double s = call_.scale * dots(i, j);
    slopes(i, j) = 1;
    if (call_.softcap > 0) {
      const double t = std::tanh(s / call_.softcap);
      s = call_.softcap * t;
      slopes(i, j) = 1 - t * t;
    }
    if (call_.alibi) {
      const double distance = std::fabs(static_cast<double>(i + seqlen_k_ - seqlen_q_ - j));
      s -= call_.alibi.broadcast(batch_, head_) * distance;
    }
    if (call_.bias) s += call_.bias.broadcast(batch_, head_, i, j);
    return rounding_(s);
  }

  double dropout_factor(std::int64_t i, std::int64_t j) const {
    if (call_.dropout_p == 0) return 1;
    const double threshold = std::floor(std::ldexp(call_.dropout_p, 32));
    const bool dropped = oracle_random_word(call_.seed, batch_, head_, i, j) < threshold;
    return dropped ? 0 : 1 / (1 - call_.dropout_p);
  }

  void softmax_row(std::int64_t i) {
    std::vector<double> scores(static_cast<std::size_t>(seqlen_k_), -kInfinity);
    for (std::int64_t j = 0; j < seqlen_k_; ++j)
      if (oracle_visible(call_, batch_, head_, i, j)) scores[static_cast<std::size_t>(j)] = score(i, j);
    double largest = -kInfinity;
    for (const double s : scores) largest = std::max(largest, s);
    lse(i, 0) = -kInfinity;
    if (largest == -kInfinity) return;  // an empty row, sink or not: all weights stay 0
    const double sink = call_.sinks ? call_.sinks.broadcast(0, head_) : -kInfinity;
    largest = std::max(largest, sink);
    double sum = std::exp(sink - largest);
    for (const double s : scores) sum += std::exp(s - largest);
    lse(i, 0) = largest + std::log(sum);
    sink_weights(i, 0) = std::exp(sink - lse(i, 0));
    for (std::int64_t j = 0; j < seqlen_k_; ++j) {
      weights(i, j) = rounding_(std::exp(scores[static_cast<std::size_t>(j)] - lse(i, 0)));
      dropout(i, j) = dropout_factor(i, j);
    }
  }

  const OracleCall& call_;
  std::int64_t batch_, head_, kv_head_, seqlen_q_, seqlen_k_;
  const Rounding& rounding_;

 public:
  Matrix q, k, v;
  Matrix weights;       // softmax, before dropout
  Matrix dots;          // of queries and keys, those that are not seen included
  Matrix slopes;        // of the softcap; 0 where the key is not seen
  Matrix dropout;       // 0 or 1/(1-p)
  Matrix lse;           // a column
  Matrix sink_weights;  // the weight that the sink takes from each row
};

/// dlse − dout·out of every row: what the gradient of each weight is moved by on its way through the softmax. dout·out
/// is the mean of the weights' gradients under the weights (that of a sink is 0).
Matrix row_shifts(const Matrix& above, const Matrix& out, const Array4& dlse, std::int64_t batch, std::int64_t head) {
  Matrix shifts(out.rows, 1);
  for (std::int64_t i = 0; i < out.rows; ++i) {
    shifts(i, 0) = dlse ? dlse(batch, head, i, 0) : 0;
    for (std::int64_t d = 0; d < out.columns; ++d) shifts(i, 0) -= above(i, d) * out(i, d);
  }
  return shifts;
}

/// The softmax's Jacobian applied to the weights' gradients.
Matrix score_grads(const Head& h, const Matrix& weight_grads, const Matrix& shifts, const Rounding& rounding) {
  Matrix ds(h.seqlen_q(), h.seqlen_k());
  for (std::int64_t i = 0; i < ds.rows; ++i)
    for (std::int64_t j = 0; j < ds.columns; ++j)
      if (h.weights(i, j) != 0) ds(i, j) = rounding(h.weights(i, j) * (weight_grads(i, j) + shifts(i, 0)));
  return ds;
}

void add_bias_grads(Array4& dbias, const Matrix& ds, std::int64_t batch, std::int64_t head) {
  for (std::int64_t i = 0; i < ds.rows; ++i)
    for (std::int64_t j = 0; j < ds.columns; ++j) dbias.values()[dbias.broadcast_offset(batch, head, i, j)] += ds(i, j);
}

double largest_of(const Array4& x) {
  return x.values().empty() ? 0 : *std::max_element(x.values().begin(), x.values().end());
}

Array4 zeros_like(const Array4& x) { return Array4(x.size(0), x.size(1), x.size(2), x.size(3)); }

}  // namespace

bool oracle_visible(const OracleCall& call, std::int64_t batch, std::int64_t head, std::int64_t i, std::int64_t j) {
  const auto b = static_cast<std::size_t>(batch);
  const std::int64_t diagonal = call.corner == Corner::top_left ? i : i + call.seqlen_k[b] - call.seqlen_q[b];
  if (call.causal && j > diagonal) return false;
  if (call.window_left >= 0 && j < diagonal - call.window_left) return false;
  if (call.window_right >= 0 && j > diagonal + call.window_right) return false;
  return !call.keep || call.keep.broadcast(batch, head, i, j) != 0;
}

double exact(double x) { return x; }

OracleResult oracle_forward(const OracleCall& call, const Rounding& rounding) {
  OracleResult result{Array4(call.q.size(0), call.q.size(1), call.q.size(2), call.v.size(3)),
                      Array4(call.q.size(0), call.q.size(1), call.q.size(2), 1)};
  for (std::int64_t b = 0; b < call.q.size(0); ++b)
    for (std::int64_t h = 0; h < call.q.size(1); ++h) {
      const Head head(call, b, h, rounding);
      add_to(result.out, product(head.kept_weights(), head.v, rounding), b, h);
      add_to(result.lse, head.lse, b, h);
    }
  return result;
}

OracleGrads oracle_backward(const OracleCall& call, const Array4& dout, const Array4& dlse, const Rounding& rounding) {
  OracleGrads grads{zeros_like(call.q), zeros_like(call.k), zeros_like(call.v), {}, {}};
  if (call.bias) grads.dbias = zeros_like(call.bias);
  if (call.sinks) grads.dsinks = zeros_like(call.sinks);
  for (std::int64_t b = 0; b < call.q.size(0); ++b)
    for (std::int64_t h = 0; h < call.q.size(1); ++h) {
      const Head head(call, b, h, rounding);
      const Matrix above = head_of(dout, b, h, head.seqlen_q());
      const Matrix out = product(head.kept_weights(), head.v, rounding);
      add_to(grads.dv, product(transposed(head.kept_weights()), above, rounding), b, head.kv_head());

      Matrix weight_grads = product(above, transposed(head.v), rounding);
      for (std::size_t n = 0; n < weight_grads.values.size(); ++n) weight_grads.values[n] *= head.dropout.values[n];
      const Matrix shifts = row_shifts(above, out, dlse, b, h);
      Matrix ds = score_grads(head, weight_grads, shifts, rounding);
      for (std::int64_t i = 0; grads.dsinks && i < shifts.rows; ++i)
        if (head.sink_weights(i, 0) != 0)
          grads.dsinks.values()[grads.dsinks.broadcast_offset(0, h, 0, 0)] += head.sink_weights(i, 0) * shifts(i, 0);
      if (grads.dbias) add_bias_grads(grads.dbias, ds, b, h);

      for (std::size_t n = 0; n < ds.values.size(); ++n) ds.values[n] *= head.slopes.values[n] * call.scale;
      add_to(grads.dq, product(ds, head.k, rounding), b, h);
      add_to(grads.dk, product(transposed(ds), head.q, rounding), b, head.kv_head());
    }
  return grads;
}

GradSizes oracle_grad_sizes(const OracleCall& call, const Array4& dout, const Array4& dlse) {
  OracleGrads sums{zeros_like(call.q), zeros_like(call.k), zeros_like(call.v), {}, {}};
  if (call.bias) sums.dbias = zeros_like(call.bias);
  Array4 noise(1, call.q.size(1), 1, 1);
  const Rounding rounding = exact;
  for (std::int64_t b = 0; b < call.q.size(0); ++b)
    for (std::int64_t h = 0; h < call.q.size(1); ++h) {
      const Head head(call, b, h, rounding);
      const Matrix above = head_of(dout, b, h, head.seqlen_q());
      const Matrix out = product(head.kept_weights(), head.v, exact);
      add_to(sums.dv, product(transposed(head.kept_weights()), absolute(above), exact), b, head.kv_head());

      Matrix weight_grads = product(above, transposed(head.v), exact);
      for (std::size_t n = 0; n < weight_grads.values.size(); ++n) weight_grads.values[n] *= head.dropout.values[n];
      const Matrix shifts = row_shifts(above, out, dlse, b, h);
      Matrix ds = score_grads(head, absolute(weight_grads), absolute(shifts), exact);
      if (sums.dbias) add_bias_grads(sums.dbias, ds, b, h);
      for (std::size_t n = 0; n < ds.values.size(); ++n) ds.values[n] *= head.slopes.values[n] * std::fabs(call.scale);
      add_to(sums.dq, product(ds, absolute(head.k), exact), b, h);
      add_to(sums.dk, product(transposed(ds), absolute(head.q), exact), b, head.kv_head());
      for (std::int64_t i = 0; i < out.rows; ++i)
        for (std::int64_t d = 0; d < out.columns; ++d)
          if (head.sink_weights(i, 0) != 0)
            noise(0, h, 0, 0) += std::pow(head.sink_weights(i, 0) * above(i, d) * out(i, d), 2);
    }
  return {largest_of(sums.dq), largest_of(sums.dk), largest_of(sums.dv), largest_of(sums.dbias),
          std::sqrt(largest_of(noise))};
}

Array4 oracle_rotary(const Array4& x, const std::vector<std::int64_t>& first, const Array4& cos, const Array4& sin,
                     bool interleaved) {
  Array4 y = x;
  const std::int64_t pairs = cos.size(3);
  for (std::int64_t b = 0; b < x.size(0); ++b)
    for (std::int64_t h = 0; h < x.size(1); ++h)
      for (std::int64_t i = 0; i < x.size(2); ++i) {
        const std::int64_t position = first[static_cast<std::size_t>(b)] + i;
        if (position < 0 || position >= cos.size(2)) continue;
        for (std::int64_t n = 0; n < pairs; ++n) {
          const std::int64_t one = interleaved ? 2 * n : n;
          const std::int64_t two = interleaved ? 2 * n + 1 : n + pairs;
          const double c = cos(0, 0, position, n);
          const double s = sin(0, 0, position, n);
          y(b, h, i, one) = x(b, h, i, one) * c - x(b, h, i, two) * s;
          y(b, h, i, two) = x(b, h, i, one) * s + x(b, h, i, two) * c;
        }
      }
  return y;
}

Array4 oracle_append(const Array4& cache, const std::vector<std::int64_t>& first, const Array4& extra) {
  Array4 y = cache;
  for (std::int64_t b = 0; b < extra.size(0); ++b)
    for (std::int64_t h = 0; h < extra.size(1); ++h)
      for (std::int64_t i = 0; i < extra.size(2); ++i)
        for (std::int64_t d = 0; d < extra.size(3); ++d)
          y(b, h, first[static_cast<std::size_t>(b)] + i, d) = extra(b, h, i, d);
  return y;
}

OracleResult oracle_merge(const OracleResult& a, const OracleResult& b) {
  OracleResult merged{zeros_like(a.out), zeros_like(a.lse)};
  for (std::int64_t n = 0; n < static_cast<std::int64_t>(a.lse.values().size()); ++n) {
    const double lse_a = a.lse.values()[static_cast<std::size_t>(n)];
    const double lse_b = b.lse.values()[static_cast<std::size_t>(n)];
    const double largest = std::max(lse_a, lse_b);
    double& lse = merged.lse.values()[static_cast<std::size_t>(n)];
    lse = largest == -kInfinity ? largest : largest + std::log(std::exp(lse_a - largest) + std::exp(lse_b - largest));
    if (lse == -kInfinity) continue;
    for (std::int64_t d = 0; d < a.out.size(3); ++d) {
      const auto at = static_cast<std::size_t>(n * a.out.size(3) + d);
      merged.out.values()[at] = std::exp(lse_a - lse) * a.out.values()[at] + std::exp(lse_b - lse) * b.out.values()[at];
    }
  }
  return merged;
}

std::uint32_t oracle_random_word(std::uint64_t seed, std::int64_t batch, std::int64_t head, std::int64_t query,
                                 std::int64_t key) {
  // Philox-4x32-10 (Salmon et al. 2011, section 4.3): the counter's words 0 and 2 are multiplied, and the high and low
  // halves cross over to the words beside them, mixed with a key that a Weyl sequence moves on each round.
  std::uint32_t counter[4] = {static_cast<std::uint32_t>(key / 4), static_cast<std::uint32_t>(query),
                              static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(batch)};
  std::uint32_t round_key[2] = {static_cast<std::uint32_t>(seed % (std::uint64_t(1) << 32)),
                                static_cast<std::uint32_t>(seed / (std::uint64_t(1) << 32))};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = std::uint64_t(3528531795u) * counter[0];
    const std::uint64_t right = std::uint64_t(3449720151u) * counter[2];
    const std::uint32_t next[4] = {
        static_cast<std::uint32_t>(right / (std::uint64_t(1) << 32)) ^ counter[1] ^ round_key[0],
        static_cast<std::uint32_t>(right % (std::uint64_t(1) << 32)),
        static_cast<std::uint32_t>(left / (std::uint64_t(1) << 32)) ^ counter[3] ^ round_key[1],
        static_cast<std::uint32_t>(left % (std::uint64_t(1) << 32))};
    std::copy(next, next + 4, counter);
    round_key[0] += 2654435769u;
    round_key[1] += 3144134277u;
  }
  return counter[key % 4];
}

}  // namespace flashcore::testing
