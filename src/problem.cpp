// Problem: normal form, features, and the problem line (printed and parsed).
#include "problem.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <tuple>

#include "flashcore/attention.h"
#include "flashcore/error.h"

namespace flashcore::detail {
namespace {

struct FeatureName {
  FeatureSet bit;
  const char* name;
};

constexpr FeatureName kFeatureNames[] = {
    {kCausal, "causal"},
    {kCausalTopLeft, "top-left causal"},
    {kWindow, "window"},
    {kMask, "mask"},
    {kBias, "bias"},
    {kSoftcap, "softcap"},
    {kAlibi, "alibi"},
    {kSinks, "sinks"},
    {kDropout, "dropout"},
    {kVarlen, "varlen"},
    {kSequsedK, "seqused"},
    {kPaged, "paged cache"},
    {kAppend, "cache append"},
    {kRotary, "rotary"},
    {kDescale, "descale"},
    {kGroupedHeads, "grouped heads"},
    {kHeadDimV, "head_dim_v"},
    {kLse, "lse"},
    {kDlse, "dlse"},
    {kDbias, "dbias"},
    {kDsinks, "dsinks"},
    {kDeterministic, "deterministic"},
    {kUnaligned, "unaligned rows"},
};

/// Flags that stand in the line as a word of their own, in the order they are printed.
constexpr FeatureName kFlagWords[] = {
    {kMask, "mask"},
    {kBias, "bias"},
    {kAlibi, "alibi"},
    {kSinks, "sinks"},
    {kDescale, "descale"},
    {kLse, "lse"},
    {kDlse, "dlse"},
    {kDbias, "dbias"},
    {kDsinks, "dsinks"},
    {kSequsedK, "seqused"},
    {kDeterministic, "deterministic"},
    {kUnaligned, "unaligned"},
};

struct DTypeWord {
  DType dtype;
  const char* word;
};
constexpr DTypeWord kDTypeWords[] = {
    {DType::float16, "fp16"}, {DType::bfloat16, "bf16"},    {DType::float32, "fp32"},
    {DType::float64, "fp64"}, {DType::float8_e4m3, "e4m3"},
};

const char* word_of(DType dtype) {
  for (const auto& entry : kDTypeWords)
    if (entry.dtype == dtype) return entry.word;
  return name_of(dtype);
}

const char* word_of(Phase phase) {
  switch (phase) {
    case Phase::forward:
      return "fwd";
    case Phase::backward:
      return "bwd";
    case Phase::decode:
      return "decode";
  }
  return "";
}

struct SizeWord {
  const char* letter;
  const char* meaning;
};
/// What every line has to give.
constexpr SizeWord kSizeWords[] = {
    {"b", "batch"}, {"q", "seqlen_q"}, {"k", "seqlen_k"}, {"h", "heads"}, {"d", "head_dim"},
};

DType default_out(DType dtype) { return dtype == DType::float8_e4m3 ? DType::bfloat16 : dtype; }

std::string shortest(double x) {
  char text[40];
  const auto end = std::to_chars(text, text + sizeof text, x);
  return std::string(text, end.ptr);
}

std::string bound(std::int64_t x) { return x < 0 ? "*" : std::to_string(x); }

bool is_fixed_length(const Problem& p) { return p.phase != Phase::decode && (p.flags & (kVarlen | kSequsedK)) == 0; }

/// Whether the plain word "causal" says enough: top-left and bottom-right are one.
bool causal_needs_no_corner(const Problem& p) { return p.phase == Phase::decode || p.size.seqlen_q == p.size.seqlen_k; }

}  // namespace

std::string describe_features(FeatureSet features) {
  std::string text;
  for (const auto& entry : kFeatureNames)
    if (features & entry.bit) text += (text.empty() ? "" : ", ") + std::string(entry.name);
  return text;
}

FeatureSet features_of(const Problem& p) {
  FeatureSet f = p.flags;
  if (p.causal != CausalRule::none) f |= kCausal;
  if (p.causal == CausalRule::top_left) f |= kCausalTopLeft;
  if (p.window_left >= 0 || p.window_right >= 0) f |= kWindow;
  if (p.softcap > 0) f |= kSoftcap;
  if (p.dropout_p > 0) f |= kDropout;
  if (p.page_size > 0) f |= kPaged;
  if (p.seqlen_new > 0) f |= kAppend;
  if (p.rotary_dim > 0) f |= kRotary;
  if (p.size.heads_q != p.size.heads_k) f |= kGroupedHeads;
  if (p.size.head_dim != p.size.head_dim_v) f |= kHeadDimV;
  return f;
}

bool operator==(const Problem& a, const Problem& b) {
  const auto sizes = [](const Sizes& s) {
    return std::tie(s.batch, s.seqlen_q, s.seqlen_k, s.total_q, s.total_k, s.heads_q, s.heads_k, s.head_dim,
                    s.head_dim_v);
  };
  const auto rest = [](const Problem& p) {
    return std::tie(p.phase, p.dtype, p.dtype_out, p.causal, p.window_left, p.window_right, p.scale, p.softcap,
                    p.dropout_p, p.seed, p.page_size, p.seqlen_new, p.rotary_dim, p.rotary_interleaved, p.flags);
  };
  return sizes(a.size) == sizes(b.size) && rest(a) == rest(b);
}

double default_scale(std::int64_t head_dim) { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }

void normalise(Problem& p) {
  if (p.phase == Phase::decode) p.flags |= kSequsedK;
  if (p.phase != Phase::backward) p.flags &= ~kDeterministic;
  if (p.dropout_p == 0) p.seed = 0;
  if (p.rotary_dim == 0) p.rotary_interleaved = false;
  if (!(p.flags & kVarlen)) {
    p.size.total_q = p.size.batch * p.size.seqlen_q;
    p.size.total_k = p.size.batch * p.size.seqlen_k;
  }
  if (p.causal == CausalRule::top_left && is_fixed_length(p) && p.size.seqlen_q == p.size.seqlen_k)
    p.causal = CausalRule::bottom_right;
  // A bound that no pair of positions can reach is none.
  const std::int64_t reach = p.size.seqlen_q + p.size.seqlen_k;
  if (p.window_left >= reach) p.window_left = -1;
  if (p.window_right >= reach) p.window_right = -1;
  // The causal rule ends at the diagonal, which no right bound of a window passes.
  if (p.causal != CausalRule::none) p.window_right = -1;
  // A single query aligned bottom-right sits on the last key: nothing lies to its right.
  if (p.size.seqlen_q == 1 && !(p.flags & kVarlen) && p.causal != CausalRule::top_left) {
    p.causal = CausalRule::none;
    p.window_right = -1;
  }
}

std::string to_line(const Problem& p) {
  const Sizes& s = p.size;
  std::string line = word_of(p.phase);
  const auto add = [&line](const std::string& word) { line += ' ' + word; };
  const auto pair = [](std::int64_t a, std::int64_t b) {
    return a == b ? std::to_string(a) : std::to_string(a) + '/' + std::to_string(b);
  };
  add(word_of(p.dtype));
  add('b' + std::to_string(s.batch));
  add('q' + std::to_string(s.seqlen_q));
  add('k' + std::to_string(s.seqlen_k));
  add('h' + pair(s.heads_q, s.heads_k));
  add('d' + pair(s.head_dim, s.head_dim_v));
  if (p.flags & kVarlen) add("varlen" + std::to_string(s.total_q) + '/' + std::to_string(s.total_k));
  if (p.page_size > 0) add("page" + std::to_string(p.page_size));
  if (p.seqlen_new > 0) add("append" + std::to_string(p.seqlen_new));
  if (p.rotary_dim > 0) add("rotary" + std::to_string(p.rotary_dim) + (p.rotary_interleaved ? "i" : ""));
  if (p.causal != CausalRule::none) {
    const bool plain = p.causal == CausalRule::bottom_right && causal_needs_no_corner(p);
    add(plain ? "causal" : p.causal == CausalRule::top_left ? "causal_tl" : "causal_br");
  }
  if (p.window_left >= 0 || p.window_right >= 0) add("window" + bound(p.window_left) + ',' + bound(p.window_right));
  if (p.softcap > 0) add("softcap" + shortest(p.softcap));
  if (p.dropout_p > 0) add("dropout" + shortest(p.dropout_p));
  if (p.seed != 0) add("seed" + std::to_string(p.seed));
  if (p.scale != default_scale(s.head_dim)) add("scale" + shortest(p.scale));
  if (p.dtype_out != default_out(p.dtype)) add(std::string("out_") + word_of(p.dtype_out));
  for (const auto& flag : kFlagWords) {
    const bool implied = flag.bit == kSequsedK && p.phase == Phase::decode;
    if ((p.flags & flag.bit) && !implied) add(flag.name);
  }
  return line;
}

namespace {

/// Reads one line word by word. What a word does is one function a kind: try_flag, try_size, try_option. Whether the
/// words fit each other is seen when all are read.
class LineReader {
 public:
  explicit LineReader(std::string_view line) : line_(line) {}

