"""What a budget has chosen, for people: the trade-off as a picture, the layers as a table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from lightning_cco.budget.plan import TITLES, BudgetPlan, Point
from lightning_cco.monitoring.tables import text_table
from lightning_cco.names import csv_cell, printable
from lightning_cco.number_format import figure, short_figure

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 440, 90, 30, 44, 56
_LINE, _CHOSEN, _UNIFORM, _GRID = (24, 66, 122), (198, 40, 40), (35, 147, 74), (222, 226, 230)
_TEXT = 16
"""Height of a line of text."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""
HEADER = ["layer", "form", "weights", "reads", "bytes", "µs", "loss rise", "reason"]


def trade_off(plan: BudgetPlan) -> Image.Image:
    """Draw the expected rise of the loss (logarithmic) against what the goal counts: the best plans as a line, the others as points.

    If times of layers are known, there are two charts: against the size, and against the speed.

    Args:
        plan: The budget's plan.

    Returns:
        An RGB image.
    """
    by = plan.goal if plan.goal in TITLES and plan.goal != "speed" else "size"
    curve = plan.size_curve if plan.by == "speed" else plan.curve
    if not plan.speed_curve:
        return _trade_off(plan, by, curve)
    parts = [_trade_off(plan, by, curve), _trade_off(plan, "speed", plan.speed_curve)]
    image = Image.new("RGB", (sum(part.width for part in parts), _HEIGHT), "white")
    for number, part in enumerate(parts):
        image.paste(part, (number * _WIDTH, 0))
    return image


def _trade_off(plan: BudgetPlan, by: str, curve: Sequence[Point]) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    uniform = [point for point in plan.uniform if math.isfinite(getattr(point, by))]
    points = [*curve, *uniform, plan.chosen]
    xs = [getattr(point, by) for point in points]
    ys = [point.rise for point in points if 0 < point.rise < math.inf]
    floor = min(ys, default=1e-6)
    low_x, high_x = _widened(math.log(max(min(xs), 1e-9)), math.log(max(*xs, 1e-9)))
    low_y, high_y = _widened(math.log(floor), math.log(max(ys, default=1.0)))

    def at(point: Point) -> tuple[float, float]:
        x = (math.log(max(getattr(point, by), 1e-9)) - low_x) / (high_x - low_x)
        y = (math.log(min(max(point.rise, floor), math.exp(high_y))) - low_y) / (high_y - low_y)
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM)

    _legend(draw, font)
    draw.text((_LEFT, 12), f"Expected rise of the {plan.loss} of each plan", fill="black", font=font)
    for part in range(5):
        x, y = _LEFT + part / 4 * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - part / 4 * (_HEIGHT - _TOP - _BOTTOM)
        draw.line((x, _TOP, x, _HEIGHT - _BOTTOM), fill=_GRID)
        draw.line((_LEFT, y, _WIDTH - _RIGHT, y), fill=_GRID)
        draw.text(
            (x, _HEIGHT - _BOTTOM + 6), short_figure(math.exp(low_x + part / 4 * (high_x - low_x))), fill="black", font=font, anchor="ma"
        )
        draw.text((_LEFT - 8, y), short_figure(math.exp(low_y + part / 4 * (high_y - low_y))), fill="black", font=font, anchor="rm")
    draw.text(((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14), TITLES[by], fill="black", font=font, anchor="mb")
    line = [at(point) for point in sorted(curve, key=lambda point: float(getattr(point, by)))]
    if len(line) > 1:
        draw.line(line, fill=_LINE, width=2)
    for x, y in line:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_LINE)
    for point in uniform:
        x, y = at(point)
        draw.rectangle((x - 5, y - 5, x + 5, y + 5), fill=_UNIFORM)
    x, y = at(plan.chosen)
    draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=_CHOSEN, width=3)
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in [*_between(line), *map(at, uniform), at(plan.chosen)]]
    labels = [(f"chosen: {figure(getattr(plan.chosen, by), 3)}", at(plan.chosen), _CHOSEN)]
    for text, place, colour in [*labels, *((point.name, at(point), _UNIFORM) for point in uniform)]:
        box = _free_box(place, draw.textlength(text, font), taken)
        draw.text(box[:2], text, fill=colour, font=font)
        taken.append(box)
    return image


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    """What the colours are, from the right edge on."""
    x = float(_WIDTH - _RIGHT)
    for text, colour in (("chosen", _CHOSEN), ("equal bits", _UNIFORM), ("best plans", _LINE)):
        x -= draw.textlength(text, font)
        draw.text((x, 12), text, fill="black", font=font)
        draw.rectangle((x - 16, 15, x - 6, 25), fill=colour)
        x -= 32


