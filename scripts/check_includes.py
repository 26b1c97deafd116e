#!/usr/bin/env python3
"""Checks the rules of the house: who may include whom, no cycles, file headers, and a complete map in src/README.md.

Usage: check_includes.py [ROOT]. Prints each violation as FILE:LINE: what is wrong, and exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

CPP_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
SOURCE_FOLDERS = ("include", "src", "python", "bench", "cpp_tests")
COMMENTED_FOLDERS = (*SOURCE_FOLDERS, "cmake", "scripts", "tests", "build_backend", ".ci")
MAX_COLUMNS = 120

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
PY_IMPORT = re.compile(r"^\s*(?:import|from)\s+(torch|jax|jaxlib|cupy)\b")
CUDA_HEADERS = ("cuda*", "cub/*", "thrust/*", "cooperative_groups*", "mma.h", "nv/*", "nvtx*", "vector_types.h")
FRAMEWORK_HEADERS = ("torch/*", "ATen/*", "c10/*", "Python.h", "nanobind/*", "pybind11/*", "xla/*", "jaxlib/*")

# Kernel folders that any other kernel folder may build on.
SHARED_KERNEL_FOLDERS = ("common", "ptx", "tile")


@dataclass(frozen=True)
class Include:
    """One #include of one file. `target` is its path from the root, or None for a header from outside the project."""

    source: str
    line: int
    text: str
    quoted: bool
    target: str | None


@dataclass(frozen=True)
class Violation:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def files_under(root: Path, folders: tuple[str, ...]) -> Iterator[str]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix()


def read_includes(root: Path, source: str) -> Iterator[Include]:
    search = [(root / source).parent, root / "include", root / "src", root / "cpp_tests"]
    for number, line in enumerate((root / source).read_text(encoding="utf-8").splitlines(), start=1):
        found = INCLUDE.match(line)
        if not found:
            continue
        quoted, text = found[1] == '"', found[2]
        paths = ((folder / text).resolve() for folder in (search if quoted else search[1:2]))
        target = next((p.relative_to(root).as_posix() for p in paths if p.is_file() and p.is_relative_to(root)), None)
        yield Include(source, number, text, quoted, target)


# ---- who may include whom --------------------------------------------------------------------------------------------


def layer_of(path: str) -> str:
    """The room a file belongs to: include, host (src/*), memory, cuda, kernels, kernels/<folder>, python, bench, …"""
    parts = path.split("/")
    if parts[0] != "src":
        return "cpp_tests/install" if path.startswith("cpp_tests/install/") else parts[0]
    if len(parts) == 2:
        return "host"
    return parts[1] if parts[1] != "kernels" or len(parts) == 3 else f"kernels/{parts[2]}"


def outside_rule(include: Include, layer: str) -> str | None:
    """What is wrong with including a header that is not the project's own."""
    if matches(include.text, CUDA_HEADERS):
        in_cuda_kernels = layer.startswith("kernels/") and layer != "kernels/cpu"
        knows_cuda = in_cuda_kernels or layer in ("cuda", "cpp_tests", "bench")
        return None if knows_cuda else "CUDA headers belong to src/cuda and the CUDA kernel folders"
    if matches(include.text, FRAMEWORK_HEADERS) and layer != "python":
        return "framework and Python headers belong to python/ alone"
    if include.quoted:
        return f'"{include.text}" is not in the project; write <…> for headers from elsewhere'
    return None


def inside_rule(include: Include, layer: str) -> str | None:
    """What is wrong with the arrow between two of the project's own files."""
    target = include.target or ""
    to = layer_of(target)
    if target.endswith(".cuh") and not include.source.endswith((".cu", ".cuh")):
        return ".cuh is included by .cu and .cuh only"
    if to in (layer, "include"):
        return None
    if layer in ("include", "python", "bench", "cpp_tests/install"):
        return f"{layer}/ includes nothing of the project but include/ and its own files"
    if layer == "cpp_tests":
        return None if to in ("host", "memory", "cuda") or to.startswith("kernels") else f"tests do not include {to}/"
    if to in ("cpp_tests", "python", "bench"):
        return f"src/ includes nothing of {to}/"
    if include.source.endswith("/backend.cpp") and to == "memory":
        return None  # a backend names the memory of its devices
    if layer == "kernels" or layer.startswith("kernels/"):
        return kernel_rule(target, layer, to)
    return host_rule(include.source, target, to)


def kernel_rule(target: str, layer: str, to: str) -> str | None:
    allowed_host = ("src/problem.h", "src/plan.h", "src/workspace.h", "src/backend.h", "src/log.h")
    if to == "host":
        return None if target in allowed_host else "kernels know Problem, Plan and Params; this points upwards"
    if to == "cuda":
        return None if layer != "kernels/cpu" else "the CPU backend knows nothing of CUDA"
    if to == "kernels":
        return None
    if layer != "kernels" and to.removeprefix("kernels/") in SHARED_KERNEL_FOLDERS:
        return None
    return "a kernel folder includes kernels/*.h, its own files, and " + ", ".join(SHARED_KERNEL_FOLDERS)


