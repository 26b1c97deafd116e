// Params: the plain structs that kernels are launched with, each small one owned by one feature. Device and host code
// share them. Shapes are in the order (batch, head, seq, dim) whatever the caller's layout was; the last dimension
// is always contiguous, so its stride is not stored. Strides count elements and are 64 bit.
#pragma once

#include <cstdint>

#include "flashcore/tensor.h"

namespace flashcore::detail {

/// q, k, v, out and their gradients. In varlen `batch` is 0 and rows are found through SequenceParams.
/// A paged cache's `batch` is the stride from page to page and `seq` the stride inside a page.
struct TensorParams {
  void* data = nullptr;
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t seq = 0;
};

/// A number per query row: lse, dlse. float32 (float64 for float64 problems). Varlen: batch is 0.
struct RowParams {
  void* data = nullptr;
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t seq = 0;
};

/// mask, bias, dbias over (batch, head, query, key); a stride of 0 is a broadcast.
struct PlaneParams {
  void* data = nullptr;
  DType dtype = DType::boolean;
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t query = 0;
  std::int64_t key = 0;
};

/// sinks (batch 0), alibi_slopes (batch 0 or not), descales: a number per (batch, head).
struct HeadParams {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::int64_t batch = 0;
  std::int64_t head = 0;
};

struct SizeParams {
  std::int64_t batch = 0;
  std::int64_t seqlen_q = 0;  // the bound on any sequence's length
  std::int64_t seqlen_k = 0;
  std::int64_t total_q = 0;  // packed rows; batch · seqlen where not varlen
  std::int64_t total_k = 0;
  std::int32_t heads_q = 0;
  std::int32_t heads_k = 0;
  std::int32_t head_dim = 0;
  std::int32_t head_dim_v = 0;
};

/// Which keys a query sees by position.
struct PositionParams {
  bool causal = false;
  bool top_left = false;          // align with the top-left corner instead of the bottom-right one
  std::int64_t window_left = -1;  // -1: unbounded
  std::int64_t window_right = -1;
};

struct ScoreParams {
  double scale = 1;
  double softcap = 0;  // 0: off
};

struct DropoutParams {
  std::uint64_t seed = 0;
  std::uint32_t threshold = 0;  // a weight is dropped where its random word is below; 0: off
  double keep_scale = 1;        // 1 / (1 - p)
};

/// Where each sequence lies. Null pointers: every sequence has the full length.
struct SequenceParams {
  const std::int32_t* cu_seqlens_q = nullptr;
  const std::int32_t* cu_seqlens_k = nullptr;
  const std::int32_t* seqused_k = nullptr;  // decode: cache_seqlens, to which seqlen_new is added
  std::int64_t seqlen_new = 0;
};

struct PageParams {
  const std::int32_t* block_table = nullptr;  // null: not paged
  std::int64_t table_batch = 0;               // stride of a sequence's table row
  std::int64_t page_size = 0;
  std::int64_t pages = 0;      // pages in the cache
  std::int64_t max_pages = 0;  // columns of the table
};

struct AppendParams {
  TensorParams k_new;
  TensorParams v_new;
};

struct RotaryParams {
  const void* cos = nullptr;  // (positions, dim / 2), rows dense-strided by `stride`
  const void* sin = nullptr;
  DType dtype = DType::float32;
  std::int64_t cos_stride = 0;
  std::int64_t sin_stride = 0;
  std::int64_t positions = 0;
  std::int32_t dim = 0;  // 0: off
  bool interleaved = false;
};

struct GradParams {
  TensorParams dout, dq, dk, dv;  // null data: not wanted
  RowParams dlse;
  PlaneParams dbias;
  std::int64_t dbias_shape[4] = {0, 0, 0, 0};  // bias's own shape as (batch, head, query, key), 1 where broadcast
  HeadParams dsinks;
};

struct Params {
  DType dtype = DType::float16;
  DType dtype_out = DType::float16;
  SizeParams size;
  TensorParams q, k, v, out;
  RowParams lse;
  PositionParams position;
  ScoreParams score;
  PlaneParams mask, bias;
  HeadParams alibi, sinks, q_descale, k_descale, v_descale;
  DropoutParams dropout;
  SequenceParams sequence;
  PageParams page;
  AppendParams append;
  RotaryParams rotary;
  GradParams grad;
};

/// merged state = two attention states over disjoint keys.
struct MergeParams {
  DType dtype = DType::float16;
  SizeParams size;  // batch, seqlen_q, heads_q, head_dim_v
  TensorParams out_a, out_b, out;
  RowParams lse_a, lse_b, lse;
};

/// Element-wise addition and reductions walk arrays of any rank.
struct ArrayParams {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::int32_t rank = 0;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t stride[kMaxRank] = {};
};

/// out[outer] = op over the inner axes. `outer` is x without the reduced axis, `inner` the reduced part.
struct ReduceParams {
  ArrayParams outer;       // address, shape and strides of x's kept axes
  std::int64_t inner = 0;  // number of reduced elements per result
  ArrayParams reduced;     // shape and strides of the reduced axes (data unused)
  ArrayParams out;         // same shape as outer
  int op = 0;              // ReduceOp
};

}  // namespace flashcore::detail
