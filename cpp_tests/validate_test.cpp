// validate: what can never be valid is refused with what was given and what is allowed, and nothing is written; what is
// valid becomes the Problem that its line says.
#include "validate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <ostream>

#include "kernels/case_lines.h"
#include "support/public_call.h"

namespace flashcore::testing {
namespace {

using detail::Check;
using detail::Phase;
using Words = std::vector<std::string>;

enum class Kind { value, type };  // InvalidArgument, or its child InvalidType

struct BadCall {
  const char* name;
  const char* line;  // a good call
  std::function<void(PublicCall&)> spoil;
  Words words;  // what the message must tell
  Kind kind = Kind::value;
};

std::ostream& operator<<(std::ostream& os, const BadCall& bad) { return os << bad.name; }

constexpr const char* kForward = "fwd fp32 b2 q4 k6 h4/2 d8 mask bias alibi sinks lse";
constexpr const char* kVarlen = "fwd fp32 b4 q4 k6 h2 d8 varlen9/14 seqused lse";
constexpr const char* kUsed = "fwd fp32 b2 q4 k6 h2 d8 seqused";
constexpr const char* kBackward = "bwd fp32 b2 q4 k6 h4/2 d8 bias sinks dlse dbias dsinks";
constexpr const char* kDecode = "decode fp32 b2 q2 k12 h4/2 d8 append2 rotary4 lse";
constexpr const char* kPaged = "decode fp32 b2 q2 k12 h4/2 d8 page4 append1 lse";

/// Sets one int32 of a tensor on the device.
void poke(TestTensor& t, const Index& index, double value) {
  t.set(index, value);
  t.upload();
}

void set_heads(TensorView& t, std::int64_t heads) { t.shape[1] = heads; }

/// Another last dimension, dense.
void set_dim(TensorView& t, std::int64_t dim) {
  t.shape[3] = dim;
  t.stride[2] = dim;
  t.stride[1] = dim * t.shape[2];
  t.stride[0] = t.stride[1] * t.shape[1];
}

const double kNaN = std::nan("");

const BadCall kBadForwardCalls[] = {
    {"QDtype", kForward, [](auto& c) { c.in.q.dtype = DType::int32; }, {"q", "int32", "float16"}, Kind::type},
    {"KDtype", kForward, [](auto& c) { c.in.k.dtype = DType::float16; }, {"k", "float16", "float32"}, Kind::type},
    {"VDtype", kForward, [](auto& c) { c.in.v.dtype = DType::int64; }, {"v", "int64", "float32"}, Kind::type},
    {"OutDtype",
     kForward,
     [](auto& c) { c.out.out.dtype = DType::bfloat16; },
     {"out", "bfloat16", "float32"},
     Kind::type},
    {"LseDtype",
     kForward,
     [](auto& c) { c.out.lse.dtype = DType::float16; },
     {"lse", "float16", "float32"},
     Kind::type},
    {"MaskDtype",
     kForward,
     [](auto& c) { c.in.mask.dtype = DType::float32; },
     {"mask", "float32", "boolean"},
     Kind::type},
    {"BiasDtype",
     kForward,
     [](auto& c) { c.in.bias.dtype = DType::float16; },
     {"bias", "float16", "float32"},
     Kind::type},
    {"SinksDtype",
     kForward,
     [](auto& c) { c.in.sinks.dtype = DType::int32; },
     {"sinks", "int32", "float32"},
     Kind::type},
    {"QMissing", kForward, [](auto& c) { c.in.q = {}; }, {"q", "missing"}},
    {"KMissing", kForward, [](auto& c) { c.in.k = {}; }, {"k", "missing"}},
    {"OutMissing", kForward, [](auto& c) { c.out.out = {}; }, {"out", "missing"}},
    {"QRank", kForward, [](auto& c) { c.in.q.rank = 3; }, {"q", "(batch, heads, seqlen, head_dim)", "(2, 4, 4)"}},
    {"KBatch", kForward, [](auto& c) { c.in.k.shape[0] = 3; }, {"batch", "2", "3"}},
    {"HeadsNotAMultiple",
     kForward,
     [](auto& c) {
       set_heads(c.in.k, 3);
       set_heads(c.in.v, 3);
     },
     {"4 heads", "3", "multiple"}},
    {"NoHeads", kForward, [](auto& c) { set_heads(c.in.k, 0), set_heads(c.in.v, 0); }, {"at least 1 head"}},
    {"VHeads", kForward, [](auto& c) { set_heads(c.in.v, 4); }, {"k has 2 heads", "v has 4"}},
    {"KHeadDim", kForward, [](auto& c) { set_dim(c.in.k, 4); }, {"head_dim", "8", "4"}},
    {"HeadDim257", kForward, [](auto& c) { set_dim(c.in.q, 257), set_dim(c.in.k, 257); }, {"head_dim 257", "1 to 256"}},
    {"HeadDim0", kForward, [](auto& c) { set_dim(c.in.q, 0), set_dim(c.in.k, 0); }, {"head_dim 0", "1 to 256"}},
    {"HeadDimV257", kForward, [](auto& c) { set_dim(c.in.v, 257); }, {"head_dim 257", "1 to 256"}},
    {"VLength", kForward, [](auto& c) { c.in.v.shape[2] = 5; }, {"k has 6", "v has 5"}},
    {"OutShape", kForward, [](auto& c) { c.out.out.shape[2] = 3; }, {"out", "(2, 4, 4, 8)", "(2, 4, 3, 8)"}},
    {"LseShape", kForward, [](auto& c) { c.out.lse.shape[2] = 3; }, {"lse", "(2, 4, 4)", "(2, 4, 3)"}},
    {"DeviceMix", kForward, [](auto& c) { c.in.k.device = {DeviceType::cuda, 0}; }, {"k", "cuda:0", "cpu"}},
    {"MaskDeviceMix", kForward, [](auto& c) { c.in.mask.device = {DeviceType::cuda, 1}; }, {"mask", "cuda:1", "cpu"}},
    {"LastDimensionStrided", kForward, [](auto& c) { c.in.q.stride[3] = 2; }, {"q", "contiguous", "stride 2"}},
    {"OutLastDimensionStrided", kForward, [](auto& c) { c.out.out.stride[3] = 2; }, {"out", "contiguous"}},
    {"QNull", kForward, [](auto& c) { c.in.q.data = nullptr; }, {"q", "null"}},
    {"OutNull", kForward, [](auto& c) { c.out.out.data = nullptr; }, {"out", "null"}},
    {"OutIsQ", kForward, [](auto& c) { c.out.out.data = c.in.q.data; }, {"out", "overlaps", "q"}},
    {"OutOverlapsV",
     kForward,
     [](auto& c) { c.out.out.data = static_cast<char*>(c.in.v.data) + 64; },
     {"out", "overlaps", "v"}},
    {"LseOverlapsBias", kForward, [](auto& c) { c.out.lse.data = c.in.bias.data; }, {"lse", "overlaps", "bias"}},
    {"LseOverlapsOut", kForward, [](auto& c) { c.out.lse.data = c.out.out.data; }, {"overlaps", "lse", "out"}},
    {"OutRowsShareMemory", kForward, [](auto& c) { c.out.out.stride[2] = 4; }, {"out", "strides"}},
    {"OutIsBroadcast", kForward, [](auto& c) { c.out.out.stride[1] = 0; }, {"out", "strides"}},
    {"CausalWithUnequalLengths",
     kForward,
     [](auto& c) { c.options.mask = Mask::causal(); },
     {"seqlen_q 4", "seqlen_k 6", "top_left", "bottom_right"}},
    {"WindowBelowMinusOne", kForward, [](auto& c) { c.options.mask.left = -2; }, {"window (-2, -1)", "at least 0"}},
    {"NegativeSoftcap", kForward, [](auto& c) { c.options.softcap = -1; }, {"softcap -1", "0 (off)"}},
    {"SoftcapNaN", kForward, [](auto& c) { c.options.softcap = kNaN; }, {"softcap", "nan"}},
    {"SoftcapInfinite", kForward, [](auto& c) { c.options.softcap = HUGE_VAL; }, {"softcap", "finite"}},
    {"DropoutOne", kForward, [](auto& c) { c.options.dropout_p = 1; }, {"dropout_p 1", "[0, 1)"}},
    {"DropoutNegative", kForward, [](auto& c) { c.options.dropout_p = -0.5; }, {"dropout_p -0.5", "[0, 1)"}},
    {"DropoutNaN", kForward, [](auto& c) { c.options.dropout_p = kNaN; }, {"dropout_p nan", "[0, 1)"}},
    {"ScaleInfinite", kForward, [](auto& c) { c.options.scale = HUGE_VAL; }, {"scale inf", "finite"}},
    {"ScaleNaN", kForward, [](auto& c) { c.options.scale = kNaN; }, {"scale", "nan", "finite"}},
    {"UnknownKernel", kForward, [](auto& c) { c.options.kernel = "warp_drive"; }, {"warp_drive", "cpu.reference"}},
    {"MaskShape", kForward, [](auto& c) { c.in.mask.shape[3] = 5; }, {"mask", "(2, 4, 4, 6)", "(2, 4, 4, 5)"}},
    {"BiasShape", kForward, [](auto& c) { c.in.bias.shape[1] = 2; }, {"bias", "(2, 4, 4, 6)", "(2, 2, 4, 6)"}},
    {"AlibiShape", kForward, [](auto& c) { c.in.alibi_slopes.shape[0] = 3; }, {"alibi_slopes", "(4,)", "(3"}},
    {"SinksShape", kForward, [](auto& c) { c.in.sinks.shape[0] = 2; }, {"sinks", "(4,)", "(2"}},
    {"DescaleOfFloat32", kForward, [](auto& c) { c.in.q_descale = c.in.sinks; }, {"q_descale", "float8", "float32"}},
    {"PackedWithoutOffsets",
     kForward,
     [](auto& c) { c.options.layout = Layout::thd; },
     {"q", "(total, heads, head_dim)"}},
};

const BadCall kBadLengthCalls[] = {
    {"OffsetsWithoutPackedLayout", kVarlen, [](auto& c) { c.options.layout = Layout::bhsd; }, {"q", "bhsd"}},
    {"OnlyOffsetsOfQ", kVarlen, [](auto& c) { c.in.sequences.cu_seqlens_k = {}; }, {"together"}},
    {"NoOffsets", kVarlen, [](auto& c) { c.in.sequences = {}; }, {"thd", "cu_seqlens_q"}},
    {"OffsetsDtype",
     kVarlen,
     [](auto& c) { c.in.sequences.cu_seqlens_q.dtype = DType::int64; },
     {"cu_seqlens_q", "int64", "int32"},
     Kind::type},
    {"OffsetsOfOtherBatch",
     kVarlen,
     [](auto& c) { c.in.sequences.cu_seqlens_k.shape[0] = 4; },
     {"cu_seqlens_k", "(5,)", "(4"}},
    {"OffsetsStartBeyondZero",
     kVarlen,
     [](auto& c) { poke(c.tensors.cu_seqlens_q, {0}, 1); },
     {"cu_seqlens_q[0] is 1", "start with 0"}},
    {"OffsetsFall", kVarlen, [](auto& c) { poke(c.tensors.cu_seqlens_k, {2}, 3); }, {"cu_seqlens_k[2] is 3", "fall"}},
    {"OffsetsNegative",
     kVarlen,
     [](auto& c) { poke(c.tensors.cu_seqlens_q, {1}, -4); },
     {"cu_seqlens_q[1] is -4", "fall"}},
    {"OffsetsBeyondTheRows",
     kVarlen,
     [](auto& c) {
       poke(c.tensors.cu_seqlens_q, {4}, 10);
       c.in.sequences.max_seqlen_q = -1;
     },
     {"cu_seqlens_q[4] is 10", "9 packed rows"}},
    {"SequenceLongerThanItsMaximum",
     kVarlen,
     [](auto& c) { c.in.sequences.max_seqlen_q = 3; },
     {"cu_seqlens_q", "4 rows", "maximum of 3"}},
    {"NegativeMaximum", kVarlen, [](auto& c) { c.in.sequences.max_seqlen_k = -7; }, {"max_seqlen -7", "at least 0"}},
    {"UsedKeysBeyondTheSequence",
     kVarlen,
     [](auto& c) { poke(c.tensors.seqused_k, {0}, 7); },
     {"seqused_k[0] is 7", "0 to 6"}},
    {"UsedKeysNegative", kUsed, [](auto& c) { poke(c.tensors.seqused_k, {1}, -1); }, {"seqused_k[1] is -1", "0 to 6"}},
    {"UsedKeysBeyondTheTensor",
     kUsed,
     [](auto& c) { poke(c.tensors.seqused_k, {1}, 7); },
     {"seqused_k[1] is 7", "0 to 6"}},
    {"UsedKeysShape", kUsed, [](auto& c) { c.in.sequences.seqused_k.shape[0] = 1; }, {"seqused_k", "(2,)", "(1"}},
    {"CausalWithUsedKeys",
     "fwd fp32 b2 q6 k6 h2 d8 seqused",
     [](auto& c) { c.options.mask = Mask::causal(); },
     {"causal", "top_left", "bottom_right"}},
    {"CausalWithOtherOffsets",
     kVarlen,
     [](auto& c) { c.options.mask = Mask::causal(); },
     {"causal", "top_left", "bottom_right"}},
};

const BadCall kBadBackwardCalls[] = {
    {"LseMissing", kBackward, [](auto& c) { c.out.lse = {}; }, {"lse", "missing"}},
    {"DoutMissing", kBackward, [](auto& c) { c.cotangents.dout = {}; }, {"dout", "missing"}},
    {"DoutDtype",
     kBackward,
     [](auto& c) { c.cotangents.dout.dtype = DType::float16; },
     {"dout", "float16", "float32"},
     Kind::type},
    {"DoutShape", kBackward, [](auto& c) { c.cotangents.dout.shape[2] = 3; }, {"dout", "(2, 4, 4, 8)"}},
    {"DlseShape", kBackward, [](auto& c) { c.cotangents.dlse.shape[1] = 2; }, {"dlse", "(2, 4, 4)"}},
    {"DqShape", kBackward, [](auto& c) { c.grads.dq.shape[2] = 6; }, {"dq", "(2, 4, 4, 8)", "(2, 4, 6, 8)"}},
    {"DkDtype",
     kBackward,
     [](auto& c) { c.grads.dk.dtype = DType::float64; },
     {"dk", "float64", "float32"},
     Kind::type},
    {"DqIsQ", kBackward, [](auto& c) { c.grads.dq.data = c.in.q.data; }, {"dq", "overlaps", "q"}},
    {"DkIsDv", kBackward, [](auto& c) { c.grads.dk.data = c.grads.dv.data; }, {"overlaps", "dk", "dv"}},
    {"DqIsDout", kBackward, [](auto& c) { c.grads.dq.data = c.cotangents.dout.data; }, {"dq", "overlaps", "dout"}},
    {"DvRowsShareMemory", kBackward, [](auto& c) { c.grads.dv.stride[2] = 0; }, {"dv", "strides"}},
    {"DbiasWithoutBias", kBackward, [](auto& c) { c.in.bias = {}; }, {"dbias", "no bias"}},
    {"DbiasShape", kBackward, [](auto& c) { c.grads.dbias.shape[0] = 1; }, {"dbias", "shape of bias", "(2, 4, 4, 6)"}},
    {"DsinksWithoutSinks", kBackward, [](auto& c) { c.in.sinks = {}; }, {"dsinks", "no sinks"}},
};

const BadCall kBadDecodeCalls[] = {
    {"PackedLayout", kDecode, [](auto& c) { c.options.layout = Layout::thd; }, {"decode", "bhsd", "thd"}},
    {"TopLeft", kDecode, [](auto& c) { c.options.mask = Mask::top_left(); }, {"decode", "bottom-right", "top_left"}},
    {"LengthsMissing", kDecode, [](auto& c) { c.decode.cache_seqlens = {}; }, {"cache_seqlens", "missing"}},
    {"LengthsDtype",
     kDecode,
     [](auto& c) { c.decode.cache_seqlens.dtype = DType::int64; },
     {"cache_seqlens", "int64", "int32"},
     Kind::type},
    {"LengthNegative",
     kDecode,
     [](auto& c) { poke(c.tensors.seqused_k, {1}, -1); },
     {"cache_seqlens[1] is -1", "at least 0"}},
    {"AppendOverflowsTheCache",
     kDecode,
     [](auto& c) { poke(c.tensors.seqused_k, {0}, 11); },
     {"cache_seqlens[0] is 11", "2 keys are new", "12 keys"}},
    {"LengthBeyondTheCache",
     "decode fp32 b2 q2 k12 h4/2 d8",
     [](auto& c) { poke(c.tensors.seqused_k, {0}, 13); },
     {"cache_seqlens[0] is 13", "12 keys"}},
    {"CacheBatch",
     kDecode,
     [](auto& c) { c.decode.k_cache.shape[0] = c.decode.v_cache.shape[0] = 1; },
     {"batch size 1", "2", "block_table"}},
    {"CachesDiffer", kDecode, [](auto& c) { c.decode.v_cache.shape[2] = 11; }, {"k_cache", "v_cache", "11"}},
    {"CacheDtype",
     kDecode,
     [](auto& c) { c.decode.v_cache.dtype = DType::float16; },
     {"v_cache", "float16", "float32"},
     Kind::type},
    {"CacheHeads",
     kDecode,
     [](auto& c) { c.decode.k_cache.shape[1] = c.decode.v_cache.shape[1] = 3; },
     {"4 heads", "3", "multiple"}},
    {"OnlyNewKeys", kDecode, [](auto& c) { c.decode.v_new = {}; }, {"k_new", "v_new", "together"}},
    {"NewValuesShape", kDecode, [](auto& c) { c.decode.v_new.shape[2] = 1; }, {"v_new", "(2, 2, 2, 8)"}},
    {"NewKeysOverlapTheCache",
     kDecode,
     [](auto& c) { c.decode.k_new.data = c.decode.k_cache.data; },
     {"overlaps", "k_new", "k_cache"}},
    {"OutOverlapsTheCache",
     kDecode,
     [](auto& c) { c.out.out.data = c.decode.v_cache.data; },
     {"overlaps", "v_cache", "out"}},
    {"OnlyCosines", kDecode, [](auto& c) { c.decode.rotary.sin = {}; }, {"rotary_cos", "rotary_sin", "together"}},
    {"RotaryWiderThanTheHead",
     kDecode,
     [](auto& c) {
       c.decode.rotary.cos.shape[1] = c.decode.rotary.sin.shape[1] = 5;
       c.decode.rotary.cos.stride[0] = c.decode.rotary.sin.stride[0] = 5;
     },
     {"rotary_dim", "head_dim 8", "(12, 5)"}},
    {"RotaryTablesTooShort",
     kDecode,
     [](auto& c) { c.decode.rotary.cos.shape[0] = c.decode.rotary.sin.shape[0] = 11; },
     {"11 positions", "12"}},
    {"TableDtype",
     kPaged,
     [](auto& c) { c.decode.block_table.dtype = DType::int64; },
     {"block_table", "int64", "int32"},
     Kind::type},
    {"TableShape", kPaged, [](auto& c) { c.decode.block_table.rank = 1; }, {"block_table", "(2, max_pages)"}},
    {"PageNegative",
     kPaged,
     [](auto& c) { poke(c.tensors.block_table, {0, 1}, -1); },
     {"block_table[0][1] is -1", "0 to 5"}},
    {"PageBeyondTheCache",
     kPaged,
     [](auto& c) { poke(c.tensors.block_table, {0, 2}, 6); },
     {"block_table[0][2] is 6", "0 to 5"}},
    {"PagedAppendOverflows",
     kPaged,
     [](auto& c) { poke(c.tensors.seqused_k, {0}, 12); },
     {"cache_seqlens[0] is 12", "12 keys"}},
};

class RefusedCall : public ::testing::TestWithParam<BadCall> {
 protected:
  /// Runs the spoilt call; returns what the exception says, after judging its type.
  static std::string message_of(const PublicCall& call, Kind kind) {
    try {
      call.run();
    } catch (const InvalidType& error) {
      EXPECT_EQ(kind, Kind::type) << error.what();
      return error.what();
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(kind, Kind::value) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "the call was not refused";
    return {};
  }
};

TEST_P(RefusedCall, IsRefusedWithWordsAndWritesNothing) {
  const BadCall& bad = GetParam();
  PublicCall call(bad.line);
  ASSERT_TRUE(call.supports().ok) << "the unspoilt call must be good: " << call.supports().why;
  bad.spoil(call);
  const auto before = call.tensors.output_bytes();
  const std::string message = message_of(call, bad.kind);
  for (const std::string& word : bad.words)
    EXPECT_NE(message.find(word), std::string::npos) << word << " not in: " << message;
  call.tensors.download();
  EXPECT_EQ(call.tensors.output_bytes(), before);
}

/// Only memory and lengths are out of sight for `supports`; all else it says in the same words as the call.
TEST_P(RefusedCall, IsToldBySupportsWithoutThrowing) {
  const BadCall& bad = GetParam();
  PublicCall call(bad.line);
  bad.spoil(call);
  Support support;
  ASSERT_NO_THROW(support = call.supports());
  EXPECT_TRUE(support.ok || support.why == message_of(call, bad.kind)) << support.why;
}

const auto name_of_bad_call = [](const ::testing::TestParamInfo<BadCall>& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Forward, RefusedCall, ::testing::ValuesIn(kBadForwardCalls), name_of_bad_call);
INSTANTIATE_TEST_SUITE_P(Lengths, RefusedCall, ::testing::ValuesIn(kBadLengthCalls), name_of_bad_call);
INSTANTIATE_TEST_SUITE_P(Backward, RefusedCall, ::testing::ValuesIn(kBadBackwardCalls), name_of_bad_call);
INSTANTIATE_TEST_SUITE_P(Decode, RefusedCall, ::testing::ValuesIn(kBadDecodeCalls), name_of_bad_call);

detail::Call validated(const PublicCall& c, Check check) {
  if (c.phase == Phase::decode) return detail::validate(c.decode, c.out, c.options, check, nullptr);
  if (c.phase == Phase::backward)
    return detail::validate(c.in, c.out, c.cotangents, c.grads, c.options, check, nullptr);
  return detail::validate(c.in, c.out, c.options, check, nullptr);
}

/// Packed rows bound the length of every sequence, so a line that says more than that cannot come back.
bool bounds_are_reached(const detail::Problem& p) {
  return !(p.flags & detail::kVarlen) || (p.size.total_q >= p.size.seqlen_q && p.size.total_k >= p.size.seqlen_k);
}

TEST(Validate, MakesTheProblemOfTheLine) {
  for (const std::string line : kCaseLines)
    for (const Variant& variant : all_variants()) {
      const bool float8 = line.find("descale") != std::string::npos || line.find("out_") != std::string::npos;
      const std::size_t space = line.find(' ');
      PublicCall call(line.substr(0, space) + (float8 ? " e4m3" : " fp16") + line.substr(space), {}, variant);
      detail::Problem expected = call.tensors.problem;
      if (!bounds_are_reached(expected)) continue;
      detail::Problem actual = validated(call, Check::everything).problem;
      actual.flags &= ~detail::kUnaligned;
      EXPECT_EQ(to_line(actual), to_line(expected));
      EXPECT_EQ(actual, expected);
    }
}

TEST(Validate, PlanningLooksAtNoMemory) {
  PublicCall call(kForward);
  for (TensorView* t : {&call.in.q, &call.in.k, &call.in.v, &call.out.out, &call.out.lse}) t->data = nullptr;
  EXPECT_NO_THROW(validated(call, Check::shapes));
  EXPECT_TRUE(call.supports().ok) << call.supports().why;
}

TEST(Validate, IgnoresStridesOfDimensionsOfSizeOne) {
  PublicCall call("fwd fp32 b1 q4 k6 h1 d1 lse");
  call.in.q.stride[0] = call.in.k.stride[1] = -17;
  call.out.out.stride[3] = 1000;
  EXPECT_NO_THROW(call.run());
  call.tensors.download();
  call.tensors.check();
}

TEST(Validate, NamesUnalignedRows) {
  PublicCall aligned("fwd fp16 b1 q4 k6 h1 d8");
  EXPECT_FALSE(validated(aligned, Check::shapes).problem.flags & detail::kUnaligned);
  PublicCall odd("fwd fp16 b1 q4 k6 h1 d7");
  EXPECT_TRUE(validated(odd, Check::shapes).problem.flags & detail::kUnaligned);
  PublicCall shifted("fwd fp16 b1 q4 k6 h1 d8");
  shifted.in.k.data = static_cast<char*>(shifted.in.k.data) + 2;
  EXPECT_TRUE(validated(shifted, Check::shapes).problem.flags & detail::kUnaligned);
}

TEST(Validate, CausalIsPlainWhereQueriesAndKeysAreCutAlike) {
  PublicCall call("fwd fp32 b4 q4 k4 h2 d8 varlen9/9 causal_br");
  call.in.sequences.cu_seqlens_k = call.in.sequences.cu_seqlens_q;
  call.options.mask = Mask::causal();
  EXPECT_EQ(validated(call, Check::shapes).problem.causal, detail::CausalRule::bottom_right);
}

}  // namespace
}  // namespace flashcore::testing
