// tuned: files of tuned kernels, which of their lines hold for a problem, and what explain says of them.
#include "tuned.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "flashcore/error.h"
#include "flashcore/flashcore.h"
#include "kernels/kernel.h"
#include "plan.h"
#include "support/environment.h"

namespace flashcore::testing {
namespace {

using namespace flashcore::detail;

constexpr const char* kLine = "fwd fp16 b1 q8 k8 h1 d64";

/// A file that is gone with the test, and with it what was loaded.
class TunedFile {
 public:
  explicit TunedFile(const std::string& text) {
    path_ = std::filesystem::temp_directory_path() /
            ("flashcore_tuned_test_" + std::to_string(::getpid()) + "_" + std::to_string(++count_));
    std::ofstream(path_) << text;
  }
  ~TunedFile() {
    forget_tuned();
    std::filesystem::remove(path_);
  }

  std::string path() const { return path_; }

 private:
  static inline int count_ = 0;
  std::string path_;
};

std::string file_of(const std::string& lines) { return "flashcore-tuned 1\n[imaginary]\n" + lines; }

DeviceInfo imaginary(const char* name = "imaginary") {
  DeviceInfo info;
  info.name = name;
  return info;
}

std::string chosen(const std::string& line, const DeviceInfo& device = imaginary()) {
  return kernel_word(make_plan(parse_problem(line), device));
}

std::string error_of(const std::string& text) {
  const TunedFile file(text);
  try {
    read_tuned(file.path());
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()).rfind(file.path(), 0), 0u) << error.what();
    return std::string(error.what()).substr(file.path().size());
  }
  return "was read";
}

TEST(Tuned, KernelIsChosenForItsProblemAndDeviceOnly) {
  const TunedFile file(file_of(std::string(kLine) + " -> cpu.reference\n"));
  load_tuned(file.path());
  EXPECT_EQ(chosen(kLine), "cpu.reference");
  EXPECT_NE(chosen("fwd fp16 b1 q8 k9 h1 d64"), "cpu.reference");
  EXPECT_NE(chosen("fwd fp16 b1 q8 k8 h1 d64 lse"), "cpu.reference");
  EXPECT_NE(chosen(kLine, imaginary("another")), "cpu.reference");
  forget_tuned();
  EXPECT_NE(chosen(kLine), "cpu.reference");
}

TEST(Tuned, LineCountsInCanonicalFormWithoutItsSeed) {
  const TunedFile file(file_of("fwd d64 h1 k8 q8 b1 causal_tl dropout0.5 seed7 fp16 -> cpu.reference # note\n"));
  const std::vector<TunedKernel> entries = read_tuned(file.path());
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_EQ(entries[0].device_name, "imaginary");
  EXPECT_EQ(entries[0].problem_line, "fwd fp16 b1 q8 k8 h1 d64 causal dropout0.5");
  EXPECT_EQ(entries[0].kernel, "cpu.reference");
  EXPECT_EQ(entries[0].note, "note");
  load_tuned(file.path());
  for (const char* seed : {"", " seed1", " seed99"})
    EXPECT_EQ(chosen(std::string("fwd fp16 b1 q8 k8 h1 d64 causal dropout0.5") + seed), "cpu.reference");
}

TEST(Tuned, SettingReachesThePlan) {
  constexpr const char* kDecode = "decode fp32 b1 q1 k4096 h1 d64";
  const TunedFile file(file_of(std::string(kDecode) + " -> cpu.decode:splits16\n"));
  ASSERT_NE(make_plan(parse_problem(kDecode), imaginary()).splits, 16);
  load_tuned(file.path());
  EXPECT_EQ(chosen(kDecode), "cpu.decode:splits16");
  EXPECT_EQ(make_plan(parse_problem(kDecode), imaginary()).splits, 16);
}

TEST(Tuned, KernelAskedForComesFirst) {
  const TunedFile file(file_of(std::string(kLine) + " -> cpu.reference\n"));
  load_tuned(file.path());
  EXPECT_STREQ(make_plan(parse_problem(kLine), imaginary(), "cpu.flash").kernel->name, "cpu.flash");
  const Environment variable("FLASHCORE_KERNEL", "cpu.flash");
  EXPECT_EQ(chosen(kLine), "cpu.flash");
  EXPECT_NE(explain_plan(parse_problem(kLine), imaginary()).find("another was asked for"), std::string::npos);
}

