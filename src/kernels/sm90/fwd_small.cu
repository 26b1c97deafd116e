// Hopper forward for small problems: choice of the instance, and its launch.
#include "fwd_small.cuh"

#include <algorithm>

#include "../../cuda/check.h"
#include "../../cuda/launch.cuh"
#include "../common/tensor_map.h"
#include "../kernel.h"
#include "positions.cuh"
#include "sm90.h"

namespace flashcore::sm90 {
namespace {

template <class Traits>
void launch(const detail::Params& p, int parts, int device, Stream stream) {
  const detail::SizeParams& size = p.size;
  const auto blocks_of = [](std::int64_t count, int each) { return static_cast<unsigned>((count + each - 1) / each); };
  SmallArgs args{};
  args.window = key_window(p);
  args.positional = tiles_differ(p.position);
  args.scale_log2 = static_cast<float>(p.score.scale) * tile::kLog2e;
  args.seqlen_q = static_cast<int>(size.seqlen_q);
  args.threshold = kSmallGrowth / args.scale_log2;
  args.group = size.heads_q / size.heads_k;
  args.head_dim_v = size.head_dim_v;
  args.out = p.out;
  args.lse = p.lse;
  args.sinks = p.sinks;
  args.params = p;
  const detail::TensorMap q =
      make_tensor_map(p.q, p.dtype, {size.head_dim, size.seqlen_q, size.heads_q, size.batch}, kSmallQueries);
  const detail::TensorMap k =
      make_tensor_map(p.k, p.dtype, {size.head_dim, size.seqlen_k, size.heads_k, size.batch}, Traits::kKeys);
  const detail::TensorMap v =
      make_tensor_map(p.v, p.dtype, {size.head_dim_v, size.seqlen_k, size.heads_k, size.batch}, Traits::kKeys);
  args.q_batch_step = q.batch_step;
  args.q_head_step = q.head_step;
  args.k_batch_step = k.batch_step;
  args.k_head_step = k.head_step;
  args.v_batch_step = v.batch_step;
  args.v_head_step = v.head_step;
  const auto kernel = fwd_small<Traits>;
  static cuda::SharedMemory shared(kernel, small_shared_bytes<Traits>(kSmallParts));
  shared.reserve_on(device);
  const cuda::Grid grid{dim3(blocks_of(size.seqlen_q, kSmallQueries), static_cast<unsigned>(size.heads_q),
                             static_cast<unsigned>(size.batch)),
                        128 * parts, static_cast<std::size_t>(small_shared_bytes<Traits>(parts))};
  cuda::launch_early("launching sm90.fwd_small", kernel, grid, stream, args, q.map, k.map, v.map);
}

template <class Element>
void launch_bucket(const detail::Params& p, int parts, int device, Stream stream) {
  const int head_dim = std::max(p.size.head_dim, p.size.head_dim_v);
  const auto [keys, steps] = small_shape(head_dim, p.size.seqlen_k, parts);
  if (head_dim <= 64) {
    if (keys == 32) return launch<SmallTraits<Element, 64, 32, 1>>(p, parts, device, stream);
    if (keys == 64) return launch<SmallTraits<Element, 64, 64, 1>>(p, parts, device, stream);
    if (steps == 1) return launch<SmallTraits<Element, 64, 128, 1>>(p, parts, device, stream);
    return launch<SmallTraits<Element, 64, 128, 2>>(p, parts, device, stream);
  }
  if (keys == 32) return launch<SmallTraits<Element, 128, 32, 1>>(p, parts, device, stream);
  if (steps == 1) return launch<SmallTraits<Element, 128, 64, 1>>(p, parts, device, stream);
  launch<SmallTraits<Element, 128, 64, 2>>(p, parts, device, stream);
}

}  // namespace

void launch_fwd_small(const detail::Plan& plan, const detail::Params& p, void*, Stream stream) {
  if (p.size.batch == 0 || p.size.heads_q == 0 || p.size.seqlen_q == 0) return;
  const int device = plan.device.index;
  const cuda::DeviceGuard guard(device);
  if (p.dtype == DType::float16) return launch_bucket<detail::Float16>(p, plan.splits, device, stream);
  launch_bucket<detail::BFloat16>(p, plan.splits, device, stream);
}

}  // namespace flashcore::sm90
