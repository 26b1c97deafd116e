#!/usr/bin/env bash
# Proof on a GPU: builds the library, runs every test with the CUDA kernels, a part of them under compute-sanitizer, and
# writes bench/results/gpu_check.json. Needs nvcc, CMake, ninja and Python with the packages of the test extra; no network.
#
#   FLASHCORE_ARCHS     architectures to build for (default: that of the GPU present)
#   FLASHCORE_WHEELS    a folder with wheels and Debian packages that are missing on the machine
#   GTest_ROOT          GoogleTest: an installed prefix or a source tree
#   FLASHCORE_GIT_SHA   the commit, where the tree has no .git
#   OUT                 a folder that the logs and the result are copied to
#   PYTHON, STEP_LIMIT  the interpreter (python3) and the most seconds that a step may take (600)
set -uo pipefail
cd "$(dirname "$0")/.." || exit
work=$PWD/build/gpu_check
site=$work/site
python=${PYTHON:-python3}
mkdir -p "$work" "$site"
rm -f "$work"/*.log "$work"/*.xml "$work"/steps.tsv
touch "$work/steps.tsv"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several frameworks share the GPU's memory
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
capability=$(nvidia-smi --id=0 --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | tr -d .)
archs=${FLASHCORE_ARCHS:-${capability:+$capability-real}}

# What there is so far, so that a run that is cut off leaves it, too.
keep_logs() {
  [[ -n ${OUT:-} ]] || return 0
  mkdir -p "$OUT"
  (cd "$work" && tar -czf "$OUT/logs.$BASHPID" -- *.log steps.tsv $(compgen -G '*.xml') 2> /dev/null
    mv "$OUT/logs.$BASHPID" "$OUT/gpu_check_logs.tar.gz")
}

# step NAME COMMAND…: runs it under the time limit, keeps its log, exit status and seconds, and goes on.
step() {
  local name=$1 start=$SECONDS status
  shift
  echo "== $name"
  timeout --kill-after=10 "${STEP_LIMIT:-600}" "$@" > "$work/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) >> "$work/steps.tsv"
  keep_logs
  ((status == 0)) || tail -n 40 "$work/$name.log"
  return "$status"
}

install_carried() {
  local packages=$1 wheels
  wheels=$(find "$packages" -type f -name '*.whl')
  [[ -z $wheels ]] || xargs "$python" -m pip install --no-index --no-deps --upgrade --target "$site" <<< "$wheels" ||
    return 1
  find "$packages" -type f -name '*.deb' -exec dpkg -x {} "$work/debian" \;
}

build_googletest() {
  cmake -S "$1" -B "$work/googletest" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_GMOCK=OFF &&
    cmake --build "$work/googletest" && cmake --install "$work/googletest" --prefix "$work/googletest-prefix"
}

build_library() {
  cmake -S . -B "$work/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASHCORE_CUDA=ON -DFLASHCORE_ARCHS="$archs" &&
    cmake --build "$work/cmake"
}

install_package() {
  CMAKE_ARGS="-DFLASHCORE_CUDA=ON -DFLASHCORE_ARCHS=$archs" "$python" -m pip install --no-index --no-deps \
    --no-build-isolation --upgrade --target "$site" .
}

# run_programs NAME FILTER TOOL…: what the filter takes of the programs of C++ tests, under a tool if one is given.
run_programs() {
  local name=$1 filter=$2 program status=0
  shift 2
  for program in flashcore_core_tests flashcore_tests; do
    "$@" "$work/cmake/cpp_tests/$program" --gtest_filter="$filter" --gtest_brief=1 \
      --gtest_output="xml:$work/$name.part-$program.xml" || status=$?
  done
  return "$status"
}

# The C++ tests in a few processes of many tests: a process for each, as ctest has it, would set up CUDA a thousand times.
run_tests() {
  local shards=$(($(nproc) < 8 ? $(nproc) : 8)) shard status=0 running=()
  for ((shard = 0; shard < shards; ++shard)); do
    GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard run_programs "gtest.part$shard" '*' \
      > "$work/gtest.part$shard.log" 2>&1 &
    running+=($!)
  done
  for shard in "${!running[@]}"; do
    wait "${running[shard]}" || status=$?
    cat "$work/gtest.part$shard.log"
  done
  return "$status"
}
export -f install_carried build_googletest build_library install_package run_programs run_tests
export work site python archs

step gpu nvidia-smi
if [[ -n ${FLASHCORE_WHEELS:-} ]]; then
  step carried bash -c 'install_carried "$0"' "$FLASHCORE_WHEELS"
  [[ -d $work/debian/usr ]] && export GTest_ROOT=${GTest_ROOT:-$work/debian/usr}
fi
if [[ -f ${GTest_ROOT:-}/CMakeLists.txt ]]; then
  step googletest bash -c 'build_googletest "$0"' "$GTest_ROOT" && export GTest_ROOT=$work/googletest-prefix
fi

workers=()  # of pytest, where its xdist is there: Python's tests use little of the GPU
small='*cuda*:*Cuda*:-*ReferenceShapes*:*ForwardStress*'
raced='*RowTest*cuda_*q130_k200*:*RowTest*cuda_sm90*q64_k257*:*RowTest*cuda_sm90*q150_k150*:CudaReduceTest.*'
# Calls that the driver refuses are left to the tests: some ask for that, and other libraries try what may not be there.
memcheck=(compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 99)
racecheck=(compute-sanitizer --tool racecheck --error-exitcode 99)
synccheck=(compute-sanitizer --tool synccheck --error-exitcode 99)
under() {  # under TOOL FILTER LIMIT: a step of C++ tests
  local -n tool=$1
  STEP_LIMIT=$3 step "gtest-$1" bash -c 'run_programs "$@"' - "gtest-$1" "$2" "${tool[@]}"
}
# C++ and Python side by side: each leaves most of the machine idle.
check_cpp() {
  step build bash -c build_library || return
  step gtest bash -c run_tests
  step ctest ctest --test-dir "$work/cmake" --tests-regex '^(install|cpu)\.' --no-tests=error --output-on-failure \
    --output-junit "$work/ctest.xml"
  under memcheck "$small" 180
  # Races in shared memory and misuse of barriers, on a few small shapes: every access is watched, which takes its time.
  under racecheck "$raced" 80
  under synccheck "$raced:CudaBarrierTest.*" 40
}
check_python() {
  step install bash -c install_package || return
  "$python" -c 'import xdist' 2> /dev/null && workers=(--numprocesses "$(($(nproc) < 8 ? $(nproc) : 8))" --dist worksteal)
  step pytest "$python" -m pytest -q "${workers[@]}" --junitxml="$work/pytest.xml"
  step pytest-memcheck "${memcheck[@]}" --target-processes all "$python" -m pytest -q -m sanitizer \
    --junitxml="$work/pytest-memcheck.xml"
}
check_cpp &
check_python &
wait

"$python" scripts/gpu_check_report.py "$work" 2>&1 | tee "$work/report.log"
status=${PIPESTATUS[0]}
keep_logs
[[ -z ${OUT:-} ]] || cp bench/results/gpu_check.json "$OUT/"
exit "$status"
