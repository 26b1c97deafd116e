#!/usr/bin/env bash
# Nsight Compute on the kernels of one problem line: a report to open in its window, and a short summary in text.
#
#   scripts/profile.sh [--out FOLDER] [--kernel REGEX] [--force NAME] "fwd bf16 b2 q8192 k8192 h16 d128"
#
#   --out FOLDER     where NAME.ncu-rep, NAME.csv and NAME.txt go (build/profile)
#   --kernel REGEX   only CUDA kernels whose name matches (of a bwd line the forward pass runs, too)
#   --force NAME     a row of flashcore's table instead of the chosen one, as FLASHCORE_KERNEL does
#   ATTENTION_BENCH  the program to profile (default: the newest under build/*/bench, else flashcore's Python module)
#   NCU              Nsight Compute's ncu (default: on PATH, or where its installer puts it)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "scripts/profile.sh: $*" >&2 && exit 2; }
usage='usage: scripts/profile.sh [--out FOLDER] [--kernel REGEX] [--force NAME] "<problem line>"'

out=build/profile
names=()
while (($#)); do
  case $1 in
    --out | --kernel | --force)
      (($# > 1)) || fail "$1 needs a value; $usage"
      case $1 in
        --out) out=$2 ;;
        --kernel) names=(--kernel-name "regex:$2") ;;
        --force) export FLASHCORE_KERNEL=$2 ;;
      esac
      shift 2
      ;;
    -h | --help) echo "$usage" && exit 0 ;;
    -*) fail "'$1' is not an option; $usage" ;;
    *) break ;;
  esac
done
(($#)) || fail "a problem line is needed; $usage"
line="$*"

ncu=${NCU:-$(command -v ncu || compgen -G '/usr/local/cuda*/bin/ncu' | tail -1 ||
  compgen -G '/opt/nvidia/nsight-compute/*/ncu' | tail -1 || true)}
[[ -n $ncu && -x $ncu ]] || fail "Nsight Compute (ncu) is not here; it comes with the CUDA toolkit, or set NCU"
bench=${ATTENTION_BENCH:-$(compgen -G 'build/*/bench/attention_bench' | xargs -r ls -t | head -1 || true)}
python=${PYTHON:-python3}
if [[ -n $bench && -x $bench ]]; then
  call=("$bench" --device cuda --once "$line")
elif "$python" -c 'import flashcore' 2> /dev/null; then
  call=("$python" -m flashcore bench --device cuda --once "$line")
else
  fail "nothing to profile: $python has no flashcore (pip install .), and attention_bench is not built" \
    "(cmake --preset release && cmake --build --preset release --target attention_bench)"
fi

# Without the profiler first: a wrong line or a missing GPU says so in its own words.
chosen=$("${call[@]}") || exit 2
mkdir -p "$out"
name=$out/$(tr -cs 'A-Za-z0-9\n' '_' <<< "$chosen" | sed 's/_*$//')

sections=(SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables SchedulerStats
  WarpStateStats InstructionStats LaunchStats Occupancy SourceCounters)
wanted=()
for section in "${sections[@]}"; do wanted+=(--section "$section"); done
log=$("$ncu" --clock-control none --force-overwrite --export "$name" "${wanted[@]}" "${names[@]}" \
  "${call[@]}" 2>&1) || true
case $log in
  *ERR_NVGPUCTRPERM*)
    fail "the driver does not let this user read the GPU's counters (https://developer.nvidia.com/ERR_NVGPUCTRPERM)" ;;
  *"No kernels were profiled"*) fail "no CUDA kernel of this call matches" ;;
esac
[[ -f $name.ncu-rep ]] || { echo "$log" | tail -5 >&2 && fail "ncu wrote no report"; }

"$ncu" --import "$name.ncu-rep" --page raw --csv > "$name.csv"
{ echo "$chosen" && "$python" scripts/profile_summary.py "$name.csv"; } | tee "$name.txt"
echo "report: $name.ncu-rep"
