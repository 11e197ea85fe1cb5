"""A picture of layer × epoch: which layers resist, and whether training helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MOST_LAYERS = 60
_MOST_EPOCHS = 40
_ROW, _MARGIN, _SIZE = 20, 12, 13
_COLD, _WARM, _HOT = (232, 244, 233), (255, 213, 79), (198, 40, 40)
_UNKNOWN = (224, 224, 224)


def heat_map(history: Sequence[tuple[int, Mapping[str, float]]], threshold: float | None = None) -> Image.Image:
    """Draw Quantization Sensitivity by layer (rows, graph order) and epoch (columns), on a logarithmic scale of colours.

    Args:
        history: For each measured epoch its number and the QS by layer; the last row decides which layers are drawn if there are more than 60:
            the most sensitive ones. Of more than 40 epochs the first and the last ones are drawn.
        threshold: Values above are printed in bold red.

    Returns:
        An RGB image; where a layer was not measured the cell is grey.
    """
    names = list(dict.fromkeys(name for _, values in history for name in values))
    latest = history[-1][1] if history else {}
    total = len(names)
    if total > _MOST_LAYERS:
        worst = sorted(names, key=lambda name: -_orderable(latest.get(name, 0.0)))[:_MOST_LAYERS]
        names = [name for name in names if name in set(worst)]
    epochs = list(history)
    if len(epochs) > _MOST_EPOCHS:
        epochs = [*epochs[: _MOST_EPOCHS // 4], *epochs[-(_MOST_EPOCHS - _MOST_EPOCHS // 4) :]]
    font = ImageFont.load_default(_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label = max([int(measure.textlength(name, font=font)) for name in names] + [60]) + 2 * _MARGIN
    cell = 64 if len(epochs) <= 15 else 44
    width = label + max(cell * len(epochs), 330) + _MARGIN
    top = 3 * _ROW + _MARGIN
    image = Image.new("RGB", (width, top + _ROW * len(names) + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    shown = f"the {_MOST_LAYERS} most sensitive of {total} layers" if total > _MOST_LAYERS else f"{total} layers"
    draw.text((_MARGIN, 6), f"Quantization Sensitivity (L2 norm), {shown}", fill="black", font=font)
    finite = [v for _, values in epochs for n, v in values.items() if n in set(names) and math.isfinite(v) and v > 0]
    low, high = (math.log(min(finite)), math.log(max(finite))) if finite else (0.0, 1.0)
    _scale(draw, font, label, low, high)
    for column, (epoch, values) in enumerate(epochs):
        x = label + cell * column
        draw.text((x + cell / 2, top - 8), str(epoch), fill="black", font=font, anchor="mb")
        for row, name in enumerate(names):
            y = top + _ROW * row
            value = values.get(name)
            draw.rectangle((x, y, x + cell - 2, y + _ROW - 2), fill=_UNKNOWN if value is None else _colour(value, low, high))
            if value is not None:
                above = not math.isfinite(value) or (threshold is not None and value > threshold)
                draw.text((x + cell / 2 - 1, y + _ROW / 2 - 1), _short(value), fill=_ink(value, low, high, above), font=font, anchor="mm")
    draw.text((label - _MARGIN, top - 8), "epoch", fill="black", font=font, anchor="rb")
    for row, name in enumerate(names):
        above = threshold is not None and _orderable(latest.get(name, 0.0)) > threshold
        draw.text((label - _MARGIN, top + _ROW * row + _ROW / 2 - 1), name, fill=_HOT if above else "black", font=font, anchor="rm")
    return image


def _scale(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, x: int, low: float, high: float) -> None:
    y, steps, step = 30, 40, 4
    left = x + 50
    draw.text((left - 6, y + 6), _short(math.exp(low)), fill="black", font=font, anchor="rm")
    for i in range(steps):
        draw.rectangle((left + i * step, y, left + (i + 1) * step, y + 12), fill=_mix(i / (steps - 1)))
    draw.text((left + steps * step + 6, y + 6), _short(math.exp(high)), fill="black", font=font, anchor="lm")


def _orderable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _share(value: float, low: float, high: float) -> float:
    if not math.isfinite(value):
        return 1.0
    if value <= 0:
        return 0.0
    return (math.log(value) - low) / (high - low) if high > low else 0.5


def _colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    return _mix(_share(value, low, high))


def _mix(share: float) -> tuple[int, int, int]:
    start, end, share = (_COLD, _WARM, 2 * share) if share < 0.5 else (_WARM, _HOT, 2 * share - 1)
    mixed = np.asarray(start) + (np.asarray(end) - np.asarray(start)) * min(max(share, 0.0), 1.0)
    red, green, blue = (int(part) for part in mixed)
    return red, green, blue


def _ink(value: float, low: float, high: float, above: bool) -> tuple[int, int, int] | str:
    if _share(value, low, high) > 0.75:
        return "white"
    return _HOT if above else (60, 60, 60)


def _short(value: float) -> str:
    """Five characters at most."""
    if not math.isfinite(value):
        return str(value)
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e")
    if value >= 9999.5:
        return f"{value / 1000:.0f}k"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
