// Chooses the instruction set that the CPU kernels run with.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string>
#include <string_view>

#include "flashcore/error.h"

namespace flashcore::cpu {

#if defined(__x86_64__)
extern const Isa kBaselineIsa;
extern const Isa kAvx2Isa;
extern const Isa kAvx512Isa;
extern const Isa kAmxIsa;
#elif defined(__aarch64__)
extern const Isa kNeonIsa;
#endif

namespace {

struct Choice {
  const Isa* isa;
  bool runs_here;
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the registers. Every processor with AVX2 and FMA
// has F16C.
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

/// Whether the processor has AMX for bfloat16 and the kernel lets this process use its registers. To ask is to be
/// granted them.
[[maybe_unused]] bool has_amx() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  unsigned int a = 0;
  unsigned int b = 0;
  unsigned int c = 0;
  unsigned int d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles_of_bfloat16 = (d >> 22 & 1) && (d >> 24 & 1);
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool bfloat16 = a >> 5 & 1;
  return has_avx512() && tiles_of_bfloat16 && bfloat16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

/// Those that are built, best first.
const Choice kChoices[] = {
#ifdef FLASHCORE_ISA_AMX
    {&kAmxIsa, has_amx()},
#endif
#ifdef FLASHCORE_ISA_AVX512
    {&kAvx512Isa, has_avx512()},
#endif
#ifdef FLASHCORE_ISA_AVX2
    {&kAvx2Isa, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
#endif
    {&kBaselineIsa, true},
};
#elif defined(__aarch64__)
const Choice kChoices[] = {{&kNeonIsa, true}};
#else
#error "the CPU kernels know x86-64 and aarch64"
#endif

std::string names_of_choices() {
  std::string names;
  for (const Choice& choice : kChoices)
    if (choice.runs_here) names += (names.empty() ? "" : ", ") + std::string(choice.isa->name);
  return names;
}

}  // namespace

const Isa& chosen_isa(bool parts) {
  const char* wanted = std::getenv("FLASHCORE_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (const Choice& choice : kChoices) {
    if (wanted ? std::string_view(wanted) != choice.isa->name : choice.isa->in_parts && !parts) continue;
    if (choice.runs_here) return *choice.isa;
    if (wanted)
      throw InvalidArgument("FLASHCORE_CPU_ISA is \"" + std::string(wanted) +
                            "\", which this processor does not have; it has " + names_of_choices());
  }
  throw InvalidArgument("FLASHCORE_CPU_ISA is \"" + std::string(wanted) + "\", which is unknown; this processor has " +
                        names_of_choices());
}

std::vector<const Isa*> usable_isas() {
  const char* wanted = std::getenv("FLASHCORE_CPU_ISA");
  if (wanted && *wanted) return {&chosen_isa()};
  std::vector<const Isa*> isas;
  for (const Choice& choice : kChoices)
    if (choice.runs_here) isas.push_back(choice.isa);
  return isas;
}

}  // namespace flashcore::cpu
