// plan: pure choice of a row from a problem and a device's properties; needs no device.
#include "plan.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "flashcore/error.h"
#include "flashcore/flashcore.h"
#include "kernels/kernel.h"
#include "registry.h"
#include "support/environment.h"

namespace flashcore::testing {
namespace {

using namespace flashcore::detail;

/// A device that need not exist: make_plan must not ask.
DeviceInfo fake_device(DeviceType type) {
  DeviceInfo info;
  info.device = {type, 0};
  info.name = "imaginary";
  info.compute_major = 9;
  info.multiprocessors = 132;
  info.shared_bytes_per_block = 227 * 1024;
  info.shared_bytes_per_sm = 228 * 1024;
  return info;
}

std::vector<DeviceType> built_types() {
  std::vector<DeviceType> types{DeviceType::cpu};
  if (built_with_cuda()) types.push_back(DeviceType::cuda);
  return types;
}

std::string message_of(const Problem& problem, const DeviceInfo& device, const char* wanted = "") {
  try {
    make_plan(problem, device, wanted);
  } catch (const Unsupported& reason) {
    return reason.what();
  }
  ADD_FAILURE() << "was planned";
  return {};
}

TEST(MakePlan, TakesTheFirstRowThatFits) {
  for (const DeviceType type : built_types())
    for (const char* line : {"fwd fp16 b2 q64 k64 h4/2 d64 causal", "bwd bf16 b2 q64 k64 h4 d64 bias dbias",
                             "decode fp32 b2 q1 k64 h4 d64 page16 append1 rotary8"}) {
      const Problem problem = parse_problem(line);
      const DeviceInfo device = fake_device(type);
      const Plan plan = make_plan(problem, device);
      ASSERT_NE(plan.kernel, nullptr);
      EXPECT_EQ(plan.problem, problem);
      EXPECT_EQ(plan.device, device.device);
      for (const Kernel* row : kernels_of(type)) {
        if (row == plan.kernel) break;
        EXPECT_NE(refusal(*row, problem, device), "") << row->name << " stands before " << plan.kernel->name;
      }
    }
}

TEST(MakePlan, HonoursTheKernelAskedFor) {
  for (const DeviceType type : built_types()) {
    const Plan plan = make_plan(parse_problem("fwd fp16 b1 q8 k8 h1 d64"), fake_device(type), "reference");
    EXPECT_TRUE(matches(plan.kernel->name, "reference")) << plan.kernel->name;
  }
}

TEST(MakePlan, RefusesAKernelThatDoesNotExistAndNamesThoseThatDo) {
  try {
    make_plan(parse_problem("fwd fp16 b1 q8 k8 h1 d64"), fake_device(DeviceType::cpu), "warp_drive");
    FAIL() << "was planned";
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("warp_drive"), std::string::npos) << message;
    EXPECT_NE(message.find("cpu.reference"), std::string::npos) << message;
  }
}

TEST(MakePlan, SaysForEveryRowWhyNot) {
  for (const DeviceType type : built_types()) {
    const Problem float8_backward = parse_problem("bwd e4m3 b1 q8 k8 h1 d64");
    const std::string message = message_of(float8_backward, fake_device(type));
    for (const Kernel* row : kernels_of(type))
      EXPECT_NE(
          message.find("\n  " + std::string(row->name) + ": " + refusal(*row, float8_backward, fake_device(type))),
          std::string::npos)
          << message;
    EXPECT_NE(message.find("bwd e4m3 b1 q8 k8 h1 d64"), std::string::npos) << message;
    EXPECT_NE(message.find("imaginary"), std::string::npos) << message;
  }
}

TEST(MakePlan, NamesTheNearestThingThatWorks) {
  const DeviceInfo device = fake_device(DeviceType::cpu);
  EXPECT_NE(message_of(parse_problem("bwd e4m3 b1 q8 k8 h1 d64"), device).find("the same call in float32 runs"),
            std::string::npos);
}

TEST(MakePlan, WorkspaceSlicesLieApartAndAligned) {
  for (const DeviceType type : built_types()) {
    const Plan plan = make_plan(parse_problem("bwd fp16 b2 q100 k70 h4/2 d40"), fake_device(type));
    EXPECT_EQ(plan.workspace.bytes() % WorkspaceLayout::kAlignment, 0u);
    for (const std::size_t offset : plan.slices) {
      EXPECT_EQ(offset % WorkspaceLayout::kAlignment, 0u);
      EXPECT_LE(offset, plan.workspace.bytes());
    }
  }
}

TEST(MakePlan, BackwardWorkspaceIsLinearInTheLength) {
  for (const DeviceType type : built_types()) {
    const auto bytes = [type](const char* line) {
      return make_plan(parse_problem(line), fake_device(type)).workspace.bytes();
    };
    const std::size_t once = bytes("bwd fp16 b1 q4096 k4096 h8 d64 deterministic");
    const std::size_t twice = bytes("bwd fp16 b1 q8192 k8192 h8 d64 deterministic");
    EXPECT_LE(twice, 2 * once + 64 * WorkspaceLayout::kAlignment);
  }
}

TEST(MakePlan, IsPure) {
  for (const DeviceType type : built_types()) {
    const Problem problem = parse_problem("bwd bf16 b2 q64 k64 h4 d64 causal");
    const Plan one = make_plan(problem, fake_device(type));
    const Plan two = make_plan(problem, fake_device(type));
    EXPECT_EQ(one.kernel, two.kernel);
    EXPECT_EQ(one.splits, two.splits);
    EXPECT_EQ(one.slices, two.slices);
    EXPECT_EQ(one.workspace.bytes(), two.workspace.bytes());
  }
}

DeviceInfo fake_gpu(int major, int minor, std::size_t shared_kib) {
  DeviceInfo info = fake_device(DeviceType::cuda);
  info.compute_major = major;
  info.compute_minor = minor;
  info.shared_bytes_per_block = shared_kib * 1024;
  return info;
}

bool is_run(const Problem& problem, const DeviceInfo& device) {
  return explain_plan(problem, device).find("kernel:    none") == std::string::npos;
}

TEST(Ladder, IsTakenByItsNameOnly) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA rows";
  const Problem problem = parse_problem("fwd fp16 b1 q512 k512 h8 d64 causal lse");
  for (const DeviceInfo& device : {fake_gpu(7, 5, 64), fake_gpu(8, 0, 163), fake_gpu(9, 0, 227)}) {
    if (!is_run(problem, device)) continue;  // this build has no machine code for it
    const std::string chosen = make_plan(problem, device).kernel->name;
    EXPECT_FALSE(matches(chosen, "ladder")) << chosen;
    for (const std::string name : {"cuda.ladder.unfused_wmma", "cuda.ladder.fused_wmma"})
      EXPECT_EQ(make_plan(problem, device, name).kernel->name, name);
  }
}

