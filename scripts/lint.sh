#!/usr/bin/env bash
# Checks the style of every source: ruff, clang-format, and the include rules. `--fix` repairs what can be repaired.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: scripts/lint.sh [--fix]"
fix=false
for word in "$@"; do
  case $word in
    --fix) fix=true ;;
    -h | --help) echo "$usage" && exit 0 ;;
    *) echo "scripts/lint.sh: '$word' is not an option; $usage" >&2 && exit 2 ;;
  esac
done

# The tools, at the versions that .pre-commit-config.yaml names, in a virtual environment of their own.
mapfile -t pins < <(grep -oE '(ruff|clang-format)==[0-9.]+' .pre-commit-config.yaml | sort -u)
tools=build/lint-venv
if [[ "$(cat "$tools/pins" 2>/dev/null)" != "${pins[*]}" ]]; then
  "${PYTHON:-python3}" -m venv --clear "$tools"
  "$tools/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}"
  echo "${pins[*]}" > "$tools/pins"
fi

# Tracked files and new ones that git does not ignore; without git, what lies in the source folders.
sources() {
  if git rev-parse --git-dir > /dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard -- "$@" | while IFS= read -r -d '' f; do
      [[ ! -f $f ]] || printf '%s\0' "$f"
    done
  else
    for pattern in "$@"; do
      find include src python bench cpp_tests tests scripts build_backend -name "$pattern" -print0 2>/dev/null || true
    done
  fi
}

failed=()
check() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

python() { sources '*.py' '*.pyi' | xargs -0 -r "$tools/bin/ruff" "$@"; }
cpp() { sources '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -0 -r "$tools/bin/clang-format" "$@"; }

formatted() {
  local complaints
  complaints=$(cpp --dry-run --Werror 2>&1) && return
  grep -oE '^[^:]+:[0-9]+' <<< "$complaints" | awk -F: '!seen[$1]++ { print $1 ":" $2 ": not as clang-format lays it out" }'
  return 1
}

if $fix; then
  cpp -i
  python check --quiet --fix-only
  python format --quiet
fi
check "ruff check" python check --quiet --output-format concise
check "ruff format" python format --check
check "clang-format" formatted
check "include rules" "$tools/bin/python" scripts/check_includes.py
check "generated wgmma wrappers" "$tools/bin/python" scripts/generate_wgmma.py --check
check "README from results" "$tools/bin/python" scripts/update_readme.py --check
check "ladder from results" "$tools/bin/python" scripts/update_ladder.py --check
check "costs of calls from results" "$tools/bin/python" scripts/update_overhead.py --check

if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[*]}"
  echo "lint: scripts/lint.sh --fix repairs formatting"
  exit 1
fi
echo "lint: all good"
