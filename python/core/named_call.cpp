// Named tensors become the library's structs; mapped dimensions become more batch, or a loop.
#include "named_call.h"

#include <algorithm>
#include <optional>

#include "flashcore/error.h"

namespace flashcore::python {

namespace {

struct Dimension {
  std::int64_t size;
  std::int64_t stride;
};

/// The stride of all dimensions taken as one, or nothing where no single stride walks them.
std::optional<std::int64_t> joint_stride(const std::vector<Dimension>& dimensions) {
  std::optional<Dimension> inner;
  for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
    if (d->size == 1) continue;
    if (inner && d->stride != inner->stride * inner->size) return std::nullopt;
    inner = {inner ? inner->size * d->size : d->size, inner ? inner->stride : d->stride};
  }
  return inner ? inner->stride : 0;
}

/// The same tensor with dimensions of size 1 in front, up to `rank`.
TensorView padded(const TensorView& view, int rank) {
  TensorView result = view;
  const int missing = std::max(0, rank - view.rank);
  result.rank = view.rank + missing;
  for (int i = 0; i < result.rank; ++i) {
    result.shape[i] = i < missing ? 1 : view.shape[i - missing];
    result.stride[i] = i < missing ? 0 : view.stride[i - missing];
  }
  return result;
}

int rank_with_batch(BatchRole role) { return role == BatchRole::plane ? 4 : role == BatchRole::head ? 2 : 1; }

/// The tensor with its batch and the mapped dimensions joined into `batch` entries, if strides can say it.
std::optional<TensorView> with_more_batch(const TensorView& own, BatchRole role, std::vector<Dimension> mapped,
                                          std::int64_t own_batch, std::int64_t batch) {
  if (role == BatchRole::separate) return joint_stride(mapped) == 0 ? std::optional(own) : std::nullopt;
  TensorView view = padded(own, rank_with_batch(role));
  if (view.shape[0] != own_batch && view.shape[0] != 1) return std::nullopt;
  mapped.push_back({own_batch, view.shape[0] == 1 ? 0 : view.stride[0]});
  const std::optional<std::int64_t> stride = joint_stride(mapped);
  if (!stride) return std::nullopt;
  view.shape[0] = batch;
  view.stride[0] = *stride;
  return view;
}

}  // namespace

NamedCall::NamedCall(Phase phase, const AttentionOptions& options, int mapped)
    : phase_(phase), options_(options), mapped_(mapped) {
  using enum BatchRole;
  slots_ = {{"out", &out_.out, first}, {"lse", &out_.lse, first}};
  const auto add_slots = [this](std::initializer_list<Slot> more) { slots_.insert(slots_.end(), more); };
  const auto add_common = [&](auto& in) {
    add_slots({{"q", &in.q, first},
               {"mask", &in.mask, plane},
               {"bias", &in.bias, plane},
               {"alibi_slopes", &in.alibi_slopes, head},
               {"sinks", &in.sinks, separate},
               {"q_descale", &in.q_descale, head},
               {"k_descale", &in.k_descale, head},
               {"v_descale", &in.v_descale, head}});
  };
  if (phase == Phase::decode) {
    add_common(decode_);
    add_slots({{"k_cache", &decode_.k_cache, first},
               {"v_cache", &decode_.v_cache, first},
               {"cache_seqlens", &decode_.cache_seqlens, first},
               {"block_table", &decode_.block_table, first},
               {"k_new", &decode_.k_new, first},
               {"v_new", &decode_.v_new, first},
               {"rotary_cos", &decode_.rotary.cos, separate},
               {"rotary_sin", &decode_.rotary.sin, separate}});
    return;
  }
  add_common(in_);
  add_slots({{"k", &in_.k, first},
             {"v", &in_.v, first},
             {"cu_seqlens_q", &in_.sequences.cu_seqlens_q, separate},
             {"cu_seqlens_k", &in_.sequences.cu_seqlens_k, separate},
             {"seqused_k", &in_.sequences.seqused_k, first}});
  if (phase == Phase::backward)
    add_slots({{"dout", &above_.dout, first},
               {"dlse", &above_.dlse, first},
               {"dq", &grads_.dq, first},
               {"dk", &grads_.dk, first},
               {"dv", &grads_.dv, first},
               {"dbias", &grads_.dbias, plane},
               {"dsinks", &grads_.dsinks, separate}});
}

void NamedCall::set_bounds(std::int64_t max_seqlen_q, std::int64_t max_seqlen_k) {
  in_.sequences.max_seqlen_q = max_seqlen_q;
  in_.sequences.max_seqlen_k = max_seqlen_k;
}

