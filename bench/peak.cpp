// peak: what the processor can do at most: multiply-adds on registers alone, and reading memory. Prints JSON.
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

/// Independent sums, so that each multiply-add need not wait for the one before: two units, a latency of up to five.
constexpr int kSums = 12;
constexpr int kRepeats = 4096;
constexpr float kStart[kSums] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};  // sums that are alike would be made one
volatile double g_sink;

/// One kind of multiply-add. `run` does kRepeats · kSums instructions (AMX: kRepeats · 4) on registers.
struct Unit {
  const char* name;
  bool runs_here;
  double flops;  // of one `run`
  void (*run)();
};

#if defined(__x86_64__)

void run_sse2() {
  __m128 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm_set1_ps(kStart[i]);
  const __m128 x = _mm_set1_ps(0.5F), y = _mm_set1_ps(1.0F);
  for (int r = 0; r < kRepeats; ++r)
    for (__m128& sum : sums) sum = _mm_add_ps(_mm_mul_ps(sum, x), y);
  for (const __m128& sum : sums) g_sink = _mm_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) void run_avx2() {
  __m256 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm256_set1_ps(kStart[i]);
  const __m256 x = _mm256_set1_ps(0.5F), y = _mm256_set1_ps(1.0F);
  for (int r = 0; r < kRepeats; ++r)
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, x, y);
  for (const __m256& sum : sums) g_sink = _mm256_cvtss_f32(sum);
}

__attribute__((target("avx512f"))) void run_avx512() {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(kStart[i]);
  const __m512 x = _mm512_set1_ps(0.5F), y = _mm512_set1_ps(1.0F);
  for (int r = 0; r < kRepeats; ++r)
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, x, y);
  for (const __m512& sum : sums) g_sink = _mm512_cvtss_f32(sum);
}

__attribute__((target("avx512f,avx512bf16"))) void run_avx512_bf16() {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(kStart[i]);
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5F), _mm512_set1_ps(0.25F));
  for (int r = 0; r < kRepeats; ++r)
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, x, x);
  for (const __m512& sum : sums) g_sink = _mm512_cvtss_f32(sum);
}

/// Linux gives the tile registers only to a process that asks.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile,amx-bf16"))) void run_amx_bf16() {
  static constexpr TileConfig config;  // in memory: GCC's ldtilecfg claims to read 8 bytes of it, not 64
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int r = 0; r < kRepeats; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

std::vector<Unit> units() {
  constexpr double kEach = 2.0 * kRepeats * kSums;
  return {{"sse2", true, 4 * kEach, run_sse2},
          {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), 8 * kEach, run_avx2},
          {"avx512", static_cast<bool>(__builtin_cpu_supports("avx512f")), 16 * kEach, run_avx512},
          {"avx512_bf16", static_cast<bool>(__builtin_cpu_supports("avx512bf16")), 32 * kEach, run_avx512_bf16},
          {"amx_bf16", may_use_tiles(), 2.0 * kRepeats * 4 * 16 * 16 * 32, run_amx_bf16}};
}

#elif defined(__aarch64__)

void run_neon() {
  float32x4_t sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_f32(kStart[i]);
  const float32x4_t x = vdupq_n_f32(0.5F), y = vdupq_n_f32(1.0F);
  for (int r = 0; r < kRepeats; ++r)
    for (float32x4_t& sum : sums) sum = vfmaq_f32(y, sum, x);
  for (const float32x4_t& sum : sums) g_sink = vgetq_lane_f32(sum, 0);
}

std::vector<Unit> units() { return {{"neon", true, 2.0 * kRepeats * kSums * 4, run_neon}}; }

#endif

/// Sum over threads of what each does a second. `prepare(thread)` runs first, then all start together; `step(thread)`
/// returns how much it did.
template <class Prepare, class Step>
double rate(int threads, double seconds, Prepare prepare, Step step) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(static_cast<std::size_t>(threads));
  std::barrier start(threads);
  const auto work = [&](int thread) {
    prepare(thread);
    start.arrive_and_wait();
    const auto begin = Clock::now();
    double done = 0, elapsed = 0;
    while (elapsed < seconds) {
      done += step(thread);
      elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    rates[static_cast<std::size_t>(thread)] = done / elapsed;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

double multiply_add_rate(const Unit& unit, int threads, double seconds) {
  return rate(
      threads, seconds, [&](int) { unit.run(); },
      [&](int) {
        unit.run();
        return unit.flops;
      });
}

/// Each thread sums its own part, again and again: a small buffer is read from cache, as a small input would be.
double read_rate(std::size_t bytes, int threads, double seconds) {
  const std::size_t words = std::max<std::size_t>(1, bytes / sizeof(std::uint64_t) / static_cast<std::size_t>(threads));
  std::vector<std::unique_ptr<std::uint64_t[]>> parts(static_cast<std::size_t>(threads));
  return rate(
      threads, seconds,
      [&](int thread) { parts[static_cast<std::size_t>(thread)] = std::make_unique<std::uint64_t[]>(words); },
      [&](int thread) {
        const std::uint64_t* part = parts[static_cast<std::size_t>(thread)].get();
        g_sink = static_cast<double>(std::accumulate(part, part + words, std::uint64_t{0}));
        return static_cast<double>(words * sizeof(std::uint64_t));
      });
}

int help() {
  std::fprintf(stderr,
               "usage: peak [--threads N] [--milliseconds T] [--bytes B] [UNIT ...]\n"
               "Prints GF/s of multiply-adds on registers, for each UNIT (default: all that there are), and with\n"
               "--bytes the GB/s of reading so large a buffer again and again.\nunits here:");
  for (const Unit& unit : units())
    if (unit.runs_here) std::fprintf(stderr, " %s", unit.name);
  std::fprintf(stderr, "\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  int threads = 1;
  double seconds = 0.1;
  std::size_t bytes = 0;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word[0] != '-') {
      wanted.push_back(word);
      continue;
    }
    if (i + 1 == argc) return help();
    const double value = std::atof(argv[++i]);
    if (word == "--threads" && value >= 1) {
      threads = static_cast<int>(value);
    } else if (word == "--milliseconds" && value > 0) {
      seconds = value * 1e-3;
    } else if (word == "--bytes" && value > 0) {
      bytes = static_cast<std::size_t>(value);
    } else {
      return help();
    }
  }
  std::vector<Unit> chosen;
  for (const Unit& unit : units()) {
    const bool named = std::find(wanted.begin(), wanted.end(), unit.name) != wanted.end();
    if (unit.runs_here && (wanted.empty() || named)) chosen.push_back(unit);
  }
  if (chosen.size() < wanted.size()) return help();

  std::printf("{\"threads\": %d, \"gflops\": {", threads);
  for (const Unit& unit : chosen)
    std::printf("%s\"%s\": %.1f", &unit == chosen.data() ? "" : ", ", unit.name,
                multiply_add_rate(unit, threads, seconds) * 1e-9);
  std::printf("}");
  if (bytes > 0) std::printf(", \"gbytes\": %.2f", read_rate(bytes, threads, seconds) * 1e-9);
  std::printf("}\n");
  return 0;
}
