"""Pictures of results: speed by sequence length, the ladder, the roofline. Needs matplotlib.

A `description` goes into the file, beside the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import ladder
from .cases import Case, parse
from .report import number
from .results import OURS, Data

FORMATS = (".png", ".svg")
FEW = 10
MARKERS = {"fwd": "o", "bwd": "s", "decode": "^"}
PHASES = {"fwd": "forward", "bwd": "backward", "decode": "decode"}


def check_path(path: Path) -> None:
    """Raises ValueError for a picture that could not be drawn, before anything is measured."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a picture's name ends in {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'flashcore[bench]'") from None


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, description: str) -> None:
    """The same picture gives the same bytes."""
    from matplotlib import rc_context

    metadata = {"Description": description} | ({"Date": None} if path.suffix == ".svg" else {})
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, dpi=110, metadata=metadata)


def _thousands(value: int) -> str:
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)


def _emphasis(name: str) -> dict[str, Any]:
    return {"linewidth": 2.6, "zorder": 3} if name == OURS else {"linewidth": 1.4, "alpha": 0.8}


def family(case: Case) -> str:
    """The row of panels that a case is drawn in: calls that differ in head_dim and length alone."""
    words = [PHASES[case.phase], case.dtype]
    words += [f"{case.heads_q // case.heads_k} heads share keys"] * (case.heads_q != case.heads_k)
    others = [word + value for word, value in case.words.items()]
    return ", ".join([*words, *(others or ([] if case.decode else ["full"]))])


def length(case: Case) -> int:
    """Where a case stands on the axis: its sequence length, in decode the keys in all caches."""
    return case.batch * case.seqlen_k if case.decode else case.seqlen_k


def by_seqlen(data: Data, path: Path, description: str = "") -> None:
    """Speed by sequence length, decode in GB/s: a column of panels for each head_dim, a row for each family."""
    panels: dict[tuple[str, int], list[tuple[Case, Data]]] = {}
    for entry in data["cases"]:
        case = parse(entry["line"])
        if entry["results"]:
            panels.setdefault((family(case), case.head_dim), []).append((case, entry))
    several = {key: members for key, members in panels.items() if len({length(case) for case, _ in members}) > 1}
    panels = several or panels  # a point alone is no curve, unless there is nothing else
    if not panels:
        raise ValueError(f"{path}: there is nothing to draw: no case was timed")
    families, dims = (list(dict.fromkeys(column)) for column in zip(*panels, strict=True))
    families, dims = sorted(families, key=lambda name: name.split(", ")[0] != PHASES["fwd"]), sorted(dims)
    figure = _figure(3.9 * len(dims) + 0.6, 3.0 * len(families) + 0.6)
    axes = figure.subplots(len(families), len(dims), squeeze=False, sharey="row")
    shown: dict[str, Any] = {}
    for row, name in enumerate(families):
        for column, dim in enumerate(dims):
            axis, members = axes[row][column], panels.get((name, dim))
            if members is None:
                axis.set_axis_off()
                continue
            _draw_panel(axis, members, shown)
            axis.set_title(f"{name}, head_dim {dim}", fontsize=10)
            axis.set_ylabel("" if column else "GB/s" if members[0][0].decode else "TFLOP/s")
        axes[row][0].set_ylim(bottom=0)  # once the whole row, which shares the axis, is drawn
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path, description)


