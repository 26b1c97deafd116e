"""Times flashcore beside the attention of other libraries: same inputs, one process, interleaved, medians.

    python bench/compare.py                                  # the forward cases below
    python bench/compare.py "fwd bf16 b2 q8192 k8192 h16 d128 causal" …
    python bench/compare.py --save bench/results/NAME.json

Each peer's call is captured into a CUDA graph (so that host time does not count; the eager host time stands beside it)
and replayed in turn with the others for --rounds rounds. Inputs are random normal, never zeros. The error is that of a
sample of rows against float64; ours may be at most 1.2 times that of the most exact peer, and where it is more the cell
is marked and the exit status is 1. Peers are what can be imported: torch's SDPA backends, flash_attn, FlashAttention-3
(flash_attn_interface), and what --peers FILE adds (a dict PEERS of name to function(q, k, v, causal) on
(batch, seqlen, heads, head_dim) tensors).
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from pathlib import Path

import flashcore as fc
import torch
from results_file import output_of, provenance, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

TOKENS = 16384
HIDDEN = 2048
ERROR_LIMIT = 1.2  # our error over the most exact peer's
SMALL = ((1, 8, 512, 64), (1, 1, 32, 64), (1, 2, 64, 64), (1, 4, 128, 64), (4, 8, 256, 64))


def default_lines():
    lines = []
    for dim in (64, 128, 256):
        for seqlen in (512, 2048, 8192, 16384):
            for causal in ("", " causal"):
                batch, heads = TOKENS // seqlen, HIDDEN // dim
                lines.append(f"fwd bf16 b{batch} q{seqlen} k{seqlen} h{heads} d{dim}{causal}")
    lines.append("fwd bf16 b2 q8192 k8192 h32/8 d128 causal")
    lines += [f"fwd fp16 b{b} q{s} k{s} h{h} d{d}" for b, h, s, d in SMALL]
    return lines


def sizes_of(line):
    """The sizes of a plain forward line: everything that the peers can do as well."""
    match = re.fullmatch(r"fwd (fp16|bf16) b(\d+) q(\d+) k(\d+) h(\d+)(?:/(\d+))? d(\d+)( causal)?", line)
    if not match:
        raise SystemExit(f"{line!r}: only plain forward lines in canonical order can be compared")
    dtype, batch, seqlen_q, seqlen_k, heads_q, heads_k, dim, causal = match.groups()
    return {
        "dtype": torch.float16 if dtype == "fp16" else torch.bfloat16,
        "q": (int(batch), int(seqlen_q), int(heads_q), int(dim)),
        "k": (int(batch), int(seqlen_k), int(heads_k or heads_q), int(dim)),
        "causal": causal is not None,
    }


def sdpa(backend):
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(q, k, v, causal):
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
            )
        return out.transpose(1, 2)

    return call


def find_peers(extra):
    from torch.nn.attention import SDPBackend

    peers = {
        "flashcore": lambda q, k, v, causal: fc.attention(q, k, v, causal=causal, layout="bshd"),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    for name, module in (("FlashAttention-2", "flash_attn"), ("FlashAttention-3", "flash_attn_interface")):
        try:
            function = __import__(module).flash_attn_func
        except ImportError:
            continue
        peers[name] = lambda q, k, v, causal, f=function: f(q, k, v, causal=causal)
    if extra:
        scope = {"__file__": extra}
        exec(compile(Path(extra).read_text(), extra, "exec"), scope)
        peers.update(scope["PEERS"])
    return peers


def error_of(out, q, k, v, causal, rows=128):
    """Relative L2 error of a sample of rows of the last batch and head against float64."""
    seqlen_q, seqlen_k, head = q.shape[1], k.shape[1], q.shape[2] - 1
    head_k = head // (q.shape[2] // k.shape[2])
    sample = torch.randperm(seqlen_q, device=q.device)[:rows]
    scores = q[-1, sample, head].double() @ k[-1, :, head_k].double().T * q.shape[3] ** -0.5
    if causal:
        keys = torch.arange(seqlen_k, device=q.device)
        scores.masked_fill_(keys[None] > sample[:, None] + seqlen_k - seqlen_q, float("-inf"))
    exact = scores.softmax(-1) @ v[-1, :, head_k].double()
    return ((out[-1, sample, head].double() - exact).norm() / exact.norm()).item()


def error_ratio(results):
    """Our error over that of the most exact peer, NaN if ours is; None where there is nothing to compare."""
    others = [r["error"] for name, r in results.items() if name != "flashcore" and r["error"] == r["error"]]
    if not others or "flashcore" not in results:
        return None
    ours, best = results["flashcore"]["error"], min(others)
    return ours / best if best > 0 else (1.0 if ours == 0 else math.inf)


def too_inexact(case):
    ratio = case["error_to_best_peer"]
    return ratio is not None and not ratio <= ERROR_LIMIT  # NaN is


class Contender:
    """A peer on one case: its graph, its times and its error."""

    def __init__(self, name, call, inputs, causal):
        self.name, self.times = name, []

        def run():
            return call(*inputs, causal)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            out = run()
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.error = error_of(out, *inputs, causal)
        began = time.perf_counter()
        for _ in range(20):
            run()
        self.host_us = (time.perf_counter() - began) / 20 * 1e6
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run()  # kept: the graph writes to it

    def sample(self, replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(begin.elapsed_time(end) / replays * 1e3)


def run_case(line, peers, rounds):
    case = sizes_of(line)
    inputs = [torch.randn(case[n], device="cuda").to(case["dtype"]) for n in ("q", "k", "k")]
    contenders, failures = [], {}
    for name, call in peers.items():
        try:
            contenders.append(Contender(name, call, inputs, case["causal"]))
        except Exception as reason:  # a peer that cannot do the case is no reason to stop
            failures[name] = f"{type(reason).__name__}: {reason}"[:200]
            torch.cuda.synchronize()
    for each in contenders:
        each.sample(3)
    fastest = min(each.times[-1] for each in contenders)
    replays = max(1, min(200, int(2000 / fastest)))
    for each in contenders:
        each.times.clear()
    for _ in range(rounds):
        for each in contenders:
            each.sample(replays)
    batch, seqlen_q, heads, dim = case["q"]
    flops = 4 * batch * heads * seqlen_q * case["k"][1] * dim / (2 if case["causal"] else 1)
    results = {
        each.name: {
            "us": statistics.median(each.times),
            "us_min": min(each.times),
            "us_max": max(each.times),
            "tflops": flops / statistics.median(each.times) / 1e6,
            "host_us": each.host_us,
            "error": each.error,
        }
        for each in contenders
    }
    others = [r["us"] for name, r in results.items() if name != "flashcore"]
    ratio = min(others) / results["flashcore"]["us"] if others and "flashcore" in results else None
    kernel = fc.supports(*(t for t in inputs), causal=case["causal"], layout="bshd").kernel
    return {
        "line": line,
        "kernel": kernel,
        "ratio_to_best_peer": ratio,
        "error_to_best_peer": error_ratio(results),
        "results": results,
        "failures": failures,
    }


def machine():
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": output_of("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **provenance("torch"),
    }


def print_table(cases):
    names = list(dict.fromkeys(name for case in cases for name in case["results"]))
    table = Table(title="TFLOP/s (µs where under 20), graph replay")
    for column in ("case", *names, "ratio to best peer", "error", "error to best peer"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        cells = [case["results"].get(name) for name in names]
        shown = ["-" if c is None else f"{c['us']:.1f} µs" if c["us"] < 20 else f"{c['tflops']:.0f}" for c in cells]
        ratio = case["ratio_to_best_peer"]
        ours, error = case["results"].get("flashcore"), case["error_to_best_peer"]
        error_cell = "-" if error is None else f"{error:.2f}"
        if too_inexact(case):
            error_cell = f"[bold red]{error_cell} > {ERROR_LIMIT}[/]"
        table.add_row(
            case["line"],
            *shown,
            "-" if ratio is None else f"{ratio:.3f}",
            "-" if ours is None else f"{ours['error']:.1e}",
            error_cell,
        )
    Console(width=180).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", help="problem lines")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", help="a Python file with more peers")
    parser.add_argument("--save", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/compare.py needs a CUDA device")
    peers = find_peers(arguments.peers)
    lines = arguments.lines or default_lines()
    cases = [run_case(line, peers, arguments.rounds) for line in track(lines, "comparing")]
    print_table(cases)
    if arguments.save:
        save(arguments.save, machine(), cases=cases)
    inexact = [case["line"] for case in cases if too_inexact(case)]
    if inexact:
        sys.exit(f"error above {ERROR_LIMIT} times the most exact peer's: " + "; ".join(inexact))


if __name__ == "__main__":
    main()
