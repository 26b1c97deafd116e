// Cache append: new keys (rotated where rotary is on) and values, written behind the keys that a cache holds.
#include "../semantics.h"
#include "kernels.h"
#include "rows.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

template <class T>
void append_row(const Params& p, const Sequence& s, std::int64_t head, std::int64_t i) {
  const std::int64_t j = p.sequence.seqused_k[s.batch] + i;
  if (j < 0 || j >= p.size.seqlen_k) return;
  const std::int64_t k_target = k_offset(p, p.k, s, head, j);
  if (!is_present(p, k_target)) return;
  const auto source = [&](const TensorParams& t) {
    return static_cast<const T*>(t.data) + s.batch * t.batch + head * t.head + i * t.seq;
  };
  const T* k_new = source(p.append.k_new);
  T* k = static_cast<T*>(p.k.data) + k_target;
  if (p.rotary.dim > 0) {
    for (int d = 0; d < p.size.head_dim; ++d) store(k[d], rotated(k_new, d, j, p.rotary));
  } else {
    std::copy_n(k_new, p.size.head_dim, k);
  }
  T* v = static_cast<T*>(p.v.data) + k_offset(p, p.v, s, head, j);
  std::copy_n(source(p.append.v_new), p.size.head_dim_v, v);
}

}  // namespace

void append_keys(const Params& p) {
  with_storage(p.dtype, [&](auto storage) {
    for (std::int64_t batch = 0; batch < p.size.batch; ++batch) {
      const Sequence s = sequence_of(p, batch);
      for (std::int64_t head = 0; head < p.size.heads_k; ++head)
        for (std::int64_t i = 0; i < p.sequence.seqlen_new; ++i) append_row<decltype(storage)>(p, s, head, i);
    }
  });
}

}  // namespace flashcore::cpu
