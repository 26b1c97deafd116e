"""Prints what the compiler made of each CUDA kernel: registers, local and shared memory, code size; and what it took.

    python bench/kernel_report.py                    # build/release
    python bench/kernel_report.py build/ci           # a build folder
    python bench/kernel_report.py libflashcore.so    # a library, an object file, a Python module
    python bench/kernel_report.py build/ci --only sm90 --save report.json

Registers, stack and static shared memory are cuobjdump's word for the machine code in the library (CUDA toolkit, or
pip install nvidia-cuda-cuobjdump). Spilled registers are in the stack. Hopper kernels move registers from warpgroup to
warpgroup and ask for shared memory at launch: a few lines of CUDA are compiled to read both from src/kernels/sm90, if
nvcc is there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
TRAITS = re.compile(r"flashcore::sm90::\w+<(flashcore::sm90::\w*Traits<.*>)\s*>\(")

#: prints a kernel's shared memory, and the registers of its producer and consumers where it has such
ASK = """#include <cstdio>
#include "kernels/sm90/fwd.cuh"
#include "kernels/sm90/fwd_small.cuh"
using namespace flashcore::sm90;

template <class T>
auto tell() -> decltype(T::kTile, void()) {
  std::printf("%d %d %d\\n", SharedPlan<T>::kBytes, T::kTile.producer_registers, T::kTile.consumer_registers);
}

template <class T>
auto tell() -> decltype(T::kPairs, void()) {
  std::printf("%d\\n", small_shared_bytes<T>(kSmallParts));
}
"""


@dataclass
class Kernel:
    """One kernel for one architecture. Memory and code in bytes; None: not known."""

    name: str
    arch: str
    registers: int
    stack: int
    static_shared: int
    code: int | None = None
    producer_registers: int | None = None
    consumer_registers: int | None = None
    dynamic_shared: int | None = None


def run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    if result.returncode != 0:
        sys.exit(f"kernel_report: {command[0]} failed:\n{result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def tool(name: str, *folders: Path) -> Path | None:
    """A program on PATH, or in one of these folders."""
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    return Path(found) if found else None


def find_cuobjdump() -> Path:
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = tool("cuobjdump", Path("/usr/local/cuda/bin"), *sorted(wheels.glob("cu*/bin")))
    if not found:
        sys.exit("kernel_report: no cuobjdump on PATH or in the CUDA toolkit; pip install nvidia-cuda-cuobjdump")
    return found


def find_library(place: Path) -> Path:
    if place.is_file():
        return place
    names = ("libflashcore.so", "libflashcore.a", "_core.abi3.so")
    found = next((place / name for name in names if (place / name).exists()), None)
    if not found:
        sys.exit(f"kernel_report: {place} holds none of {', '.join(names)}; give a build folder or a library")
    return found


def demangled(names: list[str]) -> list[str]:
    filt = tool("c++filt") or tool("cu++filt")
    if not filt:
        return names
    return subprocess.run([filt], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()


def resource_usage(text: str) -> list[tuple[str, str, list[int]]]:
    """Architecture, mangled name and the four numbers of every function in cuobjdump's output."""
    functions, arch, name = [], "", ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif (match := USAGE.search(line)) and name:
            functions.append((arch, name, [int(number) for number in match.groups()]))
            name = ""
    return functions


def code_sizes(cuobjdump: Path, library: Path) -> dict[tuple[str, str], int]:
    """Bytes of machine code by architecture and mangled name, from the section headers of the device's ELF files."""
    readelf = tool("readelf")
    if not readelf:
        return {}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cuobjdump, "-xelf", "all", library.resolve()], capture_output=True, cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = cubin.name.split(".")[-2]
            sections = subprocess.run([readelf, "-SW", cubin], capture_output=True, text=True).stdout
            for name, size in re.findall(r"\] \.text\.(\S+)\s+PROGBITS\s+\S+ \S+ (\S+)", sections):
                sizes[arch, name] = int(size, 16)
    return sizes


def read_kernels(library: Path) -> list[Kernel]:
    cuobjdump = find_cuobjdump()
    functions = resource_usage(run(cuobjdump, "-res-usage", library))
    sizes = code_sizes(cuobjdump, library)
    names = demangled([name for _, name, _ in functions])
    kernels = [
        Kernel(pretty, arch, registers, max(stack, local), shared, sizes.get((arch, mangled)))
        for pretty, (arch, mangled, (registers, stack, shared, local)) in zip(names, functions, strict=True)
    ]
    return sorted(kernels, key=lambda k: (k.name, k.arch))