TEST(Ladder, SaysWhatItDoesNotTake) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA rows";
  const auto message = [](const char* line, const DeviceInfo& device) {
    return message_of(parse_problem(line), device, "ladder.fused_wmma");
  };
  const DeviceInfo hopper = fake_gpu(9, 0, 227);
  EXPECT_NE(message("fwd fp16 b1 q8 k8 h1 d80", hopper).find("head_dim 32, 64 and 128, not 80"), std::string::npos);
  EXPECT_NE(message("fwd fp16 b1 q8 k8 h1 d64 window4,0", hopper).find("does not know window"), std::string::npos);
  EXPECT_NE(message("bwd fp16 b1 q8 k8 h1 d64", hopper).find("does not do backward"), std::string::npos);
  const DeviceInfo turing = fake_gpu(7, 5, 64);
  EXPECT_NE(message("fwd bf16 b1 q8 k8 h1 d64", turing).find("8.0 for bfloat16"), std::string::npos);
}

/// Tall tiles where there are enough of them for every multiprocessor and shared memory holds them, low ones elsewhere.
TEST(Ladder, ChoosesTheHeightOfItsTiles) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA rows";
  const auto height = [](const char* line, std::size_t shared_kib) {
    return make_plan(parse_problem(line), fake_gpu(9, 0, shared_kib), "ladder.fused_wmma").block_m;
  };
  if (!is_run(parse_problem("fwd fp16 b1 q512 k512 h8 d64"), fake_gpu(9, 0, 227)))
    GTEST_SKIP() << "this build has no machine code for it";
  EXPECT_EQ(height("fwd fp16 b1 q512 k512 h8 d64", 227), 32);
  EXPECT_EQ(height("fwd fp16 b4 q512 k512 h8 d64", 227), 64);
  EXPECT_EQ(height("fwd fp16 b4 q512 k512 h8 d64", 64), 64);
  EXPECT_EQ(height("fwd fp16 b4 q512 k512 h8 d128", 64), 32);
}

