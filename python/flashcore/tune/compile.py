"""A tile made into a shared library: src/kernels/sm90/fwd_tune.cu of a checkout, compiled by nvcc, kept for next time.

A kernel that spills registers, or whose products ptxas puts one after the other, is refused, as the build refuses it
(cmake/CompileWithoutSpills.cmake).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from .instance import Instance
from .space import Tile

FOLDER = Path("src/kernels")
ENTRY = FOLDER / "sm90/fwd_tune.cu"
SHAPES = FOLDER / "ptx/wgmma_shapes.cuh"
OTHERS = (FOLDER / "common/tensor_map.cpp", FOLDER.parent / "cuda/driver.cpp")
#: what the entry is made of
SOURCES = ("include", "src/cuda", "src/kernels/common", "src/kernels/ptx", "src/kernels/sm90", "src/kernels/tile")
ARCH = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", ARCH, "-Xcompiler=-fPIC,-fvisibility=hidden")
LINK = ("-shared", "-cudart=static", "-Xlinker=-z,defs", ARCH)
#: a compiler that is not done after so many seconds never will be
LIMIT = 300.0
USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
SERIALISED = re.compile(r"\((C75\d\d)\)")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Build:
    """What came of a tile: a library, or the reason why there is none."""

    library: Optional[Path] = None
    reason: str = ""
    registers: int = 0  #: of each thread as the kernel starts


class Stopped(Exception):
    """The compiler was stopped from outside."""


def find_source(given: Optional[Path]) -> Path:
    """The checkout whose kernels are tuned: the given one, that of the current folder, or the package's own. Raises
    ValueError where there is none."""
    if given:
        if not (given / ENTRY).is_file():
            raise ValueError(f"--source {given}: no checkout of flashcore; it has no {ENTRY}")
        return given.resolve()
    here = Path.cwd()
    for folder in (here, *here.parents, *Path(__file__).resolve().parents):
        if (folder / ENTRY).is_file():
            return folder
    raise ValueError(f"no sources to compile: run this in a checkout of flashcore (with {ENTRY}), or say --source DIR")


def find_nvcc() -> str:
    """Raises ValueError where there is none."""
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    guesses = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    guesses += [str(Path(home) / "bin/nvcc") for home in (*homes, "/usr/local/cuda") if home]
    for guess in guesses:
        if guess and os.access(guess, os.X_OK):
            return guess
    raise ValueError("no nvcc: searching for tiles compiles kernels. Put CUDA's nvcc (12.5 or newer) on the PATH")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcore" / "tune"


def widths_of(source: Path) -> tuple[int, ...]:
    """The wgmma shapes that the sources have wrappers for, in columns."""
    found = re.findall(r"struct Wgmma<(\d+),", (source / SHAPES).read_text(encoding="utf-8"))
    return tuple(sorted({int(width) for width in found}))


def _files(source: Path) -> Iterator[Path]:
    for folder in SOURCES:
        yield from sorted(path for path in (source / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
    yield from sorted((source / FOLDER).glob("*.h"))


class Compiler:
    """Builds tiles of one instance. Threads may call `build` at the same time."""

    def __init__(self, source: Path, instance: Instance, cache: Path, nvcc: Optional[str] = None) -> None:
        self.source, self.instance = source, instance
        self._nvcc = nvcc or find_nvcc()
        self._cache = cache
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._others = [threading.Lock() for _ in OTHERS]
        self._stopped = False
        cache.mkdir(parents=True, exist_ok=True)
        text = hashlib.sha256(self._run([self._nvcc, "--version"]).encode())
        for path in _files(source):
            text.update(f"{path.relative_to(source)}\n".encode() + path.read_bytes())
        #: of the sources and the compiler: what results have in common that compare
        self.digest = text.hexdigest()[:16]

    def incumbent(self) -> Tile:
        """The tile that tiles.h has for this instance."""
        program = f"""#include <cstdio>