  Problem read() {
    std::size_t at = 0;
    while (at < line_.size()) {
      const std::size_t begin = line_.find_first_not_of(" \t", at);
      if (begin == std::string_view::npos) break;
      at = std::min(line_.find_first_of(" \t", begin), line_.size());
      read_word(line_.substr(begin, at - begin));
    }
    check_complete();
    check_values();
    check_phase();
    check_companions();
    finish();
    return problem_;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    std::string message = "problem line \"";
    message.append(line_).append("\": ").append(what).append("\n").append(problem_line_help());
    throw InvalidArgument(message);
  }

  /// Notes what a word is about; a second word about the same is refused.
  void note(std::string_view subject, std::string_view word) {
    const auto [at, is_first] = words_.try_emplace(subject, word);
    if (!is_first) fail(quoted(at->second) + " and " + quoted(word) + ": " + std::string(subject) + " is given twice");
  }

  /// The word about a subject; empty where there is none.
  std::string_view word_about(std::string_view subject) const {
    const auto at = words_.find(subject);
    return at == words_.end() ? std::string_view() : at->second;
  }
  bool has(std::string_view subject) const { return !word_about(subject).empty(); }

  static std::string quoted(std::string_view word) { return '"' + std::string(word) + '"'; }

  void read_word(std::string_view word) {
    if (try_phase_or_dtype(word) || try_flag(word) || try_option(word) || try_size(word)) return;
    fail("cannot read the word " + quoted(word));
  }

