// The tiles of the Hopper kernels: plain values from constexpr functions, each line with its measured reason.
#pragma once

namespace flashcore::sm90 {

/// What a kernel is compiled to look at.
enum class FwdKind {
  full,        // every query sees every key
  positional,  // causal rule, window, lengths of sequences
  general,     // these, and softcap, ALiBi, bias, boolean mask
};

/// Small tiles are for problems that have too few large ones to keep all multiprocessors busy to the end.
enum class FwdSize { large, small };

/// Shape of one block's work in the forward kernel. Consumer warpgroups own 64 query rows each.
struct FwdTile {
  int block_m;         // query rows: 64 · consumers
  int block_n;         // keys per step
  int stages;          // K and V buffers each
  int q_buffers;       // 2: the next tile's queries load while this one computes
  bool separate_out;   // the output has a staging buffer of its own; otherwise threads store it from registers
  bool rescale_early;  // scale the output while the next scores are computed, not after the value product
  int producer_registers;
  int consumer_registers;
  int growth = 8;        // weights stay below 2^growth of the lazy maximum: room enough in float16; 0: exact maximum
  int section_mib = 32;  // of keys and values that causal tiles walk together, see section_heads
  int octaves_from = 0;  // query blocks from which causal tiles come by octaves of their length; 0: never

  constexpr int consumers() const { return block_m / 64; }
  constexpr int threads() const { return 128 * (consumers() + 1); }
};

#ifdef FLASHCORE_FWD_TILE  // the tuner compiles one instance at a time, with a tile of its own
constexpr FwdTile fwd_tile(int, FwdKind, FwdSize) { return {FLASHCORE_FWD_TILE}; }
#else
/// `head_dim`: the bucket, 64, 96, 128, 192 or 256.
constexpr FwdTile fwd_tile(int head_dim, FwdKind kind, FwdSize size) {
  if (size == FwdSize::small) return {128, 128, 2, 2, true, true, 40, 232};
  const bool full = kind == FwdKind::full;
  const bool positional = kind == FwdKind::positional;
  const bool general = kind == FwdKind::general;
  // The general kernel needs more registers than three consumers leave (it spilled 220 bytes at 192×128).
  if (head_dim <= 64 && general) return {128, 128, 2, 2, true, false, 40, 232};
  // D64: three consumers; 192×128 raced against 128×192 and 192×112, 1.16–1.21 of cuDNN against 0.98–1.04 and 1.12. The
  // search found early rescaling (full S2048 +1 %), and that a third stage is worth 1 % at causal S512 alone.
  if (head_dim <= 64 && positional) return {192, 128, 3, 2, true, true, 32, 160};
  if (head_dim <= 64) return {192, 128, 2, 2, true, true, 32, 160};
  // D128: own output staging and two query buffers gave 3–4 % over reusing them. The search found three consumers and
  // fewer keys: over 128×128 full S2048 +4 %, causal S512, S2048, S8192, S16384 +4 to +5 %.
  // D96: the same, full S2048 +8 %, causal +13 %, of which octaves of the length are 7.
  if (head_dim == 96 && full) return {192, 96, 2, 2, false, true, 32, 160};
  if (head_dim == 96 && positional) return {192, 80, 2, 2, true, true, 40, 152, 8, 32, 8};
  if (head_dim == 128 && full) return {192, 80, 2, 2, true, false, 48, 152};
  if (head_dim == 128 && positional) return {192, 64, 2, 2, true, false, 40, 152, 8, 16, 8};
  if (head_dim <= 128) return {128, 128, 2, 2, true, true, 40, 232};
  // D192: causal S2048 by octaves +16 %, with 64 keys and an output buffer +21 %; full S2048 with 80 keys and such a
  // buffer +3 % over 112.
  if (head_dim == 192 && positional) return {128, 64, 2, 1, true, true, 40, 232, 8, 32, 16};
  if (head_dim == 192 && full) return {128, 80, 2, 1, true, false, 40, 232};
  if (head_dim <= 192) return {128, 96, 2, 1, false, true, 40, 232};
  // D256: causal by octaves in sections of 32 MiB, S2048 0.97 to 1.00 of FlashAttention-3, S8192 0.97 to 0.985. Short
  // sequences lose by it (S512 1.01 to 0.88: keys are read from memory once for each octave), and so does D128 (S2048).
  // The search found 64 keys instead of 80: full S2048 +2 %, causal S512 +4 %, S2048 +2 %, S8192 +1 %.
  return {128, 64, 2, 1, false, true, 40, 232, 8, 32, 16};
}
#endif

/// Which kernels come in both sizes.
constexpr bool has_small_tile(int head_dim, FwdKind kind) { return head_dim <= 128 && kind != FwdKind::general; }

/// What a row costs in a small tile, in those of a large one (full, many tiles; the same within 2 % for few).
constexpr double small_tile_cost(int head_dim) { return head_dim <= 64 ? 1.26 : head_dim <= 96 ? 1.16 : 1.085; }

/// The kernel for small problems: a block for so many queries of a head; its keys in one or two parts, each for a
/// warpgroup, in one or two steps.
inline constexpr int kSmallQueries = 64;
inline constexpr int kSmallParts = 2;
inline constexpr int kSmallSteps = 2;
inline constexpr float kSmallGrowth = 8;  // as FwdTile::growth

struct SmallShape {
  int keys;   // of a step: 32, 64 or 128; 0: no kernel is compiled for that
  int steps;  // of a part
};

/// Keys of the longest step: what registers hold twice, beside the output.
constexpr int small_step(int head_dim) { return head_dim > 64 ? 64 : 128; }

constexpr int small_most_keys(int head_dim) { return kSmallParts * kSmallSteps * small_step(head_dim); }

/// So many keys in so many parts. A second step is for what one does not hold.
constexpr SmallShape small_shape(int head_dim, long long seqlen_k, int parts) {
  const int most = small_step(head_dim);
  for (int keys = 32; keys <= most; keys *= 2)
    if (keys * parts >= seqlen_k) return {keys * (parts - 1) < seqlen_k ? keys : 0, 1};
  return {seqlen_k <= kSmallSteps * parts * most ? most : 0, kSmallSteps};
}

/// One part where a short step will do: merging two costs more.
constexpr int small_parts(long long seqlen_k) { return seqlen_k <= 64 ? 1 : 2; }

}  // namespace flashcore::sm90
