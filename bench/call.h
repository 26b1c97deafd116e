// Call: a problem line made into tensors and a plan, ready to be run. For benchmarks: plain tensors, dense, in bhsd.
#pragma once

#include <flashcore/flashcore.h>

#include <cstdint>
#include <string>
#include <vector>

namespace bench {

/// The sizes and words of a line, as far as tensors are made for them.
struct Line {
  /// Throws InvalidArgument for a line that cannot be read, or that asks for tensors that are not made here.
  explicit Line(const std::string& text);

  std::string canonical, phase;
  flashcore::DType dtype = flashcore::DType::float16;
  std::int64_t batch = 0, seqlen_q = 0, seqlen_k = 0, heads_q = 0, heads_k = 0, dim = 0, dim_v = 0, page = 0;
  flashcore::AttentionOptions options;
  bool lse = false;
};

/// The tensors of a line on a device. Numbers are of random sign and fraction in ±[0.5, 1).
class Call {
 public:
  Call(const Line& line, flashcore::Device device);

  flashcore::AttentionPlan plan() const;
  void run(const flashcore::AttentionPlan& plan, void* workspace, flashcore::Stream stream) const;

 private:
  flashcore::TensorView empty(flashcore::DType dtype, std::initializer_list<std::int64_t> shape);
  flashcore::TensorView random(std::initializer_list<std::int64_t> shape);
  flashcore::TensorView integers(const std::vector<std::int32_t>& values, std::initializer_list<std::int64_t> shape);
  void make_decode();
  void make_gradients();

  Line line_;
  flashcore::Device device_;
  std::vector<flashcore::Buffer> buffers_;
  std::uint64_t random_state_ = 1;
  flashcore::AttentionInputs inputs_;
  flashcore::DecodeInputs decode_;
  flashcore::AttentionOutputs outputs_;
  flashcore::AttentionCotangents cotangents_;
  flashcore::AttentionGrads grads_;
};

}  // namespace bench