  bool try_phase_or_dtype(std::string_view word) {
    for (const Phase phase : {Phase::forward, Phase::backward, Phase::decode}) {
      if (word != word_of(phase)) continue;
      note("phase", word);
      problem_.phase = phase;
      return true;
    }
    for (const auto& entry : kDTypeWords) {
      if (word == entry.word) {
        note("dtype", word);
        problem_.dtype = entry.dtype;
        return true;
      }
      if (word == std::string("out_") + entry.word) {
        note("output dtype", word);
        problem_.dtype_out = entry.dtype;
        return true;
      }
    }
    return false;
  }

  bool try_flag(std::string_view word) {
    for (const auto& flag : kFlagWords) {
      if (word != flag.name) continue;
      note(flag.name, word);
      problem_.flags |= flag.bit;
      return true;
    }
    if (word != "causal" && word != "causal_br" && word != "causal_tl") return false;
    note("causal rule", word);
    problem_.causal = word == "causal_tl" ? CausalRule::top_left : CausalRule::bottom_right;
    return true;
  }

  /// The rest of `word` after `name`, or null if it does not begin with it and go on with a digit, '-' or '*'.
  static bool after(std::string_view word, std::string_view name, std::string_view& rest) {
    if (word.size() <= name.size() || word.substr(0, name.size()) != name) return false;
    rest = word.substr(name.size());
    return (rest[0] >= '0' && rest[0] <= '9') || rest[0] == '*' || rest[0] == '-' || rest[0] == '.';
  }

  /// The same, and notes the word where it is this one.
  bool take(std::string_view word, std::string_view name, std::string_view& rest) {
    if (!after(word, name, rest)) return false;
    note(name, word);
    return true;
  }

