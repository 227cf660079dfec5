"""Draws runs from their metrics.jsonl as one SVG: a panel for each metric, a curve for each run.

python -m sphinx_jax.training.plot runs/one runs/two --out runs.svg
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import tyro

from sphinx_jax.cli import common
from sphinx_jax.errors import UserError

WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM = 420, 260, 62, 24, 34, 40
COLOURS = ("#1f6fb4", "#d9542b", "#2e8b57", "#8a5fb0", "#b8860b", "#3aa6a6", "#c2457e", "#666666")

Curve = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw one or more runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path
    """The SVG file to write."""
    metrics: tuple[str, ...] = ()
    """What to draw, as named in metrics.jsonl, "held_out/NAME" for scores; loss and the held-out score by default."""


def main(argv: Sequence[str]) -> int:
    """Parse and draw; returns the exit code."""
    options = common.parse(Options, argv, "python -m sphinx_jax.training.plot", __doc__)
    if options.out.suffix != ".svg":
        raise UserError(f"--out {options.out}: must end in .svg")
    runs = {str(run): read(run) for run in options.runs}
    if not runs:
        raise UserError("no run was named; give one or more run directories")
    metrics = options.metrics or default_metrics(runs)
    known = sorted({name for curves in runs.values() for name in curves})
    for name in metrics:
        if name not in known:
            raise UserError(f"--metrics {name}: no run has it; there are {', '.join(known)}")
    options.out.write_text(draw(runs, metrics))
    return 0


def read(run: Path) -> dict[str, Curve]:
    """Each metric of a run as (step, value), in order. Raises UserError if there are none."""
    file = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read; name the directory of a run ({error})") from error
    curves: dict[str, Curve] = {}
    for record in records:
        scores = {f"held_out/{name}": value for name, value in record.get("held_out", {}).items()}
        for name, value in (record | scores).items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                curves.setdefault(name, []).append((record["step"], value))
    if not curves:
        raise UserError(f"{file}: no step was logged yet; train on")
    return curves


def default_metrics(runs: dict[str, dict[str, Curve]]) -> tuple[str, ...]:
    scores = dict.fromkeys(name for curves in runs.values() for name in curves if name.startswith("held_out/"))
    return ("loss", *list(scores)[:1])


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values from `least` to `most` along `pixels`, starting at pixel `origin`; logarithmic or not."""

    least: float
    most: float
    origin: float
    pixels: float
    log: bool = False

    def place(self, value: float) -> float:
        scale = math.log if self.log else float
        span = scale(self.most) - scale(self.least)
        return self.origin + self.pixels * ((scale(value) - scale(self.least)) / span if span else 0.5)

    def ticks(self) -> list[float]:
        """Round numbers within the axis: 1, 2 or 5 times a power of ten."""
        if self.log:
            powers = range(math.floor(math.log10(self.least)), math.ceil(math.log10(self.most)) + 1)
            return [v for p in powers for m in (1, 2, 5) if self.least <= (v := m * 10.0**p) <= self.most]
        rough = (self.most - self.least) / 4 or 1
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first, last = math.ceil(self.least / step), math.floor(self.most / step)
        return [n * step for n in range(first, last + 1)]


def draw(runs: dict[str, dict[str, Curve]], metrics: Sequence[str]) -> str:
    """The SVG: a panel a metric, side by side, and the runs' names below where there are several."""
    width = GAP + len(metrics) * (LEFT + WIDTH + GAP)
    legend = 18 * len(runs) if len(runs) > 1 else 0
    height = TOP + HEIGHT + BOTTOM + legend
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for number, metric in enumerate(metrics):
        parts += panel(
            metric, [curves.get(metric, []) for curves in runs.values()], number * (LEFT + WIDTH + GAP) + LEFT
        )
    for number, name in enumerate(runs if legend else ()):
        y = TOP + HEIGHT + BOTTOM + 18 * number
        parts.append(f'<rect x="{LEFT}" y="{y - 5}" width="18" height="3" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(text(LEFT + 26, y, name, "start"))
    return "\n".join([*parts, "</svg>\n"])


def panel(metric: str, curves: Sequence[Curve], left: float) -> list[str]:
    """Frame, ticks and curves of one metric, its axes' origin at `left`."""
    steps, values = zip(*(point for curve in curves for point in curve), strict=True)
    # Losses fall by orders of magnitude; shares do not.
    log = min(values) > 0 and max(values) > 10 * min(values)
    x = Axis(min(steps), max(steps), left, WIDTH)
    y = Axis(min(values), max(values), TOP + HEIGHT, -HEIGHT, log)
    parts = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#99a"/>']
    parts.append(text(left, TOP - 12, metric + (", logarithmic" if log else ""), "start"))
    for tick in x.ticks():
        parts.append(text(x.place(tick), TOP + HEIGHT + 16, f"{tick:g}", "middle"))
    for tick in y.ticks():
        height = y.place(tick)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{height:.1f}" y2="{height:.1f}" stroke="#e4e4ee"/>')
        parts.append(text(left - 6, height + 4, f"{tick:g}", "end"))
    for number, curve in enumerate(curves):
        points = " ".join(f"{x.place(step):.1f},{y.place(value):.1f}" for step, value in curve)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts


def text(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="#223">{escape(said)}</text>'


if __name__ == "__main__":
    sys.exit(common.run(main, sys.argv[1:]))
