// The tiles of the Hopper kernels: plain values from constexpr functions, each line with its measured reason.
#pragma once

namespace flashcore::sm90 {

/// What a kernel is compiled to look at.
enum class FwdKind {
  full,        // every query sees every key
  positional,  // causal rule and window
  general,     // these, and softcap, ALiBi, bias, boolean mask
};

/// Shape of one block's work in the forward kernel. Consumer warpgroups own 64 query rows each.
struct FwdTile {
  int block_m;         // query rows: 64 · consumers
  int block_n;         // keys per step
  int stages;          // K and V buffers each
  int q_buffers;       // 2: the next tile's queries load while this one computes
  bool separate_out;   // the output has a staging buffer of its own; otherwise it takes its queries' place
  bool rescale_early;  // scale the output while the next scores are computed, not after the value product
  int producer_registers;
  int consumer_registers;

  constexpr int consumers() const { return block_m / 64; }
  constexpr int threads() const { return 128 * (consumers() + 1); }
};

/// `head_dim`: the bucket, 64, 96, 128 or 256. `general`: with softcap, ALiBi, bias or a boolean mask.
constexpr FwdTile fwd_tile(int head_dim, bool general) {
  // The general kernel needs more registers than three consumers leave (it spilled 220 bytes at 192×128).
  if (head_dim <= 64 && general) return {128, 128, 2, 2, true, false, 40, 232};
  // D64: three consumers; 192×128 raced against 128×192 and 192×112, 1.16–1.21 of cuDNN against 0.98–1.04 and 1.12.
  if (head_dim <= 64) return {192, 128, 2, 2, true, false, 32, 160};
  // D128: own output staging and two query buffers gave 3–4 % over reusing them; wider key blocks lost 4–9 %.
  if (head_dim <= 128) return {128, 128, 2, 2, true, true, 40, 232};
  if (general) return {128, 64, 2, 1, false, true, 40, 232};
  // D256: 80 keys are what shared memory holds beside 128 queries.
  return {128, 80, 2, 1, false, true, 40, 232};
}

}  // namespace flashcore::sm90