  bool try_option(std::string_view word) {
    std::string_view rest;
    if (take(word, "window", rest)) {
      const std::size_t comma = rest.find(',');
      if (comma == std::string_view::npos) fail(quoted(word) + ": a window is window<left>,<right>");
      problem_.window_left = window_bound(word, rest.substr(0, comma));
      problem_.window_right = window_bound(word, rest.substr(comma + 1));
      return true;
    }
    if (take(word, "varlen", rest)) {
      problem_.flags |= kVarlen;
      read_pair(word, rest, problem_.size.total_q, problem_.size.total_k);
      return true;
    }
    if (take(word, "rotary", rest)) {
      problem_.rotary_interleaved = rest.back() == 'i';
      problem_.rotary_dim = integer(word, problem_.rotary_interleaved ? rest.substr(0, rest.size() - 1) : rest);
      if (problem_.rotary_dim <= 0) fail(quoted(word) + ": must be positive");
      return true;
    }
    if (take(word, "page", rest)) return positive(word, rest, problem_.page_size);
    if (take(word, "append", rest)) return positive(word, rest, problem_.seqlen_new);
    if (take(word, "softcap", rest)) return real(word, rest, problem_.softcap);
    if (take(word, "dropout", rest)) return real(word, rest, problem_.dropout_p);
    if (take(word, "scale", rest)) return real(word, rest, problem_.scale);
    if (take(word, "seed", rest)) {
      const auto result = std::from_chars(rest.data(), rest.data() + rest.size(), problem_.seed);
      if (result.ec != std::errc() || result.ptr != rest.data() + rest.size())
        fail(quoted(word) + ": expected an integer");
      return true;
    }
    return false;
  }

  bool try_size(std::string_view word) {
    std::string_view rest;
    Sizes& s = problem_.size;
    if (take(word, "b", rest)) return s.batch = integer(word, rest), true;
    if (take(word, "q", rest)) return s.seqlen_q = integer(word, rest), true;
    if (take(word, "k", rest)) return s.seqlen_k = integer(word, rest), true;
    if (take(word, "h", rest)) return read_pair(word, rest, s.heads_q, s.heads_k), true;
    if (take(word, "d", rest)) return read_pair(word, rest, s.head_dim, s.head_dim_v), true;
    return false;
  }

  std::int64_t integer(std::string_view word, std::string_view digits) const {
    std::int64_t value = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (result.ec != std::errc() || result.ptr != digits.data() + digits.size() || value < 0)
      fail(quoted(word) + ": expected an integer of at least 0");
    return value;
  }

  bool positive(std::string_view word, std::string_view digits, std::int64_t& target) const {
    target = integer(word, digits);
    if (target == 0) fail(quoted(word) + ": must be positive");
    return true;
  }

  std::int64_t window_bound(std::string_view word, std::string_view text) const {
    return text == "*" ? -1 : integer(word, text);
  }

  void read_pair(std::string_view word, std::string_view rest, std::int64_t& first, std::int64_t& second) const {
    const std::size_t slash = rest.find('/');
    first = integer(word, rest.substr(0, slash));
    second = slash == std::string_view::npos ? first : integer(word, rest.substr(slash + 1));
  }

  bool real(std::string_view word, std::string_view text, double& target) const {
    const auto result = std::from_chars(text.data(), text.data() + text.size(), target);
    if (result.ec != std::errc() || result.ptr != text.data() + text.size() || !std::isfinite(target))
      fail(quoted(word) + ": expected a number");
    return true;
  }

  void check_complete() const {
    if (!has("phase")) fail("the phase is missing: fwd, bwd or decode");
    if (!has("dtype")) fail("the dtype is missing: fp16, bf16, fp32, fp64 or e4m3");
    std::string missing;
    for (const auto& size : kSizeWords)
      if (!has(size.letter))
        missing += (missing.empty() ? "" : ", ") + std::string(size.letter) + " (" + size.meaning + ')';
    if (!missing.empty()) fail("a size is missing: " + missing);
  }