def ask_the_sources(kernels: list[Kernel]) -> None:
    """Fills in what the kernels of src/kernels/sm90 ask for at launch."""
    nvcc = tool("nvcc", Path("/usr/local/cuda/bin"))
    hopper = [(kernel, match[1]) for kernel in kernels if (match := TRAITS.match(kernel.name.removeprefix("void ")))]
    if not nvcc or not hopper:
        return
    lines = [f"  tell<{traits}>();" for _, traits in hopper]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "ask.cu", Path(folder) / "ask"
        source.write_text("\n".join([ASK, "int main() {", *lines, "}"]) + "\n")
        flags = ["-std=c++17", "-arch=sm_90a", f"-I{ROOT}/include", f"-I{ROOT}/src"]
        built = subprocess.run([nvcc, *flags, source, "-o", program], capture_output=True, text=True)
        if built.returncode != 0:
            print(f"kernel_report: src/kernels/sm90 could not be asked:\n{built.stderr}", file=sys.stderr)
            return
        answers = run(program).splitlines()
    for (kernel, _), answer in zip(hopper, answers, strict=True):
        kernel.dynamic_shared, *registers = map(int, answer.split())
        if registers:
            kernel.producer_registers, kernel.consumer_registers = registers


def compile_seconds(build: Path) -> dict[str, float]:
    """Seconds that each CUDA file took in the last build by ninja, slowest first."""
    log = build / ".ninja_log"
    if not log.is_file():
        return {}
    seconds = {}
    for line in log.read_text().splitlines()[1:]:
        begin, end, _, target, _ = line.split("\t")
        if target.endswith(".cu.o"):
            seconds[re.sub(r"^.*\.dir/|\.o$", "", target)] = (int(end) - int(begin)) / 1000
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def short(name: str) -> str:
    """The name without return type, arguments and namespaces."""
    name = re.sub(r"\(flashcore::sm90::FwdKind\)(\d)", lambda m: ("full", "positional", "general")[int(m[1])], name)
    name = re.sub(r"\((?:int|bool|unsigned int)\)", "", name.removeprefix("void "))
    name = re.sub(r"\([^()]*\)$", "", name.replace("(anonymous namespace)::", ""))
    return re.sub(r"flashcore::(?:detail::)?", "", name)


def print_kernels(kernels: list[Kernel], console: Console) -> None:
    table = Table(title="kernels, as compiled")
    for column in ("kernel", "for", "registers", "stack", "shared", "+ at launch", "code"):
        table.add_column(column, justify="left" if column in ("kernel", "for") else "right", overflow="fold")
    for k in kernels:
        registers = str(k.registers)
        if k.consumer_registers is not None:
            registers += f" → {k.producer_registers}/{k.consumer_registers}"
        stack = f"[red]{k.stack}[/]" if k.stack else "0"
        launch = "-" if k.dynamic_shared is None else str(k.dynamic_shared)
        code = "-" if k.code is None else f"{k.code / 1024:.1f} KB"
        table.add_row(short(k.name), k.arch, registers, stack, str(k.static_shared), launch, code)
    console.print(table)


def print_files(seconds: dict[str, float], console: Console) -> None:
    table = Table("file", title=f"compiling CUDA: {sum(seconds.values()):.0f} s of one core")
    table.add_column("seconds", justify="right")
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", nargs="?", type=Path, default=ROOT / "build/release", help="build folder or library")
    parser.add_argument("--only", default="", help="kernels and files with this in their names")
    parser.add_argument("--save", type=Path, help="write the report to this JSON file as well")
    arguments = parser.parse_args()
    library = find_library(arguments.place)
    kernels = [kernel for kernel in read_kernels(library) if arguments.only in kernel.name]
    ask_the_sources(kernels)
    taken = compile_seconds(arguments.place if arguments.place.is_dir() else arguments.place.parent)
    seconds = {name: s for name, s in taken.items() if arguments.only in name}
    console = Console(width=150)
    print_kernels(kernels, console)
    if seconds:
        print_files(seconds, console)
    if arguments.save:
        report = {"kernels": [asdict(kernel) for kernel in kernels], "compile_seconds": seconds}
        arguments.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
