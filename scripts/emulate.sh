#!/usr/bin/env bash
# Runs the CPU kernels on processors that this x86-64 machine is not, in qemu: 64-bit ARM, and x86-64 of other years.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

usage="usage: scripts/emulate.sh [PROGRAM]

Builds the C++ tests for 64-bit ARM and runs those of the CPU's threads and vectorised kernels, the long ones left out
(all: cmake --build --preset aarch64, ctest --preset aarch64). Then runs PROGRAM, flashcore_core_tests built for x86-64,
on processors with and without AVX2: each must choose its own instruction set and meet no instruction that it does not
know. Without PROGRAM it is built.
Installs what is missing: Debian's g++-aarch64-linux-gnu, qemu-user, googletest.

CTEST_PARALLEL_LEVEL and CMAKE_BUILD_PARALLEL_LEVEL are as ctest and CMake read them (default: all cores)."

case ${1:-} in
  -h | --help) echo "$usage" && exit 0 ;;
  -*) echo "scripts/emulate.sh: '$1' is not an option; $usage" >&2 && exit 2 ;;
esac

need_build_tools
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64 qemu-user
[[ -d /usr/src/googletest ]] || missing+=(googletest)
install_missing

echo "== 64-bit ARM"
cmake --preset aarch64 --log-level=NOTICE
cmake --build --preset aarch64 --target flashcore_core_tests
rows='RowTest.*/cpu_(flash|decode)__[a-z]*_b[23][^h]*_h(.|16)_'
run_ctest --preset aarch64 --tests-regex "^CpuExecutor[./]|^CpuSimd\.|EachIsa\.(Takes|Skips|Keeps)|^cpu\.|$rows"

program=${1:-}
if [[ -z $program ]]; then
  cmake --preset dev --log-level=NOTICE
  cmake --build --preset dev --target flashcore_core_tests
  program=build/dev/cpp_tests/flashcore_core_tests
fi

# The program on a processor of that model, without the warnings about what the emulator leaves out of it.
emulated() {
  qemu-x86_64 -cpu "$1" "$program" "${@:2}" 2> >(grep -v "TCG doesn't support requested feature" >&2)
}

# on_processor MODEL INSTRUCTION_SETS: those that the tests find there, and a few cases.
on_processor() {
  local model=$1 expected=$2 found
  found=$(emulated "$model" --gtest_list_tests --gtest_filter='CpuSimd/*' |
    sed -n 's|^ *TakesSizesThatFillNoTile/\([a-z0-9_]*\).*|\1|p' | xargs)
  echo "== $model: $found"
  if [[ $found != "$expected" ]]; then
    echo "scripts/emulate.sh: $model has $expected" >&2
    return 1
  fi
  emulated "$model" --gtest_brief=1 \
    --gtest_filter='CpuSimd.*:*RowTest*/cpu_flash__*_b2_q19_*:*RowTest*/cpu_decode__*_b3_q3_k48_*'
}
on_processor qemu64 baseline
on_processor Nehalem baseline
on_processor Haswell "baseline avx2"
