#!/usr/bin/env bash
# Runs every test in one command: installs what they need, installs flashcore, then ctest and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: scripts/test.sh [CMAKE OPTION ...]

Runs the C++ tests (ctest) and the Python tests (pytest). CMake options go to the C++ test build, e.g.
-DFLASHCORE_CUDA=OFF. Python packages go into the active virtual environment, or into build/venv.

Environment:
  PYTHON                      interpreter that makes build/venv (default: python3)
  FLASHCORE_TEST_FRAMEWORKS   more packages to install, such as \"torch jax cupy-cuda13x\"; tests of absent ones skip
  FLASHCORE_TEST_PRESET       CMake preset of the C++ tests (default: release)
  FLASHCORE_TEST_WHEEL        test this wheel instead of building one from this folder
  PYTEST_ADDOPTS, CTEST_PARALLEL_LEVEL, CMAKE_BUILD_PARALLEL_LEVEL, CMAKE_ARGS: as pytest, ctest, CMake and pip read them"

case ${1:-} in
  -h | --help) echo "$usage" && exit 0 ;;
esac
preset=${FLASHCORE_TEST_PRESET:-release}
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export CTEST_PARALLEL_LEVEL=${CTEST_PARALLEL_LEVEL:-$CMAKE_BUILD_PARALLEL_LEVEL}

# ---- what must be there ----------------------------------------------------------------------------------------------
has_gtest() {
  [[ -n ${GTest_ROOT:-} ]] || echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -x c++ -std=c++20 -fsyntax-only - 2> /dev/null
}
missing=()
command -v "${CXX:-c++}" > /dev/null || missing+=(g++)
command -v cmake > /dev/null || missing+=(cmake)
command -v ninja > /dev/null || missing+=(ninja-build)
has_gtest || missing+=(libgtest-dev)
python=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
python=${python:-${PYTHON:-python3}}
[[ -n ${VIRTUAL_ENV:-} ]] || "$python" -c 'import ensurepip' 2> /dev/null || missing+=(python3-venv)
python_headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2> /dev/null || true)
[[ -f $python_headers/Python.h ]] || missing+=(python3-dev)
if ((${#missing[@]})); then
  echo "== installing ${missing[*]}"
  as_root=()
  ((EUID == 0)) || as_root=(sudo -n)
  if ! command -v apt-get > /dev/null \
    || ! { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -qq -y "${missing[@]}"; } > /dev/null; then
    echo "scripts/test.sh: missing: ${missing[*]} (Debian's names), and they could not be installed from here." >&2
    echo "On Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
    echo "GoogleTest elsewhere: set GTest_ROOT to where it is installed." >&2
    exit 1
  fi
fi

if [[ -z ${VIRTUAL_ENV:-} ]]; then
  VIRTUAL_ENV=$PWD/build/venv
  [[ -x $VIRTUAL_ENV/bin/python ]] || "$python" -m venv "$VIRTUAL_ENV"
fi
export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
install() { python -m pip install --quiet --disable-pip-version-check "$@"; }

# ---- install and build -----------------------------------------------------------------------------------------------
read -ra frameworks <<< "${FLASHCORE_TEST_FRAMEWORKS:-}"
if ((${#frameworks[@]})); then
  echo "== installing ${frameworks[*]}"
  install "${frameworks[@]}"
fi
wheel=${FLASHCORE_TEST_WHEEL:-}
if [[ -z $wheel ]]; then
  echo "== building the Python package"
  rm -rf build/test-wheel
  python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/test-wheel .
  wheel=$(echo build/test-wheel/*.whl)
fi
echo "== installing $wheel and what its tests need"
install --force-reinstall --no-deps "$wheel"
install "$wheel[test]"

echo "== building the C++ tests"
cmake --preset "$preset" --log-level=NOTICE -DFLASHCORE_TESTS=ON "$@"
cmake --build --preset "$preset"

# ---- run -------------------------------------------------------------------------------------------------------------
status=0
echo "== ctest"
# Hundreds of passing tests say nothing: failures and the closing lines stay.
ctest --preset "$preset" --no-tests=error | grep -vE '^ +Start +[0-9]+: |^ *[0-9]+/[0-9]+ Test .*[ .](Passed|\*\*\*Skipped) ' || status=1
echo "== pytest"
python -m pytest || status=1
exit $status
