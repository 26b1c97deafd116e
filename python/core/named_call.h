// NamedCall: a call whose tensors come by name, all with the same number of mapped dimensions in front.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flashcore/attention.h"

namespace flashcore::python {

enum class Phase { forward, backward, decode };

/// How a tensor takes part in the batch.
enum class BatchRole {
  first,     ///< its first dimension is the batch
  plane,     ///< the first of four dimensions, of which leading ones may be missing or 1
  head,      ///< the first of two dimensions, or missing
  separate,  ///< it has no batch dimension
};

/// Gives scratch memory that lives as long as the pointer; null for 0 bytes.
using TakeScratch = std::function<std::shared_ptr<void>(std::size_t bytes)>;

/// One call of the library, or several: a function that was mapped over (JAX's vmap) has tensors with dimensions in
/// front, of the mapped size or of size 1 where all share one value. Where these can be told to the library as more
/// batch, it is one call; else one call for each place.
class NamedCall {
 public:
  NamedCall(Phase phase, const AttentionOptions& options, int mapped);
  NamedCall(const NamedCall&) = delete;
  NamedCall& operator=(const NamedCall&) = delete;

  void set_bounds(std::int64_t max_seqlen_q, std::int64_t max_seqlen_k);
  void set_rotary_interleaved(bool interleaved) { decode_.rotary.interleaved = interleaved; }

  /// A dense array by the name it has in flashcore.attention and its like ("q", "k_cache", "dbias", …); of a name given
  /// twice the later one counts. Throws InvalidArgument for a name or a rank that the call has not.
  void add(std::string_view name, void* data, DType dtype, Device device, std::span<const std::int64_t> dims);

  /// Checked and dispatched, for the tensors without their mapped dimensions.
  AttentionPlan plan() const;

  void run(const TakeScratch& take_scratch, Stream stream);

 private:
  struct Slot {
    std::string_view name;
    TensorView* view;
    BatchRole role;
  };
  struct Tensor {
    const Slot* slot;
    TensorView whole;                   // without the mapped dimensions
    std::vector<std::int64_t> mapped;   // their sizes
    std::vector<std::int64_t> strides;  // and strides, 0 where the size is 1
  };

  std::vector<std::int64_t> mapped_sizes() const;
  bool fold(const std::vector<std::int64_t>& sizes);
  void run_once(const TakeScratch& take_scratch, Stream stream) const;

  Phase phase_;
  AttentionOptions options_;
  int mapped_;
  AttentionInputs in_;
  AttentionOutputs out_;
  AttentionCotangents above_;
  AttentionGrads grads_;
  DecodeInputs decode_;
  std::vector<Slot> slots_;
  std::vector<Tensor> tensors_;
};

}  // namespace flashcore::python
