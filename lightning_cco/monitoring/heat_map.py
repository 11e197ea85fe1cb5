"""A picture of layer × epoch: which layers resist, and whether training helps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightning_cco.names import last_parts, printable
from lightning_cco.number_format import badness, is_above, short_figure

_MOST_LAYERS = 60
_MOST_EPOCHS = 40
_LONGEST, _LONGEST_PATH = 60, 40  # characters of a name and of the path of a module
_ROW, _MARGIN, _SIZE = 20, 12, 13
_LEGEND = 230  # pixels from the left to the words beside the scale
_LOW, _MIDDLE, _HIGH = (
    (240, 246, 252),
    (133, 178, 217),
    (24, 66, 122),
)  # light to dark, so that it can be read without telling colours apart
_ABOVE = (198, 40, 40)
_UNKNOWN = (228, 228, 228)
_MUTED = (91, 104, 117)


def heat_map(
    history: Sequence[tuple[int, Mapping[str, float]]],
    threshold: float | None = None,
    suggested: Collection[str] = (),
    what: str = "Quantization Sensitivity",
    paths: Mapping[str, str] | None = None,
) -> Image.Image:
    """Draw Quantization Sensitivity by layer (rows, graph order) and epoch (columns), on a logarithmic scale of colours.

    Args:
        history: For each measured epoch its number and the QS by layer; the last row decides which layers are drawn if there are more than 60:
            the most sensitive ones. Of more than 40 epochs the first and the last ones are drawn.
        threshold: Cells above are red, whatever the others are.
        suggested: Layers whose names are red, too, because a skip is suggested.
        what: What the values are.
        paths: Module of each layer, which is written before the name.

    Returns:
        An RGB image; where a layer was not measured (it is in float) the cell is grey. A line above says what the colours mean.
    """
    names, total = _shown_layers(history)
    epochs = list(history)
    if len(epochs) > _MOST_EPOCHS:
        epochs = [*epochs[: _MOST_EPOCHS // 4], *epochs[-(_MOST_EPOCHS - _MOST_EPOCHS // 4) :]]
    latest = history[-1][1] if history else {}
    scale = _Scale.of([values.get(name, 0.0) for _, values in epochs for name in names], threshold)
    font = ImageFont.load_default(_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    own = {name: printable(name, _LONGEST) for name in names}
    modules = {name: printable(last_parts((paths or {}).get(name, ""), _LONGEST_PATH)) for name in names}
    wide = max([int(measure.textlength(said, font=font)) for said in own.values()] + [60])
    before = max([int(measure.textlength(said, font=font)) for said in modules.values()] + [0])
    label = before + wide + (3 if before else 2) * _MARGIN
    cell = 64 if len(epochs) <= 15 else 44
    shown = f"the {_MOST_LAYERS} most sensitive of {total} layers" if total > _MOST_LAYERS else f"{total} layers"
    title = f"{what} by epoch, {shown}"
    unknown = any(name not in values for _, values in epochs for name in names)
    meaning, legend = _meaning(threshold, unknown, scale.known), _LEGEND if scale.known else _MARGIN
    widest = max(_MARGIN + int(measure.textlength(title, font=font)), legend + int(measure.textlength(meaning, font=font)))
    top = 3 * _ROW + _MARGIN
    image = Image.new("RGB", (max(label + cell * len(epochs), widest) + _MARGIN, top + _ROW * len(names) + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 6), title, fill="black", font=font)
    if scale.known:
        scale.draw(draw, font)
    draw.text((legend, 36), meaning, fill=_MUTED, font=font, anchor="lm")
    draw.text((label - _MARGIN, top - 8), "epoch", fill="black", font=font, anchor="rb")
    for row, name in enumerate(names):
        y = top + _ROW * row
        above = name in suggested or is_above(latest.get(name, 0.0), threshold)
        draw.text((label - _MARGIN, y + _ROW / 2 - 1), own[name], fill=_ABOVE if above else "black", font=font, anchor="rm")
        draw.text((_MARGIN, y + _ROW / 2 - 1), modules[name], fill=_MUTED, font=font, anchor="lm")
    for column, (epoch, values) in enumerate(epochs):
        x = label + cell * column
        draw.text((x + cell / 2, top - 8), str(epoch), fill="black", font=font, anchor="mb")
        for row, name in enumerate(names):
            y = top + _ROW * row
            value = values.get(name)
            fill, ink = scale.colours(value)
            draw.rectangle((x, y, x + cell - 2, y + _ROW - 2), fill=fill)
            if value is not None:
                draw.text((x + cell / 2 - 1, y + _ROW / 2 - 1), short_figure(value), fill=ink, font=font, anchor="mm")
    return image


def _shown_layers(history: Sequence[tuple[int, Mapping[str, float]]]) -> tuple[list[str], int]:
    """The layers that are drawn, in their order, and how many there are in all."""
    names = list(dict.fromkeys(name for _, values in history for name in values))
    latest = history[-1][1] if history else {}
    worst = set(sorted(names, key=lambda name: -badness(latest.get(name, 0.0)))[:_MOST_LAYERS])
    return [name for name in names if name in worst], len(names)


def _meaning(threshold: float | None, unknown: bool, scale: bool) -> str:
    said = ["the darker the higher, logarithmic"] if scale else []
    if threshold is not None:
        said.append(f"red: above {threshold:,.6g}")
    return "; ".join([*said, "grey: in float, not measured"] if unknown else said)


@dataclass(frozen=True)
class _Scale:
    """Logarithms of the least and of the largest value that has a colour of the scale (NaN: none has), and what is red."""

    low: float
    high: float
    threshold: float | None

    @classmethod
    def of(cls, values: Sequence[float], threshold: float | None) -> _Scale:
        most = math.inf if threshold is None else threshold  # what is above is red anyway
        finite = [value for value in values if 0 < value < math.inf and value <= most]
        return cls(math.log(min(finite)), math.log(max(finite)), threshold) if finite else cls(math.nan, math.nan, threshold)

    @property
    def known(self) -> bool:
        """Whether any value has a colour of the scale."""
        return not math.isnan(self.low)

    def colours(self, value: float | None) -> tuple[tuple[int, int, int], str]:
        """Of a cell, and of the figure in it."""
        if value is None:
            return _UNKNOWN, "black"
        if is_above(value, self.threshold):
            return _ABOVE, "white"
        share = self._share(value)
        return _mix(share), "white" if share > 0.6 else "black"

    def draw(self, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
        y, steps, step = 30, 40, 3
        left = _MARGIN + 44
        draw.text((left - 6, y + 6), short_figure(math.exp(self.low)), fill="black", font=font, anchor="rm")
        for i in range(steps):
            draw.rectangle((left + i * step, y, left + (i + 1) * step, y + 12), fill=_mix(i / (steps - 1)))
        draw.text((left + steps * step + 6, y + 6), short_figure(math.exp(self.high)), fill="black", font=font, anchor="lm")

    def _share(self, value: float) -> float:
        if not math.isfinite(value):
            return 1.0
        if value <= 0:
            return 0.0
        return (math.log(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5


def _mix(share: float) -> tuple[int, int, int]:
    start, end, share = (_LOW, _MIDDLE, 2 * share) if share < 0.5 else (_MIDDLE, _HIGH, 2 * share - 1)
    mixed = np.asarray(start) + (np.asarray(end) - np.asarray(start)) * min(max(share, 0.0), 1.0)
    red, green, blue = (int(part) for part in mixed)
    return red, green, blue
