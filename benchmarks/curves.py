"""Losses of several runs as one picture, from what benchmarks/train_runs.py --curves wrote.

    python benchmarks/curves.py optimizers.json docs/optimizers.svg --title "Optimizers, small" --mean 25 --from-step 50

Each point is the mean of the losses logged within so many steps. The lower panel has the difference of each run from
the first at the same step, which curves of nearly equal runs do not show. Prints the last point of each run, and its
distance from the first run's. Needs matplotlib (pip install 'swamla-titan[dev]').
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")  # Okabe and Ito's
# Text stays text, and the same data give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 10, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "legend.frameon": False}

Curve = list[tuple[float, float]]


def smoothed(points: list[tuple[int, float]], width: int, first: int) -> Curve:
    """Means over stretches of `width` steps."""
    stretches: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        if step >= first:
            stretches.setdefault((step - 1) // width, []).append((step, loss))
    return [(fmean(step for step, _ in each), fmean(loss for _, loss in each)) for each in stretches.values()]


def differences(curve: Curve, base: Curve) -> Curve:
    """`curve` minus `base`, at the steps that both have."""
    there = dict(base)
    return [(step, loss - there[step]) for step, loss in curve if step in there]


def draw(curves: dict[str, Curve], title: str, steps: int) -> Figure:
    """The curves, whose points are means over so many steps, and below them their differences from the first one."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        base, *_ = curves
        for color, (name, curve) in zip(COLORS * len(curves), curves.items()):
            above.plot(*zip(*curve), color=color, label=f"{name}: {curve[-1][1]:.4f}", linewidth=1.4)
            apart = differences(curve, curves[base])
            if name != base and apart:
                below.plot(*zip(*apart), color=color, linewidth=1.4)
        below.axhline(0, color=COLORS[0], linewidth=1.4)
        above.set(title=title, ylabel="loss (nats/token)")
        above.legend(title="run: last point")
        below.set_title(f"Difference from {base}", fontsize=10)
        below.set(xlabel=f"step (each point is the mean of {steps})", ylabel="nats/token")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path)
    parser.add_argument("picture", type=Path, help="an .svg file")
    parser.add_argument("--title", default="Training loss")
    parser.add_argument("--mean", type=int, default=25, help="steps in a point")
    parser.add_argument("--from-step", type=int, default=1, help="leave out the steps before, where losses are high")
    arguments = parser.parse_args()
    read = json.loads(arguments.curves.read_text())
    curves = {name: smoothed(points, arguments.mean, arguments.from_step) for name, points in read.items()}
    save(draw(curves, arguments.title, arguments.mean), arguments.picture)
    first = next(iter(curves.values()))[-1][1]
    for name, curve in curves.items():
        print(f"{name}: {curve[-1][1]:.4f} ({curve[-1][1] / first - 1:+.2%})")


def save(figure: Figure, path: Path) -> None:
    """Write the picture, without the time at which it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
