#!/usr/bin/env bash
# Runs every test in one command: installs what they need, installs flashcore, then ctest and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

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

# ---- what must be there ----------------------------------------------------------------------------------------------
python=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
python=${python:-${PYTHON:-python3}}
python_headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2> /dev/null || true)
need_build_tools
[[ -n ${VIRTUAL_ENV:-} ]] || "$python" -c 'import ensurepip' 2> /dev/null || missing+=(python3-venv)
[[ -f $python_headers/Python.h ]] || missing+=(python3-dev)
install_missing

if [[ -z ${VIRTUAL_ENV:-} ]]; then
  VIRTUAL_ENV=$PWD/build/venv
  [[ -x $VIRTUAL_ENV/bin/python ]] || "$python" -m venv "$VIRTUAL_ENV"
fi
export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
# What is not imported need not be compiled: for large frameworks that takes longer than all else of their installation.
install() { python -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }

# ---- install and build -----------------------------------------------------------------------------------------------
read -ra frameworks <<< "${FLASHCORE_TEST_FRAMEWORKS:-}"
installing=
if ((${#frameworks[@]})); then
  echo "== installing ${frameworks[*]}, and meanwhile:"
  install "${frameworks[@]}" &
  installing=$!
fi
wheel=${FLASHCORE_TEST_WHEEL:-}
if [[ -z $wheel ]]; then
  echo "== building the Python package"
  rm -rf build/test-wheel
  python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/test-wheel .
  wheel=$(echo build/test-wheel/*.whl)
fi

echo "== building the C++ tests"
cmake --preset "$preset" --log-level=NOTICE -DFLASHCORE_TESTS=ON "$@"
cmake --build --preset "$preset"

[[ -z $installing ]] || wait "$installing"
echo "== installing $wheel and what its tests need"
install --force-reinstall --no-deps "$wheel"
install "$wheel[test]"

# ---- run -------------------------------------------------------------------------------------------------------------
status=0
echo "== ctest"
run_ctest --preset "$preset" || status=1
echo "== pytest"
python -m pytest || status=1
exit $status