TEST(Tuned, KernelThatCannotIsPassedOverAndExplained) {
  const std::string usual = chosen(kLine);
  for (const auto& [kernel, why] : std::vector<std::pair<std::string, std::string>>{
           {"cpu.gone", "this build has no such kernel for it"},
           {"cpu.decode:splits9", "has no setting \"splits9\" for this problem; it has splits1"},
           {"cpu.reference:fast", "has no setting \"fast\" for this problem; it has none"}}) {
    const TunedFile file(file_of(std::string(kLine) + " -> " + kernel + "\n"));
    load_tuned(file.path());
    EXPECT_EQ(chosen(kLine), usual);
    const std::string text = explain_plan(parse_problem(kLine), imaginary());
    EXPECT_NE(text.find("tuned:     not " + kernel + " of " + file.path() + ": " + why), std::string::npos) << text;
  }
}

TEST(Tuned, KernelIsExplained) {
  const TunedFile file(file_of(std::string(kLine) + " -> cpu.reference\n"));
  load_tuned(file.path());
  const std::string text = explain_plan(parse_problem(kLine), imaginary());
  EXPECT_NE(text.find("kernel:    cpu.reference\ntuned:     by " + file.path()), std::string::npos) << text;
  EXPECT_NE(text.find("cpu.flash: fits, but another one is tuned"), std::string::npos) << text;
}

TEST(TunedFiles, ThatCannotBeReadAreRefusedWithTheirLine) {
  EXPECT_EQ(error_of("{}").rfind(":1: no file of tuned kernels", 0), 0u);
  EXPECT_EQ(error_of("# nothing\n").rfind(":1: the file is empty", 0), 0u);
  EXPECT_EQ(
      error_of("flashcore-tuned 1\n" + std::string(kLine) + " -> cpu.flash\n").rfind(":2: the name of a device", 0),
      0u);
  EXPECT_EQ(error_of(file_of("fwd fp16 -> cpu.flash\n")).rfind(":3: problem line \"fwd fp16\": a size is missing", 0),
            0u);
  EXPECT_EQ(error_of(file_of("\n[open\n")).rfind(":4: a device is [name]", 0), 0u);
  EXPECT_EQ(error_of(file_of(std::string(kLine) + " = cpu.flash\n")).rfind(":3: neither", 0), 0u);
  EXPECT_EQ(error_of(file_of(std::string(kLine) + " -> cpu flash\n")).rfind(":3: one word is a kernel", 0), 0u);
  EXPECT_EQ(error_of(file_of(std::string(kLine) + " -> a\n" + kLine + " seed3 -> b\n")).rfind(":4: \"", 0), 0u);
}

TEST(TunedFiles, ThatAreMissingOrFoldersAreRefusedAndWhatWasLoadedStays) {
  const TunedFile file(file_of(std::string(kLine) + " -> cpu.reference\n"));
  load_tuned(file.path());
  EXPECT_THROW(load_tuned(file.path() + ".missing"), InvalidArgument);
  EXPECT_THROW(load_tuned(std::filesystem::temp_directory_path()), InvalidArgument);
  EXPECT_EQ(chosen(kLine), "cpu.reference");
}

TEST(TunedFiles, CanBeReplacedWhileCallsChoose) {
  const TunedFile one(file_of(std::string(kLine) + " -> cpu.reference\n"));
  const TunedFile two(file_of(std::string(kLine) + " -> cpu.decode\n"));
  load_tuned(one.path());
  std::atomic<bool> done = false;
  std::thread other([&] {
    while (!done) {
      const std::string now = chosen(kLine);
      EXPECT_TRUE(now == "cpu.reference" || now == "cpu.decode") << now;
    }
  });
  for (int i = 0; i < 200; ++i) load_tuned(i % 2 ? one.path() : two.path());
  done = true;
  other.join();
}

TEST(KernelChoices, BeginWithTheOneThatRunsAndCanAllBePlanned) {
  for (const char* line : {kLine, "bwd fp32 b1 q8 k8 h1 d64", "decode bf16 b2 q1 k5000 h4/2 d64"}) {
    const std::vector<std::string> words = kernel_choices(line, {});
    ASSERT_FALSE(words.empty());
    const DeviceInfo& device = device_info({});
    EXPECT_EQ(words.front(), kernel_word(make_plan(parse_problem(line), device)));
    for (const std::string& word : words)
      EXPECT_EQ(kernel_word(make_plan(parse_problem(line), device, word)), word) << line;
  }
}

TEST(KernelSettings, ThatARowLacksAreRefusedWithThoseThatItHas) {
  try {
    make_plan(parse_problem("decode fp32 b1 q1 k256 h1 d64"), imaginary(), "cpu.decode:splits3");
    FAIL() << "was planned";
  } catch (const Unsupported& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("it has splits1, splits2, splits4"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace flashcore::testing
