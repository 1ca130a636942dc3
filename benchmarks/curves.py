"""Losses of several runs as one picture, from what benchmarks/train_runs.py --curves wrote.

    python benchmarks/curves.py optimizers.json docs/optimizers.svg --mean 25 --from-step 50

Each point is the mean of the losses logged within so many steps. Prints the last point of each run, which is in the
legend too, and its distance from the first run's.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900, 480, 60, 40, 20, 20
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")  # Okabe and Ito's


def smoothed(points: list[tuple[int, float]], width: int, first: int) -> list[tuple[float, float]]:
    """Means over stretches of `width` steps."""
    stretches: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        if step >= first:
            stretches.setdefault((step - 1) // width, []).append((step, loss))
    return [(fmean(step for step, _ in each), fmean(loss for _, loss in each)) for each in stretches.values()]


def svg(curves: dict[str, list[tuple[float, float]]]) -> str:
    """The picture, with grid and legend."""
    steps, losses = zip(*(point for curve in curves.values() for point in curve))
    low, high, last = min(losses), max(losses), max(steps)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for i in range(6):
        loss, step = low + (high - low) * i / 5, last * i / 5
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for number, (name, curve) in enumerate(curves.items()):
        color, points = COLORS[number % len(COLORS)], " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        label = f"{name}  {curve[-1][1]:.4f}"
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 16 + 17 * number}" fill="{color}" text-anchor="end">{label}</text>'
        )
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path)
    parser.add_argument("picture", type=Path, help="an .svg file")
    parser.add_argument("--mean", type=int, default=25, help="steps in a point")
    parser.add_argument("--from-step", type=int, default=1, help="leave out the steps before, where losses are high")
    arguments = parser.parse_args()
    read = json.loads(arguments.curves.read_text())
    curves = {name: smoothed(points, arguments.mean, arguments.from_step) for name, points in read.items()}
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    arguments.picture.write_text(svg(curves))
    first = next(iter(curves.values()))[-1][1]
    for name, curve in curves.items():
        print(f"{name}: {curve[-1][1]:.4f} ({curve[-1][1] / first - 1:+.2%})")


if __name__ == "__main__":
    main()