#include "tiles.h"
using namespace flashcore::sm90;
int main() {{
  constexpr FwdTile t = fwd_tile({self.instance.bucket}, FwdKind::{self.instance.kind}, FwdSize::large);
  std::printf("[%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d]", t.block_m, t.block_n, t.stages, t.q_buffers, t.separate_out,
              t.rescale_early, t.producer_registers, t.consumer_registers, t.growth, t.section_mib, t.octaves_from);
}}
"""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tile.cpp")
            path.write_text(program, encoding="utf-8")
            include = f"-I{self.source / ENTRY.parent}"
            self._run([self._nvcc, "-std=c++17", include, str(path), "-o", str(path.with_suffix(""))])
            m, n, stages, buffers, separate, early, *rest = json.loads(self._run([str(path.with_suffix(""))]))
        return Tile(m, n, stages, buffers, bool(separate), bool(early), *rest)

    def build(self, tile: Optional[Tile]) -> Build:
        """`None` is the tile of tiles.h. Raises Stopped, and RuntimeError where a part fails that has no tile."""
        header = self._header(tile)
        name = hashlib.sha256((self.digest + " ".join((*FLAGS, *LINK)) + header).encode()).hexdigest()[:24]
        library, facts = self._cache / f"{name}.so", self._cache / f"{name}.json"
        if facts.is_file():
            known = json.loads(facts.read_text(encoding="utf-8"))
            if known["reason"] or library.is_file():
                return Build(None if known["reason"] else library, **known)
        with tempfile.TemporaryDirectory(dir=self._cache) as folder:
            work = Path(folder)
            (work / "instance.h").write_text(header, encoding="utf-8")
            build = self._build(work, library)
        self._keep(facts, {"reason": build.reason, "registers": build.registers})
        return build

    def stop(self) -> None:
        """Ends what is running; the threads in `build` come back with Stopped."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _header(self, tile: Optional[Tile]) -> str:
        lines = [
            f"#define FLASHCORE_TUNE_ELEMENT {self.instance.element}",
            f"#define FLASHCORE_TUNE_BUCKET {self.instance.bucket}",
            f"#define FLASHCORE_TUNE_KIND {self.instance.kind}",
        ]
        if tile:
            lines.append(f"#define FLASHCORE_FWD_TILE {tile.cpp(whole=True)}")
        return "\n".join(lines) + "\n"

    def _build(self, work: Path, library: Path) -> Build:
        header, object_file, linked = work / "instance.h", work / "fwd_tune.o", work / "linked.so"
        try:
            told = self._compile(ENTRY, object_file, "-Xptxas=-v", "-include", str(header))
        except RuntimeError as error:
            return Build(reason=f"does not compile: {_first_error(str(error))}")
        reason = objection(told)
        registers = max((int(count) for count in REGISTERS.findall(told)), default=0)
        if reason:
            return Build(reason=reason, registers=registers)
        others = [self._other(index) for index in range(len(OTHERS))]
        self._run([self._nvcc, *LINK, str(object_file), *map(str, others), "-o", str(linked)])
        os.replace(linked, library)
        return Build(library, registers=registers)

    def _other(self, index: int) -> Path:
        """The object of a source that all tiles share."""
        path = self._cache / f"{self.digest}.{OTHERS[index].name}.o"
        with self._others[index]:
            if not path.is_file():
                partial = path.with_name(f".{os.getpid()}.{path.name}")
                self._compile(OTHERS[index], partial)
                os.replace(partial, path)
        return path

    def _compile(self, source: Path, target: Path, *flags: str) -> str:
        folders = [f"-I{self.source / 'include'}", f"-I{self.source / 'src'}"]
        return self._run([self._nvcc, *FLAGS, *folders, *flags, "-c", str(self.source / source), "-o", str(target)])

    def _run(self, command: list[str]) -> str:
        with self._lock:
            if self._stopped:
                raise Stopped
            try:
                process = subprocess.Popen(
                    command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise ValueError(f"{command[0]} cannot be run: {error.strerror}") from None
            self._running.add(process)
        try:
            told = process.communicate(timeout=LIMIT)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise RuntimeError(f"error: not done after {LIMIT:.0f} s") from None
        finally:
            with self._lock:
                self._running.discard(process)
        if self._stopped:
            raise Stopped
        if process.returncode:
            raise RuntimeError(told)
        return told

    @staticmethod
    def _keep(path: Path, facts: dict[str, Any]) -> None:
        partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
        partial.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(partial, path)


def objection(told: str) -> str:
    """What speaks against a kernel in what ptxas says of it; empty if nothing does."""
    serialised = SERIALISED.search(told)
    if serialised:
        return f"products are serialised ({serialised[1]})"
    most = max((int(count) for usage in USAGE.findall(told) for count in usage), default=0)
    return f"spills {most} bytes" if most else ""


def _first_error(told: str) -> str:
    lines = [line.strip() for line in told.splitlines() if "error" in line]
    return (lines or told.strip().splitlines() or ["nothing was said"])[0][:300]
