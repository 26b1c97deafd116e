// attention: the public calls from outside. Layouts and views, plans, support and explanations, the environment.
#include "flashcore/attention.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "support/bounds.h"
#include "support/environment.h"
#include "support/float_formats.h"
#include "support/public_call.h"

namespace flashcore::testing {
namespace {

class OnEachDevice : public ::testing::TestWithParam<Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, OnEachDevice, ::testing::ValuesIn(test_devices()),
                         [](const auto& info) { return test_name(info.param); });

constexpr const char* kCalls[] = {"fwd fp16 b2 q20 k33 h4/2 d16 causal_br lse",
                                  "bwd fp32 b2 q20 k33 h4/2 d16 causal_br",
                                  "decode bf16 b3 q2 k32 h4/2 d16 page8 append2 causal lse"};

/// Counts what passes through to the plain resource of a device.
class CountingResource final : public MemoryResource {
 public:
  explicit CountingResource(Device device) : upstream_(system_resource(device)) {}
  void* allocate(std::size_t bytes, Stream stream) override {
    ++allocations;
    return upstream_.allocate(bytes, stream);
  }
  void deallocate(void* data, std::size_t bytes, Stream stream) noexcept override {
    ++deallocations;
    upstream_.deallocate(data, bytes, stream);
  }
  int allocations = 0;
  int deallocations = 0;

 private:
  MemoryResource& upstream_;
};

/// Workspaces of `device` come from a counting resource for the length of a scope.
struct Counted {
  explicit Counted(Device where) : device(where), resource(std::make_shared<CountingResource>(where)) {
    set_workspace_resource(device, resource);
  }
  ~Counted() { set_workspace_resource(device, nullptr); }
  Device device;
  std::shared_ptr<CountingResource> resource;
};

// ---- views ----------------------------------------------------------------------------------------------------------

/// q, k and v as slices of one packed tensor (batch, seqlen, 3, heads, head_dim); out as a fourth slice beside them.
TEST_P(OnEachDevice, TakesSlicesOfOnePackedTensor) {
  constexpr std::int64_t kBatch = 2, kSeq = 9, kHeads = 2, kDim = 8;
  AttentionCase plain(detail::parse_problem("fwd fp32 b2 q9 k9 h2 d8"), GetParam());
  plain.run();
  TestTensor packed(DType::float32, GetParam(), {kBatch * kSeq, 4, kHeads, kDim});
  for_each_index(packed.view(), [&](const Index& at) {
    const std::int64_t b = at[0] / kSeq, s = at[0] % kSeq;
    const Array4* source[] = {&plain.oracle.q, &plain.oracle.k, &plain.oracle.v};
    packed.set(at, at[1] < 3 ? (*source[at[1]])(b, at[2], s, at[3]) : 77);
  });
  packed.upload();
  const auto slice = [&](std::int64_t which) {
    TensorView t = packed.view();
    t.rank = 4;
    t.data = static_cast<float*>(t.data) + which * kHeads * kDim;
    t.shape = {kBatch, kHeads, kSeq, kDim};
    t.stride = {kSeq * 4 * kHeads * kDim, kDim, 4 * kHeads * kDim, 1};
    return t;
  };
  attention_forward({.q = slice(0), .k = slice(1), .v = slice(2)}, {.out = slice(3)});
  packed.download();
  for_each_index(plain.out.view(), [&](const Index& at) {
    ASSERT_EQ(packed.get({at[0] * kSeq + at[2], 3, at[1], at[3]}), plain.out.get(at));
  });
}

TEST_P(OnEachDevice, TakesKeysInReverseByNegativeStrides) {
  PublicCall call("fwd fp32 b2 q5 k7 h2 d8 lse", GetParam());
  for (TensorView* t : {&call.in.k, &call.in.v}) {
    t->data = static_cast<float*>(t->data) + (t->shape[2] - 1) * t->stride[2];
    t->stride[2] = -t->stride[2];
  }
  call.run();
  call.tensors.download();
  call.tensors.check();  // the order of the keys does not matter without positions
}

TEST_P(OnEachDevice, TakesOneKeyHeadBroadcastByAStrideOfZero) {
  PublicCall call("fwd fp32 b2 q5 k7 h4/1 d8 lse", GetParam());
  for (TensorView* t : {&call.in.k, &call.in.v}) {
    t->shape[1] = 4;
    t->stride[1] = 0;
  }
  call.run();
  call.tensors.download();
  call.tensors.check();
}

/// Two batches more than 2^31 elements apart.
TEST_P(OnEachDevice, ReachesElementsBeyondTwoToTheThirtyOne) {
  constexpr std::int64_t kFar = (std::int64_t(1) << 31) + 64;
  constexpr std::int64_t kRows = 4, kDim = 8, kEach = kRows * kDim;
  AttentionCase plain(detail::parse_problem("fwd fp16 b2 q4 k4 h1 d8"), GetParam());
  plain.run();
  DeviceArray memory(static_cast<std::size_t>(kFar + 4 * kEach) * 2, GetParam());
  const auto view = [&](std::int64_t which) {
    TensorView t = plain.q.view();
    t.data = static_cast<std::uint16_t*>(memory.data()) + which * kEach;
    t.stride = {kFar, kEach, kDim, 1};
    return t;
  };
  const TestTensor* sources[] = {&plain.q, &plain.k, &plain.v};
  std::vector<std::uint16_t> block(kEach);
  for (std::int64_t which = 0; which < 3; ++which)
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t n = 0; n < kEach; ++n)
        block[static_cast<std::size_t>(n)] =
            static_cast<std::uint16_t>(encode(DType::float16, sources[which]->get({b, 0, n / kDim, n % kDim})));
      memory.upload_part(static_cast<std::size_t>(b * kFar + which * kEach) * 2, block.data(), kEach * 2);
    }
  attention_forward({.q = view(0), .k = view(1), .v = view(2)}, {.out = view(3)});
  for (std::int64_t b = 0; b < 2; ++b) {
    memory.download_part(static_cast<std::size_t>(b * kFar + 3 * kEach) * 2, block.data(), kEach * 2);
    for (std::int64_t n = 0; n < kEach; ++n)
      ASSERT_EQ(decode(DType::float16, block[static_cast<std::size_t>(n)]), plain.out.get({b, 0, n / kDim, n % kDim}));
  }
}

