"""A picture of layer × epoch: which layers resist, and whether training helps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightning_cco.figures import badness, is_above, short_figure
from lightning_cco.names import printable

_MOST_LAYERS = 60
_MOST_EPOCHS = 40
_LONGEST = 80  # characters of a name
_ROW, _MARGIN, _SIZE = 20, 12, 13
_LOW, _MIDDLE, _HIGH = (
    (240, 246, 252),
    (133, 178, 217),
    (24, 66, 122),
)  # light to dark, so that it can be read without telling colours apart
_ABOVE = (198, 40, 40)
_UNKNOWN = (228, 228, 228)


def heat_map(
    history: Sequence[tuple[int, Mapping[str, float]]],
    threshold: float | None = None,
    suggested: Collection[str] = (),
    what: str = "Quantization Sensitivity",
) -> Image.Image:
    """Draw Quantization Sensitivity by layer (rows, graph order) and epoch (columns), on a logarithmic scale of colours.

    Args:
        history: For each measured epoch its number and the QS by layer; the last row decides which layers are drawn if there are more than 60:
            the most sensitive ones. Of more than 40 epochs the first and the last ones are drawn.
        threshold: Cells above are red, whatever the others are.
        suggested: Layers whose names are red, too, because a skip is suggested.
        what: What the values are.

    Returns:
        An RGB image; where a layer was not measured (it is in float) the cell is grey.
    """
    names = list(dict.fromkeys(name for _, values in history for name in values))
    latest = history[-1][1] if history else {}
    total = len(names)
    if total > _MOST_LAYERS:
        worst = set(sorted(names, key=lambda name: -badness(latest.get(name, 0.0)))[:_MOST_LAYERS])
        names = [name for name in names if name in worst]
    epochs = list(history)
    if len(epochs) > _MOST_EPOCHS:
        epochs = [*epochs[: _MOST_EPOCHS // 4], *epochs[-(_MOST_EPOCHS - _MOST_EPOCHS // 4) :]]
    font = ImageFont.load_default(_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    label = max([int(measure.textlength(printable(name, _LONGEST), font=font)) for name in names] + [60]) + 2 * _MARGIN
    cell = 64 if len(epochs) <= 15 else 44
    shown = f"the {_MOST_LAYERS} most sensitive of {total} layers" if total > _MOST_LAYERS else f"{total} layers"
    limit = f"; red: above {threshold:,.6g}" if threshold is not None else ""
    title = f"{what}, {shown}{limit}"
    width = max(label + max(cell * len(epochs), 330), _MARGIN + int(measure.textlength(title, font=font))) + _MARGIN
    top = 3 * _ROW + _MARGIN
    image = Image.new("RGB", (width, top + _ROW * len(names) + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 6), title, fill="black", font=font)
    limit_of_scale = math.inf if threshold is None else threshold  # what is above is red anyway
    finite = [qs for _, values in epochs for name in names if 0 < (qs := values.get(name, 0.0)) < math.inf and qs <= limit_of_scale]
    low, high = (math.log(min(finite)), math.log(max(finite))) if finite else (0.0, 1.0)
    _scale(draw, font, label, low, high)
    for column, (epoch, values) in enumerate(epochs):
        x = label + cell * column
        draw.text((x + cell / 2, top - 8), str(epoch), fill="black", font=font, anchor="mb")
        for row, name in enumerate(names):
            y = top + _ROW * row
            value = values.get(name)
            above = value is not None and is_above(value, threshold)
            fill = _UNKNOWN if value is None else _ABOVE if above else _mix(_share(value, low, high))
            draw.rectangle((x, y, x + cell - 2, y + _ROW - 2), fill=fill)
            if value is not None:
                ink = "white" if above or _share(value, low, high) > 0.6 else "black"
                draw.text((x + cell / 2 - 1, y + _ROW / 2 - 1), short_figure(value), fill=ink, font=font, anchor="mm")
    draw.text((label - _MARGIN, top - 8), "epoch", fill="black", font=font, anchor="rb")
    for row, name in enumerate(names):
        above = name in suggested or is_above(latest.get(name, 0.0), threshold)
        draw.text(
            (label - _MARGIN, top + _ROW * row + _ROW / 2 - 1),
            printable(name, _LONGEST),
            fill=_ABOVE if above else "black",
            font=font,
            anchor="rm",
        )
    return image


def _scale(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, x: int, low: float, high: float) -> None:
    y, steps, step = 30, 40, 4
    left = x + 50
    draw.text((left - 6, y + 6), short_figure(math.exp(low)), fill="black", font=font, anchor="rm")
    for i in range(steps):
        draw.rectangle((left + i * step, y, left + (i + 1) * step, y + 12), fill=_mix(i / (steps - 1)))
    draw.text((left + steps * step + 6, y + 6), short_figure(math.exp(high)), fill="black", font=font, anchor="lm")


def _share(value: float, low: float, high: float) -> float:
    if not math.isfinite(value):
        return 1.0
    if value <= 0:
        return 0.0
    return (math.log(value) - low) / (high - low) if high > low else 0.5


def _mix(share: float) -> tuple[int, int, int]:
    start, end, share = (_LOW, _MIDDLE, 2 * share) if share < 0.5 else (_MIDDLE, _HIGH, 2 * share - 1)
    mixed = np.asarray(start) + (np.asarray(end) - np.asarray(start)) * min(max(share, 0.0), 1.0)
    red, green, blue = (int(part) for part in mixed)
    return red, green, blue