def host_rule(source: str, target: str, to: str) -> str | None:
    """src/*, src/memory, src/cuda. Only registry.cpp knows the backends, only src/cuda CUDA's kernel folders."""
    from_cuda = source.startswith("src/cuda/")
    if to.startswith("kernels/"):
        if source == "src/registry.cpp" and fnmatch(target, "src/kernels/*/backend.h"):
            return None
        return None if from_cuda else "only registry.cpp may include a kernel folder's backend.h"
    if to == "kernels":
        known = ("src/kernels/kernel.h", "src/kernels/params.h")
        return None if target in known else "of kernels/, host code may include kernel.h and params.h only"
    if to == "cuda":
        backend = source == "src/registry.cpp" and target == "src/cuda/backend.h"
        return None if backend else "only registry.cpp may include cuda/backend.h, and nothing else of src/cuda"
    return None


def check_arrows(includes: list[Include]) -> Iterator[Violation]:
    for include in includes:
        layer = layer_of(include.source)
        wrong = inside_rule(include, layer) if include.target else outside_rule(include, layer)
        if wrong:
            yield Violation(include.source, include.line, f"includes {include.text}: {wrong}")


def check_cycles(includes: list[Include]) -> Iterator[Violation]:
    arrows: dict[str, list[Include]] = {}
    for include in includes:
        if include.target:
            arrows.setdefault(include.source, []).append(include)
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> Iterator[Violation]:
        for include in arrows.get(path, []):
            target = include.target or ""
            if target in trail:
                cycle = [*trail[trail.index(target) :], target]
                yield Violation(path, include.line, "a cycle: " + " -> ".join(cycle))
            elif target not in done:
                yield from visit(target, [*trail, target])
        done.add(path)

    for source in sorted(arrows):
        if source not in done:
            yield from visit(source, [source])


# ---- what every file keeps to ----------------------------------------------------------------------------------------


def check_build_macros(root: Path, path: str) -> Iterator[Violation]:
    """FLASHCORE_HAVE_* is how the build tells registry.cpp which backends exist; nobody else asks."""
    if path == "src/registry.cpp" or not path.startswith(("src/", "include/", "python/", "bench/")):
        return
    for number, line in enumerate((root / path).read_text(encoding="utf-8").splitlines(), start=1):
        if "FLASHCORE_HAVE_" in line:
            yield Violation(path, number, "FLASHCORE_HAVE_* belongs to src/registry.cpp alone")


def check_python_imports(root: Path, path: str) -> Iterator[Violation]:
    """The package imports no array framework, but for what is named after one; command line and bench use them."""
    folders = tuple(f"python/flashcore/{folder}/" for folder in ("torch", "jax", "compat", "cli", "bench"))
    may_import = path.startswith(folders) or path.endswith("/transformers.py")
    if not path.startswith("python/flashcore/") or may_import:
        return
    for number, line in enumerate((root / path).read_text(encoding="utf-8").splitlines(), start=1):
        if found := PY_IMPORT.match(line):
            yield Violation(path, number, f"imports {found[1]}: only what is named after a framework may")


def check_header(root: Path, path: str) -> Iterator[Violation]:
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    at = 1 if lines and lines[0].startswith("#!") else 0
    first = lines[at] if at < len(lines) else ""
    is_python = path.endswith((".py", ".pyi"))
    marks = ('"""', "#") if is_python else ("//",) if path.endswith(CPP_SUFFIXES) else ("#",)
    if not first.startswith(marks) or not first.strip('/#" '):
        yield Violation(path, at + 1, "a file opens with one line of comment that says its job")


def check_columns(root: Path, path: str) -> Iterator[Violation]:
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    generated = bool(lines) and "do not edit" in lines[0]
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_COLUMNS and not generated:
            yield Violation(path, number, f"{len(line)} columns; at most {MAX_COLUMNS}")


def check_map(root: Path) -> Iterator[Violation]:
    """src/README.md names every file of src/, but for folders that have a README.md of their own."""
    src = root / "src"
    text = (src / "README.md").read_text(encoding="utf-8") if (src / "README.md").is_file() else ""
    for path in files_under(root, ("src",)):
        folder, name = path.rsplit("/", 1)
        has_own_map = folder != "src" and (root / folder / "README.md").is_file()
        if name != "README.md" and not has_own_map and not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text):
            yield Violation("src/README.md", 1, f"the map does not name {path}")


def check_all(root: Path) -> list[Violation]:
    sources = [p for p in files_under(root, SOURCE_FOLDERS) if p.endswith(CPP_SUFFIXES)]
    includes = [include for source in sources for include in read_includes(root, source)]
    violations = [*check_arrows(includes), *check_cycles(includes), *check_map(root)]
    text_suffixes = (*CPP_SUFFIXES, ".py", ".pyi", ".cmake", ".sh", "CMakeLists.txt")
    for path in (p for p in files_under(root, COMMENTED_FOLDERS) if p.endswith(text_suffixes)):
        violations += check_header(root, path)
        if path.endswith(CPP_SUFFIXES):
            violations += check_columns(root, path)  # for Python ruff does this
            violations += check_build_macros(root, path)
        if path.endswith(".py"):
            violations += check_python_imports(root, path)
    return violations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent, help="the project's root")
    root = parser.parse_args().root.resolve()
    if not (root / "src").is_dir():
        parser.error(f"{root} has no folder src")
    violations = check_all(root)
    for violation in violations:
        print(violation)
    print(f"check_includes: {len(violations)} violation(s)" if violations else "check_includes: all rules hold")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