TEST_P(OnEachDevice, DropsTheSameWeightsForTheSameSeedAlone) {
  const auto out_bytes = [](const char* line, Device device) {
    AttentionCase c(detail::parse_problem(line), device);
    c.run();
    return c.out.bytes();
  };
  const auto first = out_bytes("fwd fp32 b1 q16 k16 h2 d8 dropout0.5 seed1", GetParam());
  EXPECT_EQ(first, out_bytes("fwd fp32 b1 q16 k16 h2 d8 dropout0.5 seed1", GetParam()));
  EXPECT_NE(first, out_bytes("fwd fp32 b1 q16 k16 h2 d8 dropout0.5 seed2", GetParam()));
}

// ---- plans ----------------------------------------------------------------------------------------------------------

TEST_P(OnEachDevice, PlanRunsAsTheCallDoesAndMayRunAgain) {
  for (const char* line : kCalls) {
    SCOPED_TRACE(line);
    AttentionCase direct(detail::parse_problem(line), GetParam());
    direct.run();
    PublicCall call(line, GetParam());
    const AttentionPlan plan = call.plan();
    const DeviceArray workspace(plan.workspace_bytes(), GetParam());
    for (int times = 0; times < 2; ++times) {
      call.run(plan, workspace.data());
      call.tensors.download();
      call.tensors.check();
      EXPECT_EQ(call.tensors.output_bytes(), direct.output_bytes());
    }
  }
}

TEST_P(OnEachDevice, PlanNeverAllocatesInRun) {
  for (const char* line : kCalls) {
    PublicCall call(line, GetParam());
    const AttentionPlan plan = call.plan();
    const DeviceArray workspace(plan.workspace_bytes(), GetParam());
    const Counted counted(GetParam());
    call.run(plan, workspace.data());
    EXPECT_EQ(counted.resource->allocations, 0) << line;
  }
}