  void check_values() const {
    const Sizes& s = problem_.size;
    if (s.heads_q < 1 || s.heads_k < 1 || s.heads_q % s.heads_k != 0)
      fail("heads " + std::to_string(s.heads_q) + '/' + std::to_string(s.heads_k) + ": the first must be a multiple");
    if (s.head_dim < 1 || s.head_dim > 256 || s.head_dim_v < 1 || s.head_dim_v > 256)
      fail("head_dim " + std::to_string(s.head_dim) + '/' + std::to_string(s.head_dim_v) + ": 1 to 256 is allowed");
    if (problem_.dropout_p < 0 || problem_.dropout_p >= 1) fail("dropout must lie in [0, 1)");
    if (problem_.softcap < 0) fail("softcap must not be negative");
  }

  /// Refuses the word about a subject, if there is one, unless it fits.
  void require(bool fits, std::string_view subject, const std::string& rule) const {
    if (has(subject) && !fits) fail(quoted(word_about(subject)) + " does not fit: " + rule);
  }

  /// Words that only some kinds of call can take.
  void check_phase() const {
    const bool decode = problem_.phase == Phase::decode;
    const bool backward = problem_.phase == Phase::backward;
    require(decode, "page", "only decode has a cache that can lie in pages");
    require(decode, "append", "only decode has a cache to append keys to");
    require(decode, "rotary", "only decode rotates q and the new keys");
    require(!decode, "varlen", "only fwd and bwd take packed sequences");
    require(!decode || problem_.causal != CausalRule::top_left, "causal rule",
            "decode is causal bottom-right: say causal or causal_br");
    require(!backward, "lse", "only fwd and decode write lse; bwd always reads it");
    for (const char* gradient : {"dlse", "dbias", "dsinks"}) require(backward, gradient, "only bwd has gradients");
  }

  /// Words that depend on others of the line.
  void check_companions() const {
    const Problem& p = problem_;
    const Sizes& s = p.size;
    require(p.flags & kBias, "dbias", "it is the gradient of a bias, and the line has no bias");
    require(p.flags & kSinks, "dsinks", "it is the gradient of sinks, and the line has no sinks");
    require(p.rotary_dim % 2 == 0 && p.rotary_dim <= s.head_dim, "rotary",
            "an even number up to head_dim is allowed, here 2 to " + std::to_string(s.head_dim));
    require(p.seqlen_new <= s.seqlen_k, "append",
            "new keys go into the cache, which holds " + std::to_string(s.seqlen_k));
    require(p.page_size == 0 || s.seqlen_k % p.page_size == 0, "page",
            quoted(word_about("k")) + ", the capacity of the cache, must be a multiple of the page");
    require(word_about("causal rule") != "causal" || causal_needs_no_corner(p), "causal rule",
            "it is ambiguous where q and k differ: say causal_tl (top-left) or causal_br (bottom-right)");
  }

  void finish() {
    if (!has("scale")) problem_.scale = default_scale(problem_.size.head_dim);
    if (!has("output dtype")) problem_.dtype_out = default_out(problem_.dtype);
    normalise(problem_);
  }

  std::string_view line_;
  Problem problem_;
  std::map<std::string_view, std::string_view> words_;  // by what they are about
};

}  // namespace

Problem parse_problem(std::string_view line) { return LineReader(line).read(); }

}  // namespace flashcore::detail

namespace flashcore {

std::string problem_line_help() {
  return "a problem line is: fwd|bwd|decode  fp16|bf16|fp32|fp64|e4m3  b<batch> q<seqlen_q> k<seqlen_k> "
         "h<heads_q>[/<heads_k>] d<head_dim>[/<head_dim_v>], then any of: varlen<total_q>/<total_k> page<size> "
         "append<keys> rotary<dim>[i] causal|causal_tl|causal_br window<left>,<right> (* is unbounded) softcap<x> "
         "dropout<p> seed<n> scale<x> out_<dtype> mask bias alibi sinks descale lse dlse dbias dsinks seqused "
         "deterministic unaligned\nfor example: \"fwd bf16 b2 q4096 k4096 h32/8 d128 causal\"";
}

std::string canonical_problem_line(std::string_view line) { return detail::to_line(detail::parse_problem(line)); }

}  // namespace flashcore
