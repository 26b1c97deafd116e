#!/usr/bin/env bash
# Runs the C++ tests, CPU only, under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

usage="usage: scripts/sanitize.sh [--all] [PRESET ...]

PRESET is sanitize (addresses, undefined behaviour) or tsan (threads); default: both. Without --all a part of the tests
runs that reaches each kind of code: threads, memory, checks, and forward, backward and decode with all features.

CTEST_PARALLEL_LEVEL and CMAKE_BUILD_PARALLEL_LEVEL are as ctest and CMake read them (default: all cores)."

# Rows are tried with a problem of several tiles and one with every feature.
large='fwd_b1_q130|bwd_b1_q70|decode_b2_q1_k300'
featured='fwd_b2_q19|bwd_b2_q19|decode_b3_q3_k48'
programs=(flashcore_core_tests)
tests=(--tests-regex "^CpuExecutor|Pool|Resource|Buffer|^Validate|RefusedCall.*Writes|ManyThreads|AnyNumberOfThreads|\
WhileCallsChoose|RowTest.*/cpu_(flash|decode)__($large|$featured)")
presets=()
for word in "$@"; do
  case $word in
    -h | --help) echo "$usage" && exit 0 ;;
    --all) programs+=(flashcore_tests) && tests=() ;;
    sanitize | tsan) presets+=("$word") ;;
    *) echo "scripts/sanitize.sh: '$word' is neither an option nor a preset; $usage" >&2 && exit 2 ;;
  esac
done
((${#presets[@]})) || presets=(sanitize tsan)

need_build_tools
install_missing

# Instruction sets that this processor lacks would be compiled, for minutes, and not run.
isas=baseline
for isa in avx2:avx2 avx512f:avx512 amx_bf16:amx; do
  grep -qw "${isa%:*}" /proc/cpuinfo && isas+=";${isa#*:}"
done

status=0
for preset in "${presets[@]}"; do
  echo "== $preset"
  cmake --preset "$preset" --log-level=NOTICE -DFLASHCORE_CPU_ISAS="$isas"
  cmake --build --preset "$preset" --target "${programs[@]}"
  run_ctest --preset "$preset" "${tests[@]}" || status=1
done
exit $status