TEST_P(OnEachDevice, CallTakesItsWorkspaceFromTheResourceAndGivesItBack) {
  for (const char* line : kCalls) {
    PublicCall call(line, GetParam());
    const std::size_t bytes = call.plan().workspace_bytes();
    const Counted counted(GetParam());
    call.run();
    EXPECT_EQ(counted.resource->allocations, bytes > 0 ? 1 : 0) << line;
    EXPECT_EQ(counted.resource->deallocations, counted.resource->allocations) << line;
  }
}

TEST_P(OnEachDevice, PlanTellsItsKernelAndItself) {
  PublicCall call(kCalls[0], GetParam());
  const AttentionPlan plan = call.plan();
  EXPECT_EQ(plan.kernel(), call.supports().kernel);
  EXPECT_EQ(plan.workspace_bytes() % 256, 0u);
  for (const std::string& part :
       {std::string(kCalls[0]), plan.kernel(), name_of(GetParam()), std::to_string(plan.workspace_bytes()) + " bytes"})
    EXPECT_NE(plan.describe().find(part), std::string::npos) << part << " not in: " << plan.describe();
}

TEST_P(OnEachDevice, PlanRefusesTensorsOfAnotherProblem) {
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8", GetParam());
  const AttentionPlan plan = call.plan();
  PublicCall other("fwd fp32 b2 q5 k6 h2 d8", GetParam());
  const auto before = other.tensors.output_bytes();
  try {
    other.run(plan, nullptr);
    FAIL() << "was run";
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("q6 k6"), std::string::npos) << message;
    EXPECT_NE(message.find("q5 k6"), std::string::npos) << message;
  }
  other.tensors.download();
  EXPECT_EQ(other.tensors.output_bytes(), before);
}

TEST_P(OnEachDevice, PlanIsForOnePhase) {
  PublicCall forward("fwd fp32 b2 q6 k6 h2 d8", GetParam());
  PublicCall backward("bwd fp32 b2 q6 k6 h2 d8", GetParam());
  EXPECT_THROW(backward.run(forward.plan(), nullptr), InvalidArgument);
}

TEST_P(OnEachDevice, PlanThatNeedsAWorkspaceRefusesNull) {
  PublicCall call(kCalls[1], GetParam());
  const AttentionPlan plan = call.plan();
  if (plan.workspace_bytes() == 0) GTEST_SKIP() << plan.kernel() << " needs no workspace";
  EXPECT_THROW(call.run(plan, nullptr), InvalidArgument);
}

TEST_P(OnEachDevice, PlanOutlivesTheOptionsItWasMadeWith) {
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8 lse", GetParam());
  auto name = std::make_unique<std::string>(call.supports().kernel);
  call.options.kernel = *name;
  const AttentionPlan plan = call.plan();
  name->assign(name->size(), '?');
  name.reset();
  const DeviceArray workspace(plan.workspace_bytes(), GetParam());
  call.run(plan, workspace.data());
  call.tensors.download();
  call.tensors.check();
}

TEST(AttentionPlans, MayBeRunByManyThreads) {
  std::vector<std::unique_ptr<PublicCall>> calls;
  for (int n = 0; n < 4; ++n) calls.push_back(std::make_unique<PublicCall>("fwd fp32 b2 q40 k40 h4 d16 causal lse"));
  const AttentionPlan plan = calls[0]->plan();
  std::vector<std::thread> threads;
  for (auto& call : calls)
    threads.emplace_back([&plan, &call] {
      const DeviceArray workspace(plan.workspace_bytes(), Device{});
      for (int times = 0; times < 20; ++times) call->run(plan, workspace.data());
    });
  for (std::thread& thread : threads) thread.join();
  for (auto& call : calls) {
    call->tensors.download();
    call->tensors.check();
  }
}

// ---- support and explanation ----------------------------------------------------------------------------------------

