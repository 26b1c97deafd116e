// Attention on the CPU by the installed library, checked against a number worked out by hand.
#include <flashcore/dlpack.h>
#include <flashcore/flashcore.h>

#include <cmath>
#include <cstdio>

int main() {
  using namespace flashcore;
  // One query, two keys, head_dim 1: the weights are those of the logistic function of the difference of the scores.
  float q = 1, k[] = {0.7f, 0.0f}, v[] = {1, 0}, out = 0, lse = 0;
  const auto view = [](float* data, std::int64_t rows) {
    return TensorView::contiguous(data, DType::float32, Device{}, {1, 1, rows, 1});
  };
  attention_forward({.q = view(&q, 1), .k = view(k, 2), .v = view(v, 2)},
                    {.out = view(&out, 1), .lse = TensorView::contiguous(&lse, DType::float32, Device{}, {1, 1, 1})},
                    {.mask = Mask::bottom_right()});

  const double expected_out = 1 / (1 + std::exp(-0.7));
  const double expected_lse = std::log(std::exp(0.7) + 1);
  std::printf("flashcore %s: out %.7f (expected %.7f), lse %.7f (expected %.7f), %d CUDA devices\n", version(), out,
              expected_out, lse, expected_lse, device_count());
  if (!(std::fabs(out - expected_out) < 1e-6 && std::fabs(lse - expected_lse) < 1e-6)) return 1;

  try {
    attention_forward({.q = view(&q, 1), .k = view(k, 2), .v = view(v, 1)}, {.out = view(&out, 1)});
  } catch (const InvalidArgument& refused) {
    std::printf("refused as it should be: %s\n", refused.what());
    return 0;
  }
  std::printf("v is shorter than k, but the call was not refused\n");
  return 1;
}
