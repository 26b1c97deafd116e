// The CPU's small primitives: merging attention states, element-wise addition.
#include "flashcore/primitives.h"

#include <cmath>

#include "../semantics.h"
#include "executor.h"
#include "flashcore/threads.h"
#include "kernels.h"
#include "lines.h"
#include "rows.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

/// One line of a sum. Where all three are dense the compiler sees steps of 1, and adds several elements at once.
template <class T>
void add_line(const T* a, std::int64_t step_a, const T* b, std::int64_t step_b, T* out, std::int64_t step_out,
              std::int64_t length) {
  if (step_a == 1 && step_b == 1 && step_out == 1) {
    for (std::int64_t i = 0; i < length; ++i) store(out[i], load(a[i]) + load(b[i]));
  } else {
    for (std::int64_t i = 0; i < length; ++i) store(out[i * step_out], load(a[i * step_a]) + load(b[i * step_b]));
  }
}

template <class T>
void merge_row(const MergeParams& p, std::int64_t batch, std::int64_t head, std::int64_t i) {
  using Acc = typename Accumulator<T>::type;
  const auto lse_at = [&](const RowParams& t) -> Acc& {
    return static_cast<Acc*>(t.data)[batch * t.batch + head * t.head + i * t.seq];
  };
  const auto row_at = [&](const TensorParams& t) {
    return static_cast<T*>(t.data) + batch * t.batch + head * t.head + i * t.seq;
  };
  const Acc lse_a = lse_at(p.lse_a);
  const Acc lse_b = lse_at(p.lse_b);
  const Acc max = std::max(lse_a, lse_b);
  const bool empty = lse_a == kMinusInfinity<Acc> && lse_b == kMinusInfinity<Acc>;
  const Acc weight_a = empty ? Acc(0) : std::exp(lse_a - max);
  const Acc weight_b = empty ? Acc(0) : std::exp(lse_b - max);
  const Acc sum = empty ? Acc(1) : weight_a + weight_b;
  const Acc share_a = weight_a / sum;
  const Acc share_b = weight_b / sum;
  const T* a = row_at(p.out_a);
  const T* b = row_at(p.out_b);
  T* out = row_at(p.out);
  for (int d = 0; d < p.size.head_dim_v; ++d) {
    const Acc from_a = share_a == 0 ? Acc(0) : share_a * load(a[d]);
    const Acc from_b = share_b == 0 ? Acc(0) : share_b * load(b[d]);
    store(out[d], from_a + from_b);
  }
  lse_at(p.lse) = empty ? kMinusInfinity<Acc> : max + std::log(sum);
}

}  // namespace

void merge_states(const MergeParams& p, int, Stream) {
  const std::int64_t heads = p.size.batch * p.size.heads_q;
  const int threads = heads * p.size.seqlen_q * p.size.head_dim_v < kGrain ? 1 : num_threads();
  with_wide_storage(p.dtype, [&](auto storage) {
    parallel_for(heads, threads, [&](std::int64_t head) {
      for (std::int64_t i = 0; i < p.size.seqlen_q; ++i)
        merge_row<decltype(storage)>(p, head / p.size.heads_q, head % p.size.heads_q, i);
    });
  });
}

void vector_add(const ArrayParams& a, const ArrayParams& b, const ArrayParams& out, int, Stream) {
  const Pieces pieces(out, kGrain);
  with_wide_storage(out.dtype, [&](auto storage) {
    using T = decltype(storage);
    parallel_for(pieces.count(), pieces.count() > 1 ? num_threads() : 1, [&](std::int64_t piece) {
      pieces.walk(piece, [&](const Lines& lines, std::int64_t begin, std::int64_t end) {
        const T* x = static_cast<const T*>(a.data) + lines.start(a) + begin * lines.step(a);
        const T* y = static_cast<const T*>(b.data) + lines.start(b) + begin * lines.step(b);
        T* z = static_cast<T*>(out.data) + lines.start(out) + begin * lines.step(out);
        add_line(x, lines.step(a), y, lines.step(b), z, lines.step(out), end - begin);
      });
    });
  });
}

}  // namespace flashcore::cpu