TEST_P(OnEachDevice, SupportsNamesTheKernelThatRuns) {
  for (const char* line : kCalls) {
    PublicCall call(line, GetParam());
    const Support support = call.supports();
    EXPECT_TRUE(support.ok) << support.why;
    EXPECT_EQ(support.why, "");
    EXPECT_EQ(support.kernel, call.plan().kernel());
  }
}

TEST_P(OnEachDevice, SupportsSaysWhyNoKernelRunsIt) {
  PublicCall call("bwd e4m3 b1 q4 k4 h1 d16", GetParam());
  const Support support = call.supports();
  EXPECT_FALSE(support.ok);
  EXPECT_EQ(support.kernel, "");
  try {
    call.run();
    FAIL() << "was run";
  } catch (const Unsupported& error) {
    EXPECT_EQ(support.why, error.what());
  }
}

TEST_P(OnEachDevice, ExplainTellsLineKernelAndWorkspace) {
  PublicCall call(kCalls[0], GetParam());
  const std::string text = explain(call.in, call.out, call.options);
  for (const std::string& part :
       {std::string(kCalls[0]), call.plan().kernel(), std::string("workspace"), name_of(GetParam())})
    EXPECT_NE(text.find(part), std::string::npos) << part << " not in:\n" << text;
  EXPECT_EQ(explain(kCalls[0], GetParam()), text) << "the line alone explains as much";
}

TEST_P(OnEachDevice, ExplainKnowsDecode) {
  PublicCall call(kCalls[2], GetParam());
  const std::string text = explain(call.decode, call.out, call.options);
  EXPECT_NE(text.find(canonical_problem_line(kCalls[2])), std::string::npos) << text;
}

TEST_P(OnEachDevice, ExplainKnowsGradients) {
  PublicCall call(kCalls[1], GetParam());
  const std::string text = explain(call.in, call.out, call.cotangents, call.grads, call.options);
  EXPECT_NE(text.find(canonical_problem_line(kCalls[1])), std::string::npos) << text;
}

TEST(Explain, OfALineTakesAKernelByName) {
  const std::string text = explain("fwd fp32 b1 q4 k4 h1 d8", Device{}, "cpu.reference");
  EXPECT_NE(text.find("kernel:    cpu.reference"), std::string::npos) << text;
}

TEST(Explain, RefusesALineThatCannotBeRead) { EXPECT_THROW(explain("fwd fp16 wobble", Device{}), InvalidArgument); }

TEST(Explain, HelpNamesEveryWordOfTheGrammar) {
  for (const char* word : {"fwd",  "bwd",    "decode", "fp16",      "bf16",         "fp32",   "e4m3",    "varlen",
                           "page", "append", "rotary", "causal_tl", "causal_br",    "window", "softcap", "dropout",
                           "seed", "scale",  "mask",   "bias",      "alibi",        "sinks",  "descale", "lse",
                           "dlse", "dbias",  "dsinks", "seqused",   "deterministic"})
    EXPECT_NE(problem_line_help().find(word), std::string::npos) << word;
}

TEST(Explain, HelpShowsALineThatCanBeRead) {
  const std::string help = problem_line_help();
  const std::size_t begin = help.find("for example: \"") + 14;
  EXPECT_NO_THROW(canonical_problem_line(help.substr(begin, help.rfind('"') - begin)));
}

// ---- the environment ------------------------------------------------------------------------------------------------

TEST_P(OnEachDevice, LogOfPlansIsOneLineWithTheChosenKernel) {
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8", GetParam());
  const Environment variable("FLASHCORE_LOG", "plan");
  ::testing::internal::CaptureStderr();
  call.run();
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 1) << log;
  for (const std::string& part : {std::string("fwd fp32 b2 q6 k6 h2 d8"), call.supports().kernel})
    EXPECT_NE(log.find(part), std::string::npos) << part << " not in: " << log;
}

