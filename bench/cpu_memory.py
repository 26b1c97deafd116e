"""By how much one long forward call grows a fresh process, beside its inputs and output. Linux.

Started by cpu_compare.py: cpu_memory.py flashcore|torch DTYPE; prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import flashcore as fc
import torch
import torch.nn.functional as F

SHAPE = (1, 8, 16384, 64)


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    library, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    call = fc.attention if library == "flashcore" else F.scaled_dot_product_attention
    warm = torch.ones((1, 8, 64, SHAPE[3]), dtype=dtype)
    call(warm, warm, warm)
    before = status("VmRSS")
    q, k, v = (torch.empty(SHAPE, dtype=dtype).normal_() for _ in range(3))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    out = call(q, k, v)
    growth = status("VmHWM") - before
    needed = sum(t.nbytes for t in (q, k, v, out))
    print(json.dumps({"library": library, "dtype": sys.argv[2], "shape": SHAPE, "needed": needed, "growth": growth}))


if __name__ == "__main__":
    main()
