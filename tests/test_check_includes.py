"""scripts/check_includes.py finds each kind of violation, and nothing in a tree that keeps the rules."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_includes.py"

GOOD_TREE = {
    "include/flashcore/tensor.h": "// Tensors.\n",
    "src/README.md": "problem.h plan.h validate.cpp registry.cpp backend.h check.h params.h kernel.h forward.cu "
    "tile.cuh",
    "src/problem.h": '// Problem.\n#include "flashcore/tensor.h"\n',
    "src/plan.h": '// Plan.\n#include "problem.h"\n',
    "src/validate.cpp": '// Validate.\n#include <string>\n#include "kernels/params.h"\n#include "plan.h"\n',
    "src/registry.cpp": '// FLASHCORE_HAVE_CUDA\n#include "kernels/cpu/backend.h"\n#include "cuda/backend.h"\n',
    "src/cuda/backend.h": "// CUDA.\n",
    "src/cuda/check.h": "// Check.\n#include <cuda_runtime_api.h>\n",
    "src/kernels/params.h": '// Params.\n#include "flashcore/tensor.h"\n',
    "src/kernels/kernel.h": '// Kernel.\n#include "../plan.h"\n#include "params.h"\n',
    "src/kernels/cpu/backend.h": '// CPU.\n#include "../kernel.h"\n',
    "src/kernels/tile/tile.cuh": "// Tile.\n#include <cuda_runtime.h>\n",
    "src/kernels/sm80/forward.cu": '// Forward.\n#include "../../cuda/check.h"\n#include "../tile/tile.cuh"\n',
    "src/kernels/sm90/forward.cu": '// Forward.\n#include "../kernel.h"\n',
    "python/flashcore/_core.cpp": '// Binding.\n#include <nanobind/nanobind.h>\n#include "flashcore/tensor.h"\n',
    "python/flashcore/torch/functional.py": '"""PyTorch."""\n\nimport torch\n',
}

VIOLATIONS = {
    "public header includes private": (
        "include/flashcore/a.h",
        '// A.\n#include "problem.h"\n',
        2,
        "include/ includes",
    ),
    "public header includes CUDA": ("include/flashcore/a.h", "// A.\n#include <cuda_runtime.h>\n", 2, "CUDA headers"),
    "public header includes torch": ("include/flashcore/a.h", "// A.\n#include <torch/all.h>\n", 2, "framework"),
    "host includes CUDA": ("src/plan.h", "// Plan.\n#include <cuda_fp16.h>\n", 2, "CUDA headers"),
    "CPU kernels include CUDA": ("src/kernels/cpu/backend.h", "// CPU.\n#include <cuda.h>\n", 2, "CUDA headers"),
    "host includes a kernel folder": (
        "src/plan.h",
        '// Plan.\n#include "kernels/cpu/backend.h"\n',
        2,
        "only registry.cpp",
    ),
    "host includes the CUDA backend": ("src/plan.h", '// Plan.\n#include "cuda/backend.h"\n', 2, "only registry.cpp"),
    "host includes .cuh": ("src/validate.cpp", '// V.\n#include "kernels/tile/tile.cuh"\n', 2, ".cuh is included by"),
    "kernel points upwards": ("src/kernels/sm90/forward.cu", '// F.\n#include "../../registry.h"\n', 2, "upwards"),
    "kernel includes its neighbour": (
        "src/kernels/sm90/forward.cu",
        '// F.\n#include "../sm80/a.h"\n',
        2,
        "its own files",
    ),
    "Python includes private": ("python/flashcore/_core.cpp", '// B.\n#include "problem.h"\n', 2, "python/ includes"),
    "bench includes private": ("bench/a.cpp", '// B.\n#include "../src/plan.h"\n', 2, "bench/ includes"),
    "unknown header": ("src/plan.h", '// Plan.\n#include "nowhere.h"\n', 2, "not in the project"),
    "cycle": ("src/problem.h", '// Problem.\n#include "plan.h"\n', 2, "a cycle"),
    "build macro elsewhere": (
        "src/validate.cpp",
        "// V.\n#ifdef FLASHCORE_HAVE_CUDA\n#endif\n",
        2,
        "registry.cpp alone",
    ),
    "no file header": ("src/validate.cpp", "#include <string>\n", 1, "says its job"),
    "no Python file header": ("tests/test_a.py", "import sys\n", 1, "says its job"),
    "long line": ("src/validate.cpp", "// V.\n//" + "x" * 119 + "\n", 2, "121 columns"),
    "framework import": ("python/flashcore/interop.py", '"""Interop."""\n\nimport torch\n', 3, "imports torch"),
    "file missing in the map": ("src/orphan.cpp", "// Orphan.\n", None, "does not name src/orphan.cpp"),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def check(root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True, check=False)


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    write_tree(tmp_path, GOOD_TREE)
    result = check(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_reported_with_file_and_line(tmp_path, name):
    path, text, line, message = VIOLATIONS[name]
    mapped = GOOD_TREE["src/README.md"] + " registry.h a.h\n"
    write_tree(
        tmp_path, GOOD_TREE | {"src/README.md": mapped, "src/registry.h": "// R.\n", "src/kernels/sm80/a.h": "// A.\n"}
    )
    assert check(tmp_path).returncode == 0
    write_tree(tmp_path, {path: text})
    result = check(tmp_path)
    assert result.returncode == 1
    place = f"{path}:{line}:" if line else "src/README.md:1:"
    assert any(row.startswith(place) and message in row for row in result.stdout.splitlines()), result.stdout


def test_a_folder_without_sources_is_refused(tmp_path):
    result = check(tmp_path)
    assert result.returncode == 2
    assert "no folder src" in result.stderr