def _draw_panel(axis: Any, members: list[tuple[Case, Data]], shown: dict[str, Any]) -> None:
    decode = members[0][0].decode
    for name in dict.fromkeys(name for _, entry in members for name in entry["results"]):
        rates = {length(c): e["results"][name] for c, e in reversed(members) if name in e["results"]}
        points = sorted((place, result["gbs" if decode else "tflops"]) for place, result in rates.items())
        colour = shown[name].get_color() if name in shown else f"C{len(shown)}"
        (line,) = axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, **_emphasis(name))
        shown.setdefault(name, line)
    ticks = sorted({length(case) for case, _ in members})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [_thousands(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("keys in all caches" if decode else "sequence length")
    axis.grid(alpha=0.3)


def climb(entry: Data, path: Path, description: str = "") -> None:
    """The ladder: a bar for each rung, with its speed-up over the first."""
    steps = ladder.climb(entry)
    if not steps:
        raise ValueError(f"{path}: there is nothing to draw: no kernel was timed")
    names = [ladder.label(entry, name) for name, _ in steps]
    scalar = steps[0][1]
    figure = _figure(8, 0.5 * len(steps) + 1.4)
    axis = figure.subplots()
    speeds = [scalar / us for _, us in steps]
    ours = [name == OURS or name.startswith("flashcore ") for name, _ in steps]
    bars = axis.barh(names, speeds, color=["C0" if mine else "0.7" for mine in ours])
    axis.bar_label(bars, [f" {speed:.1f}× ({number(us)} µs)" for speed, (_, us) in zip(speeds, steps, strict=True)])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(right=max(speeds) * 6)
    axis.set_xlabel(f"times the speed of {names[0]}")
    axis.set_title(entry["line"], fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path, description)


def roofline(data: Data, path: Path, description: str = "") -> None:
    """Speed over arithmetic intensity under the measured ceilings: what a case could reach, and what it does. A few
    cases are told apart by colour, many by their dtypes."""
    ceilings = data.get("ceilings")
    if not ceilings or not ceilings["matmul_tflops"]:
        raise ValueError(f"{path}: a roofline needs measured ceilings, which this result has not (they need torch)")
    entries = [(parse(entry["line"]), entry) for entry in data["cases"] if OURS in entry["results"]]
    entries = [(case, entry) for case, entry in entries if case.flops]  # empty calls have no place on its axes
    if not entries:
        raise ValueError(f"{path}: there is nothing to draw: no case with work was timed")
    figure = _figure(8.5, 5.6)
    axis = figure.subplots()
    colours = _draw_roofs(axis, ceilings, [case.flops / case.bytes for case, _ in entries])
    few = len(entries) <= FEW
    for index, (case, entry) in enumerate(entries):
        speed = entry["results"][OURS]["tflops"]
        colour = f"C{index}" if few else colours.get(case.dtype, "k")
        axis.plot(
            case.flops / case.bytes,
            speed,
            MARKERS[case.phase],
            color=colour,
            markersize=7,
            markeredgecolor="k",
            markeredgewidth=0.5,
            label=f"{case.line}: {speed:.3g} TFLOP/s" if few else None,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations for each byte that has to be moved")
    axis.set_ylabel("TFLOP/s")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    device = data.get("machine", {}).get("gpu") or data.get("machine", {}).get("processor", "")
    axis.set_title(f"{device}: ○ forward, □ backward, △ decode", fontsize=10)
    _save(figure, path, description)


def _draw_roofs(axis: Any, ceilings: Data, intensities: list[float]) -> dict[str, str]:
    """The colour of each dtype's roof: grey ones, so that the cases stand out."""
    bandwidth = ceilings["copy_gbs"] / 1e3  # TB/s: TFLOP/s for each operation a byte
    tops = ceilings["matmul_tflops"]
    low, high = min(*intensities, max(tops.values()) / bandwidth / 10) / 2, max(*intensities, 1.0) * 3
    colours = dict(zip(tops, ("0.2", "0.5", "0.7", "0.8"), strict=False))
    for dtype, top in tops.items():
        knee = top / bandwidth
        label = f"{dtype} matmul {top:.3g} TFLOP/s, copy {ceilings['copy_gbs']:.4g} GB/s"
        roof = [low * bandwidth, top, top]
        axis.plot([low, knee, max(high, knee * 3)], roof, color=colours[dtype], linewidth=1.8, label=label)
    return colours
