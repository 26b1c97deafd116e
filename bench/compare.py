"""The published table of the forward pass on a GPU: `python -m flashcore bench forward` beside its peers.

    python bench/compare.py                                  # the published cases
    python bench/compare.py "fwd bf16 b2 q8192 k8192 h16 d128 causal" …
    python bench/compare.py --save bench/results/NAME.json

`scripts/update_readme.py` makes README's table from the saved file. --peers FILE adds what a Python file gives: a dict
PEERS of name to function(q, k, v, causal) on (batch, seqlen, heads, head_dim) tensors.
"""

from __future__ import annotations

import argparse
import sys

from flashcore.__main__ import main as flashcore

PEERS = "sdpa-cudnn,sdpa-flash,flash-attn,flash-attn-3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", default=["forward"], help="problem lines")
    parser.add_argument("--rounds", default="100", help="rounds that count")
    parser.add_argument("--peers", help="a Python file with more peers")
    parser.add_argument("--inputs", default="normal", help="normal, or rising: scores that outgrow each other")
    parser.add_argument("--save", help="write the results to this JSON file")
    arguments = parser.parse_args()
    words = ["bench", *arguments.lines, "--device", "cuda", "--peers", PEERS, "--iterations", arguments.rounds]
    words += ["--inputs", arguments.inputs]
    words += ["--peer-file", arguments.peers] if arguments.peers else []
    words += ["--save", arguments.save] if arguments.save else []
    return flashcore(words)


if __name__ == "__main__":
    sys.exit(main())
