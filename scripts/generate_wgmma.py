"""Writes src/kernels/ptx/wgmma_shapes.cuh: one wrapper per wgmma shape, since PTX names every accumulator register.

Run it again after changing SHAPES; with --check it only says whether the file is current (exit code 1 if not).
"""

import argparse
import sys
from pathlib import Path

SHAPES = (32, 64, 80, 96, 112, 128, 176, 192, 256)  # N of m64nNk16
TYPES = {"detail::Float16": "f16", "detail::BFloat16": "bf16"}
TARGET = Path(__file__).resolve().parent.parent / "src/kernels/ptx/wgmma_shapes.cuh"

HEADER = """// wgmma.mma_async m64nNk16 with float accumulators: written by scripts/generate_wgmma.py, do not edit.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace flashcore::ptx {

/// d[N/2] (64×N, see wgmma.cuh) = A·B + (accumulate ? d : 0). `shared`: A and B by descriptor. `registers`: A as four
/// registers of 16-bit pairs. kTransposeB: B lies in memory as [k][n] instead of [n][k].
template <int N, class T>
struct Wgmma;
"""


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def wrapper(n, name, ptx_type, a_in_registers):
    count = n // 2
    first = count  # operand number after the accumulators
    a_args = ", ".join(f"std::uint32_t a{i}" for i in range(4)) if a_in_registers else "std::uint64_t a"
    a_ops = [f"%{first + i}" for i in range(4)] if a_in_registers else [f"%{first}"]
    a_text = "{" + ", ".join(a_ops) + "}" if a_in_registers else a_ops[0]
    b = first + len(a_ops)
    instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx_type}.{ptx_type}"
    flags = f"p, 1, 1, %{b + 2}" if a_in_registers else f"p, 1, 1, 0, %{b + 2}"
    a_binds = ", ".join(f'"r"(a{i})' for i in range(4)) if a_in_registers else '"l"(a)'
    lines = [
        "  template <int kTransposeB>",
        f"  static __device__ __forceinline__ void {'registers' if a_in_registers else 'shared'}(",
        f"      float (&d)[{count}], {a_args}, std::uint64_t b, int accumulate) {{",
        "    asm volatile(",
        f'        "{{.reg .pred p; setp.ne.b32 p, %{b + 1}, 0; {instruction} {{"',
    ]
    rows = chunks([f"%{i}" for i in range(count)], 16)
    lines += [f'        "{", ".join(row)}{"," if row is not rows[-1] else ""} "' for row in rows]
    lines.append(f'        "}}, {a_text}, %{b}, {flags};}}"')
    rows = [", ".join(row) for row in chunks([f'"+f"(d[{i}])' for i in range(count)], 6)]
    lines.append("        : " + ",\n          ".join(rows))
    lines.append(f'        : {a_binds}, "l"(b), "r"(accumulate), "n"(kTransposeB));')
    lines.append("  }")
    return lines


def text():
    lines = [HEADER]
    for n in SHAPES:
        for name, ptx_type in TYPES.items():
            lines += ["template <>", f"struct Wgmma<{n}, {name}> {{"]
            lines += wrapper(n, name, ptx_type, a_in_registers=False) + wrapper(n, name, ptx_type, a_in_registers=True)
            lines += ["};", ""]
    lines += ["}  // namespace flashcore::ptx", ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args().check:
        current = TARGET.read_text() == text()
        print(f"{TARGET.name} is {'current' if current else 'stale: run scripts/generate_wgmma.py'}")
        sys.exit(not current)
    TARGET.write_text(text())


if __name__ == "__main__":
    main()
