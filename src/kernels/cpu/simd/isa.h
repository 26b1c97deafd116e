// Isa: the CPU kernels as compiled for one instruction set, as a table of functions; and the choice between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../../params.h"
#include "../../semantics.h"

namespace flashcore::cpu {

/// Forward work of one thread: blocks of queries of heads that share a key head.
struct ForwardTask {
  detail::Sequence sequence;
  std::int64_t head_begin;
  std::int64_t head_end;
  std::int64_t block_begin;  // of `query_blocks(seqlen_q)`
  std::int64_t block_end;
  std::uint8_t* mask_extents;  // (query_blocks, key_blocks), what tasks with the same mask found in it; may be null
};

/// Decode work of one thread: all queries of a key head against a span of its keys. What comes out is partial.
struct DecodeTask {
  detail::Sequence sequence;
  std::int64_t head_k;
  std::int64_t key_begin;
  std::int64_t key_end;
  float* partial;
};

/// Backward work of one thread: a key head, or a chunk of its keys, and all queries that share it. What each chunk
/// gives to dq is summed by itself, and these sums in the order of keys: whether chunks are tasks changes no bit.
struct BackwardTask {
  detail::Sequence sequence;
  std::int64_t head_k;
  std::int64_t key_begin;
  std::int64_t key_end;
  std::int64_t chunk_keys;
  std::int64_t chunk_queries;  // so many, by backward_queries(), meet all of the task's keys before the next do
  float* dq_part;   // of a task of one chunk: (heads that share it, seqlen_q, dq_width); null: dq itself is written
  void* workspace;  // of backward_workspace() bytes
  double* dsinks;   // (batch, heads_q): each sequence's part of the sinks' gradients; null: not wanted
  std::uint8_t* mask_extents;  // as in ForwardTask
};

/// A tile of dbias, in dbias's own shape.
struct BiasGradTask {
  std::int64_t batch;
  std::int64_t head;
  std::int64_t query_block;
  std::int64_t key_block;
};

struct Isa {
  const char* name;
  bool in_parts;            // multiplies floats as sums of bfloat16, on AMX
  int lanes;                // queries in a vector
  int tile_vectors;         // vectors in a query block
  int task_queries;         // of a forward task at most
  std::int64_t task_bytes;  // of its queries and sums, as floats: they are to stay in L2 beside a block of keys

  void (*forward)(const detail::Params& params, const ForwardTask& task, void* scratch);
  /// Bytes of scratch for a task of `blocks` query blocks.
  std::size_t (*forward_scratch)(std::int64_t head_dim, std::int64_t head_dim_v, std::int64_t blocks);

  int few_queries;  // of a head: up to so many, decode is faster than forward, though many heads share a key head
  void (*decode)(const detail::Params& params, const DecodeTask& task, void* scratch);
  /// Bytes of scratch for `rows` queries of a key head.
  std::size_t (*decode_scratch)(std::int64_t rows, std::int64_t head_dim, std::int64_t head_dim_v);
  /// Writes out and lse from the partial results of `spans` spans, which lie behind each other in the order of keys.
  void (*merge_spans)(const detail::Params& params, const detail::Sequence& sequence, std::int64_t head_k,
                      float* partials, std::int64_t spans);

  void (*backward)(const detail::Params& params, const BackwardTask& task, void* scratch);
  std::size_t (*backward_scratch)(std::int64_t head_dim, std::int64_t head_dim_v);
  /// Queries that stay in L2, in both forms and with their gradients.
  std::int64_t (*backward_queries)(DType dtype, std::int64_t head_dim, std::int64_t head_dim_v);

  /// Writes dq of a head as the sum of `parts` parts, which lie `stride` floats apart.
  void (*sum_dq)(const detail::Params& params, const detail::Sequence& sequence, std::int64_t head, const float* part,
                 std::int64_t stride, std::int64_t parts);

  void (*bias_grad)(const detail::Params& params, const BiasGradTask& task, void* scratch);
  std::size_t (*bias_grad_scratch)(std::int64_t head_dim, std::int64_t head_dim_v);
  int block_keys;  // of a tile; its queries are lanes · tile_vectors

  /// Floats from row to row of a part of dq.
  static std::int64_t dq_width(std::int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

  /// Bytes that a backward task of so many keys needs: for a chunk of queries both forms of q and dout, as floats or as
  /// up to three bfloat16 for each, and dq as floats, twice if the keys are several chunks; dk and dv.
  static std::size_t backward_workspace(std::int64_t seqlen_q, std::int64_t chunk_queries, std::int64_t seqlen_k,
                                        std::int64_t head_dim, std::int64_t head_dim_v, bool several_chunks) {
    const auto whole = [](std::int64_t x) { return (x + 31) / 32 * 32; };
    const std::int64_t dims = whole(head_dim) + whole(head_dim_v);
    const std::int64_t floats = whole(chunk_queries) * (3 * dims + (several_chunks ? 2 : 1) * whole(head_dim)) +
                                2 * whole(seqlen_q) + whole(seqlen_k) * dims;
    return static_cast<std::size_t>(floats) * sizeof(float) + 16 * 64;
  }

  /// Floats of a partial result.
  static std::int64_t partial_floats(std::int64_t rows, std::int64_t head_dim_v) {
    return (rows + 3) / 4 * 4 * (2 + (head_dim_v + 15) / 16 * 16);
  }

  std::int64_t query_blocks(std::int64_t seqlen_q) const {
    const std::int64_t vectors = (seqlen_q + lanes - 1) / lanes;
    return (vectors + tile_vectors - 1) / tile_vectors;
  }
  std::int64_t key_blocks(std::int64_t seqlen_k) const { return (seqlen_k + block_keys - 1) / block_keys; }
};

/// The best one that this processor runs, or the one that FLASHCORE_CPU_ISA names. Throws InvalidArgument where that
/// is unknown or where the processor lacks it. Without `parts` the best one that does not multiply in parts.
const Isa& chosen_isa(bool parts = true);

/// Those that this processor runs, best first; where FLASHCORE_CPU_ISA is set, that one. Throws like chosen_isa.
std::vector<const Isa*> usable_isas();

}  // namespace flashcore::cpu