void NamedCall::add(std::string_view name, void* data, DType dtype, Device device, std::span<const std::int64_t> dims) {
  const auto slot = std::find_if(slots_.begin(), slots_.end(), [name](const Slot& s) { return s.name == name; });
  if (slot == slots_.end()) throw InvalidArgument("this call has no tensor named " + std::string(name));
  const int rank = static_cast<int>(dims.size()) - mapped_;
  if (rank < 0 || rank > kMaxRank)
    throw InvalidArgument(std::string(name) + " has rank " + std::to_string(dims.size()) + " with " +
                          std::to_string(mapped_) + " mapped dimensions; at most 8 others are allowed");
  Tensor tensor{&*slot, {data, dtype, device, rank, {}, {}}, {dims.begin(), dims.begin() + mapped_}, {}};
  tensor.strides.resize(mapped_);
  std::int64_t stride = 1;
  for (int i = static_cast<int>(dims.size()) - 1; i >= 0; --i) {
    if (i >= mapped_) {
      tensor.whole.shape[i - mapped_] = dims[i];
      tensor.whole.stride[i - mapped_] = stride;
    } else {
      tensor.strides[i] = dims[i] == 1 ? 0 : stride;
    }
    stride *= dims[i];
  }
  *slot->view = tensor.whole;
  std::erase_if(tensors_, [&](const Tensor& t) { return t.slot == tensor.slot; });
  tensors_.push_back(std::move(tensor));
}

AttentionPlan NamedCall::plan() const {
  switch (phase_) {
    case Phase::backward:
      return AttentionPlan::backward(in_, out_, above_, grads_, options_);
    case Phase::decode:
      return AttentionPlan::decode(decode_, out_, options_);
    case Phase::forward:
      break;
  }
  return AttentionPlan::forward(in_, out_, options_);
}

void NamedCall::run_once(const TakeScratch& take_scratch, Stream stream) const {
  const AttentionPlan plan = this->plan();
  const std::shared_ptr<void> scratch = take_scratch(plan.workspace_bytes());
  switch (phase_) {
    case Phase::forward:
      return plan.run(in_, out_, scratch.get(), stream);
    case Phase::backward:
      return plan.run(in_, out_, above_, grads_, scratch.get(), stream);
    case Phase::decode:
      return plan.run(decode_, out_, scratch.get(), stream);
  }
}

std::vector<std::int64_t> NamedCall::mapped_sizes() const {
  std::vector<std::int64_t> sizes(mapped_, 1);
  for (const Tensor& tensor : tensors_)
    for (int i = 0; i < mapped_; ++i)
      if (tensor.mapped[i] != 1) sizes[i] = tensor.mapped[i];
  return sizes;
}

/// Tells the library of the mapped dimensions as more batch. Not where the place in the batch has a meaning of its own:
/// in dropout's random numbers, in offsets of packed sequences, in numbers of pages.
bool NamedCall::fold(const std::vector<std::int64_t>& sizes) {
  if (options_.dropout_p > 0 || options_.layout == Layout::thd || decode_.block_table) return false;
  const TensorView& q = phase_ == Phase::decode ? decode_.q : in_.q;
  if (q.rank < 1) return false;
  std::int64_t batch = q.shape[0];
  for (const std::int64_t size : sizes) batch *= size;
  std::vector<std::pair<TensorView*, TensorView>> folded;
  for (const Tensor& tensor : tensors_) {
    std::vector<Dimension> mapped;
    for (int i = 0; i < mapped_; ++i) mapped.push_back({sizes[i], tensor.strides[i]});
    const auto view = with_more_batch(tensor.whole, tensor.slot->role, std::move(mapped), q.shape[0], batch);
    if (!view) return false;
    folded.emplace_back(tensor.slot->view, *view);
  }
  for (const auto& [view, with_more_batch] : folded) *view = with_more_batch;
  return true;
}

void NamedCall::run(const TakeScratch& take_scratch, Stream stream) {
  const std::vector<std::int64_t> sizes = mapped_sizes();
  std::int64_t places = 1;
  for (const std::int64_t size : sizes) places *= size;
  if (places == 1 || (places > 1 && fold(sizes))) return run_once(take_scratch, stream);
  for (std::int64_t place = 0; place < places; ++place) {
    for (const Tensor& tensor : tensors_) {
      std::int64_t offset = 0, rest = place;
      for (int i = mapped_ - 1; i >= 0; --i) {
        offset += rest % sizes[i] * tensor.strides[i];
        rest /= sizes[i];
      }
      *tensor.slot->view = tensor.whole;
      if (tensor.whole.data)
        tensor.slot->view->data =
            static_cast<char*>(tensor.whole.data) + offset * static_cast<std::int64_t>(size_of(tensor.whole.dtype));
    }
    run_once(take_scratch, stream);
  }
}

}  // namespace flashcore::python
