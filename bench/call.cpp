// Call: the reading of a line and the making of its tensors.
#include "call.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <sstream>

namespace bench {

using namespace flashcore;

namespace {

void copy_to_device(void* target, const void* host, std::size_t bytes, Device device) {
  copy_memory(target, host, bytes, device, nullptr);
  synchronize(device);
}

/// The integers after `name`: "h32/8" -> 32, 8. How many there are; 0 where the word does not begin with the name.
int numbers(const std::string& word, const std::string& name, std::int64_t& first, std::int64_t& second) {
  if (word.compare(0, name.size(), name) != 0) return 0;
  long long values[2] = {-1, -1};
  char divider = 0;
  const std::string rest = word.substr(name.size());
  const int got = rest[0] == '*' ? 1 + std::sscanf(rest.c_str(), "*,%lld", &values[1])
                                 : std::sscanf(rest.c_str(), "%lld%c%lld", &values[0], &divider, &values[1]);
  first = values[0];
  second = got >= 2 && values[1] >= 0 ? values[1] : divider == ',' ? -1 : values[0];
  return got;
}

bool read_word(Line& line, const std::string& word) {
  Mask& mask = line.options.mask;
  std::int64_t ignored = 0;
  const auto is_causal = [&](const char* name, Causal kind) { return word == name ? (mask.kind = kind, true) : false; };
  if (is_causal("causal", line.phase == "decode" ? Causal::bottom_right : Causal::square)) return true;
  if (is_causal("causal_tl", Causal::top_left) || is_causal("causal_br", Causal::bottom_right)) return true;
  if (word == "lse") return line.lse = true;
  if (word == "deterministic") return line.options.deterministic = true;
  if (std::sscanf(word.c_str(), "softcap%lf", &line.options.softcap) == 1) return true;
  return numbers(word, "window", mask.left, mask.right) || numbers(word, "page", line.page, ignored) ||
         numbers(word, "b", line.batch, ignored) || numbers(word, "q", line.seqlen_q, ignored) ||
         numbers(word, "k", line.seqlen_k, ignored) || numbers(word, "h", line.heads_q, line.heads_k) ||
         numbers(word, "d", line.dim, line.dim_v);
}

std::uint64_t random_number(DType dtype, std::uint64_t& state) {
  const std::uint64_t r = (state = state * 6364136223846793005u + 1442695040888963407u) >> 11;
  const std::uint64_t sign = r >> 52;
  if (dtype == DType::float16) return sign << 15 | 0x3800 | (r & 0x3ff);
  if (dtype == DType::bfloat16) return sign << 15 | 0x3f00 | (r & 0x7f);
  if (dtype == DType::float32) return sign << 31 | 0x3f000000 | (r & 0x7fffff);
  return sign << 63 | 0x3fe0000000000000u | (r & 0xfffffffffffffu);
}

}  // namespace

Line::Line(const std::string& text) : canonical(canonical_problem_line(text)) {
  static const std::map<std::string, DType> dtypes = {
      {"fp16", DType::float16}, {"bf16", DType::bfloat16}, {"fp32", DType::float32}, {"fp64", DType::float64}};
  std::istringstream words(canonical);
  std::string word;
  words >> phase >> word;
  if (!dtypes.count(word)) throw InvalidArgument(canonical + ": fp16, bf16, fp32 and fp64 can be timed, not " + word);
  dtype = dtypes.at(word);
  while (words >> word)
    if (!read_word(*this, word)) throw InvalidArgument(canonical + ": no tensors are made here for \"" + word + "\"");
}

Call::Call(const Line& line, Device device) : line_(line), device_(device) {
  const Line& l = line_;
  inputs_.q = random({l.batch, l.heads_q, l.seqlen_q, l.dim});
  outputs_.out = empty(l.dtype, {l.batch, l.heads_q, l.seqlen_q, l.dim_v});
  if (l.lse || l.phase == "bwd")
    outputs_.lse = empty(l.dtype == DType::float64 ? l.dtype : DType::float32, {l.batch, l.heads_q, l.seqlen_q});
  if (l.phase == "decode") {
    make_decode();
    return;
  }
  inputs_.k = random({l.batch, l.heads_k, l.seqlen_k, l.dim});
  inputs_.v = random({l.batch, l.heads_k, l.seqlen_k, l.dim_v});
  if (l.phase == "bwd") make_gradients();
}

/// Full caches; pages in the order of the keys.
void Call::make_decode() {
  const Line& l = line_;
  const std::int64_t rows = l.page > 0 ? l.page : l.seqlen_k;
  const std::int64_t columns = l.page > 0 ? l.seqlen_k / l.page : 1;
  decode_.q = inputs_.q;
  decode_.k_cache = random({l.batch * columns, l.heads_k, rows, l.dim});
  decode_.v_cache = random({l.batch * columns, l.heads_k, rows, l.dim_v});
  decode_.cache_seqlens =
      integers(std::vector<std::int32_t>(static_cast<std::size_t>(l.batch), static_cast<std::int32_t>(columns * rows)),
               {l.batch});
  if (l.page == 0) return;
  std::vector<std::int32_t> table(static_cast<std::size_t>(l.batch * columns));
  std::iota(table.begin(), table.end(), 0);
  decode_.block_table = integers(table, {l.batch, columns});
}

/// The backward pass reads what a forward pass has written.
void Call::make_gradients() {
  const Line& l = line_;
  attention_forward(inputs_, outputs_, line_.options);
  cotangents_.dout = random({l.batch, l.heads_q, l.seqlen_q, l.dim_v});
  grads_.dq = empty(l.dtype, {l.batch, l.heads_q, l.seqlen_q, l.dim});
  grads_.dk = empty(l.dtype, {l.batch, l.heads_k, l.seqlen_k, l.dim});
  grads_.dv = empty(l.dtype, {l.batch, l.heads_k, l.seqlen_k, l.dim_v});
}

TensorView Call::empty(DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView t = TensorView::contiguous(nullptr, dtype, device_, shape);
  buffers_.emplace_back(static_cast<std::size_t>(t.numel()) * size_of(dtype), device_, nullptr);
  t.data = buffers_.back().data();
  return t;
}

TensorView Call::random(std::initializer_list<std::int64_t> shape) {
  const TensorView t = empty(line_.dtype, shape);
  const std::size_t each = size_of(line_.dtype);
  std::vector<unsigned char> host(static_cast<std::size_t>(t.numel()) * each);
  for (std::size_t at = 0; at < host.size(); at += each) {
    const std::uint64_t bits = random_number(line_.dtype, random_state_);
    std::memcpy(&host[at], &bits, each);
  }
  copy_to_device(t.data, host.data(), host.size(), device_);
  return t;
}

TensorView Call::integers(const std::vector<std::int32_t>& values, std::initializer_list<std::int64_t> shape) {
  const TensorView t = empty(DType::int32, shape);
  copy_to_device(t.data, values.data(), values.size() * sizeof(std::int32_t), device_);
  return t;
}

AttentionPlan Call::plan() const {
  if (line_.phase == "decode") return AttentionPlan::decode(decode_, outputs_, line_.options);
  if (line_.phase == "bwd") return AttentionPlan::backward(inputs_, outputs_, cotangents_, grads_, line_.options);
  return AttentionPlan::forward(inputs_, outputs_, line_.options);
}

void Call::run(const AttentionPlan& plan, void* workspace, Stream stream) const {
  if (line_.phase == "decode") return plan.run(decode_, outputs_, workspace, stream);
  if (line_.phase == "bwd") return plan.run(inputs_, outputs_, cotangents_, grads_, workspace, stream);
  plan.run(inputs_, outputs_, workspace, stream);
}

}  // namespace bench
