# What the scripts that build and test share, to be sourced: all cores, missing packages, a ctest of few words.
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export CTEST_PARALLEL_LEVEL=${CTEST_PARALLEL_LEVEL:-$CMAKE_BUILD_PARALLEL_LEVEL}
missing=()  # packages, by Debian's names

# need COMMAND PACKAGE: the package is missing if there is no such command.
need() {
  command -v "$1" > /dev/null || missing+=("$2")
}

# What it takes to build and run the C++ tests.
need_build_tools() {
  need "${CXX:-c++}" g++
  need cmake cmake
  need ninja ninja-build
  [[ -n ${GTest_ROOT:-} ]] ||
    echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -x c++ -std=c++20 -fsyntax-only - 2> /dev/null ||
    missing+=(libgtest-dev)
}

install_missing() {
  ((${#missing[@]})) || return 0
  echo "== installing ${missing[*]}"
  local as_root=()
  ((EUID == 0)) || as_root=(sudo -n)
  command -v apt-get > /dev/null && {
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
  } > /dev/null && return
  echo "$0: missing: ${missing[*]} (Debian's names), and they could not be installed from here." >&2
  echo "On Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
  echo "GoogleTest elsewhere: set GTest_ROOT to where it is installed." >&2
  return 1
}

# ctest without a line for each of the hundreds of tests that pass: failures and the closing lines stay.
run_ctest() {
  ctest --no-tests=error "$@" | grep -vE '^ +Start +[0-9]+: |^ *[0-9]+/[0-9]+ Test .*[ .](Passed|\*\*\*Skipped) '
}