TEST(SmallProblems, CutTheirKeysAsTheSettingSays) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA rows";
  const Problem problem = parse_problem("fwd fp16 b1 q128 k128 h4 d64");
  const DeviceInfo device = fake_gpu(9, 0, 227);
  if (!is_run(problem, device) || kernel_word(make_plan(problem, device)) != "cuda.sm90.fwd_small")
    GTEST_SKIP() << "this build has no such row";
  EXPECT_EQ(make_plan(problem, device).splits, 2);
  EXPECT_EQ(make_plan(problem, device, "fwd_small:splits1").splits, 1);
  EXPECT_THROW(make_plan(problem, device, "fwd_small:splits3"), Unsupported) << "no kernel has so many keys a part";
}

TEST(KernelVariable, ChoosesTheRowWhereTheCallDoesNot) {
  const Environment variable("FLASHCORE_KERNEL", "cpu.reference");
  const Problem problem = parse_problem("fwd fp16 b1 q8 k8 h1 d64");
  EXPECT_STREQ(make_plan(problem, fake_device(DeviceType::cpu)).kernel->name, "cpu.reference");
}

TEST(KernelVariable, OfAnUnknownKernelIsRefused) {
  const Environment variable("FLASHCORE_KERNEL", "warp_drive");
  const Problem problem = parse_problem("fwd fp16 b1 q8 k8 h1 d64");
  EXPECT_THROW(make_plan(problem, fake_device(DeviceType::cpu)), InvalidArgument);
  EXPECT_NO_THROW(make_plan(problem, fake_device(DeviceType::cpu), "reference")) << "the call's own word comes first";
}

TEST(KernelVariable, ForOneDeviceLeavesTheOtherAlone) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA rows";
  const Environment variable("FLASHCORE_KERNEL", "cuda.reference");
  const Problem problem = parse_problem("fwd fp16 b1 q8 k8 h1 d64");
  EXPECT_EQ(make_plan(problem, fake_device(DeviceType::cpu)).kernel->device, DeviceType::cpu);
  EXPECT_STREQ(make_plan(problem, fake_device(DeviceType::cuda)).kernel->name, "cuda.reference");
}

TEST(ExplainPlan, TellsProblemDeviceKernelAndWorkspace) {
  const std::string text = explain_plan(parse_problem("fwd fp16 b1 q8 k8 h1 d64 causal"), fake_device(DeviceType::cpu));
  for (const char* part : {"fwd fp16 b1 q8 k8 h1 d64 causal", "cpu (imaginary)", "kernel:    cpu.", "workspace: "})
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in\n" << text;
}

TEST(ExplainPlan, ListsEveryOtherRowWithItsReason) {
  const Problem problem = parse_problem("fwd fp16 b1 q8 k8 h1 d64");
  const DeviceInfo device = fake_device(DeviceType::cpu);
  const std::string text = explain_plan(problem, device);
  for (const Kernel* row : kernels_of(DeviceType::cpu)) {
    const std::string reason = refusal(*row, problem, device);
    if (reason.empty()) continue;
    EXPECT_NE(text.find(std::string(row->name) + ": " + reason), std::string::npos) << text;
  }
}

TEST(ExplainPlan, TellsWhyNothingRuns) {
  std::string text;
  EXPECT_NO_THROW(text = explain_plan(parse_problem("bwd e4m3 b1 q8 k8 h1 d64"), fake_device(DeviceType::cpu)));
  EXPECT_NE(text.find("kernel:    none"), std::string::npos) << text;
  EXPECT_NE(text.find("does not know float8_e4m3"), std::string::npos) << text;
}

}  // namespace
}  // namespace flashcore::testing