TEST_P(OnEachDevice, NothingIsLoggedUnasked) {
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8", GetParam());
  const Environment variable("FLASHCORE_LOG", "");
  ::testing::internal::CaptureStderr();
  call.run();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST_P(OnEachDevice, KernelVariableChoosesTheRow) {
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8", GetParam());
  const Environment variable("FLASHCORE_KERNEL", "reference");
  EXPECT_EQ(call.plan().kernel(), test_name(GetParam()) + ".reference");
}

TEST_P(OnEachDevice, KernelVariableOfNoKernelIsRefusedAndWritesNothing) {
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8", GetParam());
  const Environment variable("FLASHCORE_KERNEL", "warp_drive");
  const auto before = call.tensors.output_bytes();
  EXPECT_THROW(call.run(), InvalidArgument);
  call.tensors.download();
  EXPECT_EQ(call.tensors.output_bytes(), before);
}

/// On CUDA lengths stay on the device: wrong ones are clamped, unless FLASHCORE_CHECK=1 asks to look.
TEST_P(OnEachDevice, CheckVariableLooksIntoLengths) {
  PublicCall call("fwd fp32 b2 q4 k6 h2 d8 varlen8/12", GetParam());
  call.tensors.cu_seqlens_k.set({2}, 13);
  call.tensors.cu_seqlens_k.upload();
  call.in.sequences.max_seqlen_k = -1;
  const Environment variable("FLASHCORE_CHECK", "1");
  try {
    call.run();
    FAIL() << "was run";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("cu_seqlens_k[2] is 13"), std::string::npos) << error.what();
  }
}

// ---- CUDA streams ---------------------------------------------------------------------------------------------------

class CudaStreams : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no CUDA device: " << no_device_reason();
  }
  const Device device_{DeviceType::cuda, 0};
};

TEST_F(CudaStreams, WrongLengthsAreClampedToTheTensors) {
  PublicCall call("fwd fp32 b2 q4 k6 h2 d8 varlen8/12 lse", device_);
  call.tensors.cu_seqlens_k.set({2}, 1 << 30);
  call.tensors.cu_seqlens_q.set({1}, -5);
  call.tensors.cu_seqlens_k.upload();
  call.tensors.cu_seqlens_q.upload();
  EXPECT_NO_THROW(call.run());
  call.tensors.download();
  EXPECT_TRUE(call.tensors.out.surroundings_untouched());
}

TEST_F(CudaStreams, CallsRunOnTheStreamGiven) {
  for (const char* line : kCalls) {
    SCOPED_TRACE(line);
    PublicCall call(line, device_);
    const TestStream stream(device_);
    call.run(stream.get());
    stream.synchronize();
    call.tensors.download();
    call.tensors.check();
  }
}

TEST_F(CudaStreams, CallsCanBeCapturedIntoAGraph) {
  for (const char* line : kCalls) {
    SCOPED_TRACE(line);
    PublicCall call(line, device_);
    const TestStream stream(device_);
    const testing::TestGraph graph = stream.capture([&] { call.run(stream.get()); });
    EXPECT_EQ(graph.nodes().others, 0);  // with one that allocates it could be instantiated only once
    stream.replay(graph);
    stream.replay(graph);
    call.tensors.download();
    call.tensors.check();
  }
}

TEST_F(CudaStreams, PlansCanBeCapturedIntoAGraph) {
  for (const char* line : kCalls) {
    SCOPED_TRACE(line);
    PublicCall call(line, device_);
    const AttentionPlan plan = call.plan();
    const DeviceArray workspace(plan.workspace_bytes(), device_);
    const TestStream stream(device_);
    stream.capture_and_replay([&] { call.run(plan, workspace.data(), stream.get()); }, 2);
    call.tensors.download();
    call.tensors.check();
  }
}

TEST(NoCuda, TensorsOnAMissingDeviceAreRefused) {
  if (device_count() > 0) GTEST_SKIP() << "there is a CUDA device";
  PublicCall call("fwd fp32 b2 q6 k6 h2 d8");
  for (TensorView* t : {&call.in.q, &call.in.k, &call.in.v, &call.out.out}) t->device = {DeviceType::cuda, 0};
  EXPECT_ANY_THROW(call.run());
  EXPECT_FALSE(call.supports().ok);
  EXPECT_NE(call.supports().why.find("cuda"), std::string::npos) << call.supports().why;
}

}  // namespace
}  // namespace flashcore::testing