def _between(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places on a line, a few pixels apart."""
    found = list(line)
    for (x, y), (then_x, then_y) in pairwise(line):
        steps = int(math.hypot(then_x - x, then_y - y) / 8)
        found += [(x + (then_x - x) * step / steps, y + (then_y - y) * step / steps) for step in range(1, steps)]
    return found


def _free_box(place: tuple[float, float], width: float, taken: Sequence[Box]) -> Box:
    """Where a label beside a point covers least of what is there, inside of the frame; of equal ones the nearest."""
    x, y = place
    corners = [(x + dx, y + dy) for far in (12, 26, 44) for dx, dy in _around(far, width)]
    boxes = [(left, top, left + width, top + _TEXT) for left, top in corners]
    inside = [box for box in boxes if box[0] > _LEFT and box[2] < _WIDTH - _RIGHT and box[1] > _TOP and box[3] < _HEIGHT - _BOTTOM]
    return min(inside or boxes, key=lambda box: sum(_covers(box, other) for other in taken))


def _around(far: float, width: float) -> list[tuple[float, float]]:
    """Upper left corners of a label to the right, to the left, above, below and across of a point."""
    right, left, middle = far, -far - width, -width / 2
    above, below, level = -far - _TEXT / 2, far - _TEXT / 2, -_TEXT / 2
    return [
        (right, level), (left, level), (middle, above), (middle, below), (right, above), (left, above), (right, below), (left, below)
    ]  # fmt: skip


def _covers(box: Box, other: Box) -> float:
    """The area that two boxes share."""
    width, height = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = max(0.05 * (high - low), 0.05)
    return low - margin, high + margin


def layer_rows(plan: BudgetPlan) -> list[list[str]]:
    """A row for each layer: how it runs, what that takes and costs, and why."""
    return [
        [
            entry.layer,
            entry.form,
            f"{entry.weights}",
            "-" if entry.activations == 32 else f"{entry.activations}",
            figure(entry.bytes),
            _or_dash(1e6 * entry.seconds),
            figure(entry.rise, 3),
            entry.reason,
        ]
        for entry in plan.layers
    ]


def budget_lines(plan: BudgetPlan, most: int = 40) -> list[str]:
    """What the log says of a budget's plan."""
    rows: Sequence[Sequence[str]] = layer_rows(plan)
    points = [["chosen", plan.chosen], *([point.name, point] for point in plan.uniform)]
    compared = [
        [
            str(name),
            figure(point.size, 3),
            figure(point.average_bits, 3),
            figure(point.bops, 3),
            _or_dash(point.speed),
            figure(point.rise, 3),
        ]
        for name, point in points
        if isinstance(point, Point)
    ]
    header = ["plan", "size", "bits per weight", "bit operations", "speed", f"expected rise of the {plan.loss}"]
    how = "as exported" if plan.measured else "as estimated"
    lines = [f"Budget, {plan.goal}: {plan.limit:g}. The file takes {plan.size_bytes:,.0f} bytes {how}, {plan.float_bytes:,.0f} in float."]
    lines += [text_table(header, compared, right=[1, 2, 3, 4, 5]), text_table(HEADER, rows[:most], right=[2, 3, 4, 5, 6])]
    if plan.times is not None:
        lines[0] += (
            f" One run of it takes {1e3 * plan.seconds:.3g} ms, {1e3 * plan.float_seconds:.3g} ms in float, as predicted for {plan.times.engine} "
        )
        lines[0] += f"on {printable(plan.times.processor)} with {plan.times.threads} thread{'s' if plan.times.threads > 1 else ''}."
    lines += [f"validated at {plan.by} {at}: {lost:.4g} of the metric lost" for at, lost in plan.metric.items()]
    return lines if len(rows) <= most else [*lines, f"… and {len(rows) - most} more (all are in budget.csv)"]


def _or_dash(value: float) -> str:
    return figure(value, 3) if math.isfinite(value) else "-"


def budget_csv(plan: BudgetPlan) -> str:
    """``budget.csv``: the table of layers, figures unrounded."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["layer", "form", "weights_num_bits", "reads_num_bits", "bytes", "seconds", "loss_rise", "reason"])
    for entry in plan.layers:
        writer.writerow(
            [
                csv_cell(entry.layer),
                entry.form,
                entry.weights,
                entry.activations,
                f"{entry.bytes:g}",
                "" if math.isnan(entry.seconds) else f"{entry.seconds:.6g}",
                f"{entry.rise:.9g}",
                csv_cell(entry.reason),
            ]
        )
    return text.getvalue()
