"""The text and colours of one node of a picture, as a Graphviz HTML-like label."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as html_escape
from textwrap import wrap

from lightning_cco.graph.layer import Shape
from lightning_cco.names import printable
from lightning_cco.number_format import figure, is_above, per_cent
from lightning_cco.quantization.plan import LayerDecision
from lightning_cco.quantization.skip_reasons import SkipReason

SANS = "Helvetica,Arial,sans-serif"
MONO = "Courier New,Courier,monospace"
TEXT, MUTED, RED = "#1B2530", "#5B6875", "#C81E1E"
_BAR = 64  # points
_WRAP = 52  # characters


@dataclass(frozen=True)
class Paint:
    """The colours of a node: fill, border, and the line between its head and its body."""

    fill: str
    border: str
    rule: str


BLUE = Paint("#DCE9FF", "#2962D9", "#A9C4F5")
GREEN = Paint("#DDF4E1", "#23934A", "#A3D9B1")
YELLOW = Paint("#FFF1BF", "#C99700", "#E8CF7A")
WHITE = Paint("#FFFFFF", "#7C8894", "#D5DBE1")


def mixed(share: float) -> Paint:
    """The colours between yellow (0) and green (1)."""

    def between(low: str, high: str) -> str:
        parts = [(int(low[at : at + 2], 16), int(high[at : at + 2], 16)) for at in (1, 3, 5)]
        return "#" + "".join(f"{round(start + share * (end - start)):02X}" for start, end in parts)

    return Paint(between(YELLOW.fill, GREEN.fill), between(YELLOW.border, GREEN.border), between(YELLOW.rule, GREEN.rule))


MIXED = mixed(0.5)


def node_label(title: str, kind: str, path: str, rows: Iterable[str], paint: Paint, border: int = 1) -> str:
    """Returns the label of a node: its name and type, its module path, and the given rows below a line."""
    beside = font(path, size=9, color=MUTED, face=MONO) if path and len(title) + len(kind) + len(path) <= _WRAP - 10 else ""
    left = f"<B>{escape(title)}</B>  {font(kind, size=11, color=MUTED)}"
    head = _cells(left, beside)
    if path and not beside:
        head += _row(font(path, size=9, color=MUTED, face=MONO))
    body = "".join(rows)
    return (
        f'<<TABLE BORDER="{border}" CELLBORDER="0" CELLSPACING="0" CELLPADDING="3" STYLE="ROUNDED" '
        f'BGCOLOR="{paint.fill}" COLOR="{paint.border}">{head}{_rule(paint) if body else ""}{body}</TABLE>>'
    )


def ghost_label(name: str) -> str:
    """Returns the label of the small copy of a node that is drawn next to a distant reader of it."""
    return (
        f'<<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="2" STYLE="ROUNDED,DASHED" COLOR="{WHITE.border}">'
        f"<TR><TD>{font('from ' + name, size=10, color=MUTED)}</TD></TR></TABLE>>"
    )


def shapes_row(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Returns the row with the input shapes, an arrow, and the output shapes; empty when there is neither."""
    parts = [text for text in (_shapes(inputs), _shapes(outputs)) if text]
    if not parts:
        return ""
    whole = " → ".join(parts)
    if len(whole) <= _WRAP or len(parts) == 1:
        return _row(font(whole, size=10, face=MONO))
    return _row(font(parts[0], size=10, face=MONO)) + _row(font("→ " + parts[1], size=10, face=MONO))


def attributes_rows(attributes: Mapping[str, object], limit: int = 4) -> str:
    """Returns the attributes in a few lines, each with as many as fit."""
    lines = [""]
    for key, value in attributes.items():
        item = f"{key} {_value(value)}"
        if lines[-1] and len(lines[-1]) + len(item) + 3 > _WRAP:
            lines.append("")
        lines[-1] += (" · " if lines[-1] else "") + (item if len(item) <= 2 * _WRAP else item[: 2 * _WRAP] + "…")
    if len(lines) > limit:
        lines[limit - 1 :] = [lines[limit - 1] + " …"]
    return "".join(_row(font(line, size=10, color=MUTED)) for line in lines if line)


def text_row(text: str, *, color: str = TEXT, bold: bool = False) -> str:
    """Returns a row with one short text."""
    return _row(font(text, size=10, color=color, bold=bold))


def reason_rows(decision: LayerDecision) -> str:
    """Returns how a layer runs that is not quantized, and why: in a few words what the recipe says, in full what the engine can't do."""
    bits = decision.activations_num_bits
    how = (
        "integer weights, computed in float"
        if decision.weight_only
        else f"computed in float, result rounded to {bits} bits"
        if bits is not None
        else "not quantized"
    )
    if decision.reason is None or decision.reason is SkipReason.WEIGHT_ONLY:
        said = how
    elif decision.detail and decision.reason in (SkipReason.ENGINE, SkipReason.UNSUPPORTED):
        said = f"{how}: {decision.detail}"
    else:
        said = f"{how}: {in_short(decision.reason)}"
    return "".join(text_row(line, color="#7A5B00", bold=True) for line in balanced(said))


def in_short(reason: SkipReason) -> str:
    """Returns a reason in a few words, for readers of a picture."""
    return _IN_SHORT[SkipReason(reason)]


_IN_SHORT = {
    SkipReason.TAIL: "tail of the model",
    SkipReason.SETTING: "as your recipe says",
    SkipReason.SUGGESTION: "too sensitive",
    SkipReason.BUDGET: "by the budget",
    SkipReason.ENGINE: "in float in this engine",
    SkipReason.WEIGHT_ONLY: "weights only",
    SkipReason.INTEGER: "holds integers",
    SkipReason.UNSUPPORTED: "no INT8 kernel",
    SkipReason.OUTPUT: "output",
}


def balanced(text: str, width: int = _WRAP) -> list[str]:
    """Returns a text in as few lines as the width allows, about equally long: the last one has more than one word.

    >>> balanced("not quantized: dropout is not part of the deployed model")
    ['not quantized: dropout is not', 'part of the deployed model']
    """
    lines = wrap(text, width)
    narrower = width - 1
    while narrower > 0 and len(closer := wrap(text, narrower, break_long_words=False)) == len(lines) and max(map(len, closer)) <= width:
        lines, narrower = closer, narrower - 1
    return lines


def status_row(bits: str, qs: float | None, largest: float, threshold: float | None, where: str = "") -> str:
    """Returns the last row: bits at the left, QS with its bar at the right; red above the threshold. Empty when there is neither."""
    if qs is None:
        return _row(font(bits, size=11, bold=True)) if bits else ""
    above = is_above(qs, threshold)
    color = RED if above else TEXT
    number = font(f"QS {figure(qs, 3)}{where}", size=11, color=color, bold=above)
    share = 1.0 if not math.isfinite(qs) else qs / largest if largest > 0 else 0.0
    bar = _bar(share, RED if above else "#6F7D8C")
    measured = _beside(number, bar)
    return _cells(font(bits, size=11, bold=True), measured, padding=0)


def share_row(quantized: int, total: int) -> str:
    """Returns the row of a folded module: a bar, green for the share of its layers with weights that is quantized, yellow for the rest, and the counts."""
    bar = _bar(quantized / total if total else 0.0, GREEN.border, "#F2C230")
    text = font(f"{quantized} of {total} with weights in INT8", size=10)
    return _cells(text, _beside("", bar), padding=0)


def percent_row(share: float) -> str:
    """Returns the row of a module: a bar, green for the share of it that runs in INT8 and yellow for the rest, and the share."""
    bar = _bar(share, GREEN.border, "#F2C230", _BAR // 2)
    return _cells(font(per_cent(share), size=11), bar, padding=0)


def swatch(paint: Paint) -> str:
    """Returns a small rounded box for the legend."""
    return (
        f'<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0" STYLE="ROUNDED" BGCOLOR="{paint.fill}" COLOR="{paint.border}">'
        '<TR><TD WIDTH="22" HEIGHT="12" FIXEDSIZE="TRUE"></TD></TR></TABLE>'
    )


def font(text: str, *, size: int, color: str = TEXT, face: str = "", bold: bool = False) -> str:
    """Returns escaped text in a font."""
    if not text:
        return " "
    inner = f"<B>{escape(text)}</B>" if bold else escape(text)
    return f'<FONT POINT-SIZE="{size}" COLOR="{color}"{f" FACE={chr(34)}{face}{chr(34)}" if face else ""}>{inner}</FONT>'


def escape(text: str) -> str:
    """Returns a text as an HTML-like label may hold it: on one line, at most 200 characters long."""
    return html_escape(printable(text, 200))


def type_name(kind: str) -> str:
    """Returns a kind as the name of a type: ``batch_norm`` as ``BatchNorm``."""
    return "".join(part[:1].upper() + part[1:] for part in kind.split("_"))


def _bar(share: float, color: str, rest: str = "#DFE4E8", length: int = _BAR) -> str:
    filled = round(length * min(max(share, 0.0), 1.0))
    cells = "".join(
        f'<TD WIDTH="{width}" HEIGHT="6" FIXEDSIZE="TRUE" BGCOLOR="{paint}"></TD>'
        for width, paint in ((filled, color), (length - filled, rest))
        if width
    )
    size = f'WIDTH="{length}" HEIGHT="6" FIXEDSIZE="TRUE"'  # else it is stretched over a wide node, with gaps between its parts
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0" ALIGN="RIGHT" {size}><TR>{cells}</TR></TABLE>'


def _beside(text: str, bar: str) -> str:
    cells = (f'<TD ALIGN="RIGHT">{text}</TD>' if text else "") + f'<TD WIDTH="{_BAR + 4}">{bar}</TD>'
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="2" ALIGN="RIGHT"><TR>{cells}</TR></TABLE>'


# Graphviz pads a cell on all sides alike: columns of their own keep texts and bars off the border at the left and at the right.
_SIDE = '<TD WIDTH="4" CELLPADDING="0"></TD>'


def _row(content: str) -> str:
    return f'<TR>{_SIDE}<TD COLSPAN="2" ALIGN="LEFT">{content}</TD>{_SIDE}</TR>'


def _cells(left: str, right: str, padding: int = 3) -> str:
    return f'<TR>{_SIDE}<TD ALIGN="LEFT">{left}</TD><TD ALIGN="RIGHT" CELLPADDING="{padding}">{right}</TD>{_SIDE}</TR>'


def _rule(paint: Paint) -> str:
    return f'<TR><TD COLSPAN="4" CELLPADDING="0" HEIGHT="1" FIXEDSIZE="FALSE" BGCOLOR="{paint.rule}"></TD></TR>'


def _shapes(shapes: Sequence[Shape]) -> str:
    """Returns shapes side by side, equal neighbours once with their number; after four kinds, how many more."""
    runs: list[tuple[str, int]] = []
    for shape in shapes:
        text = "×".join(map(str, shape)) or "scalar"
        if runs and runs[-1][0] == text:
            runs[-1] = (text, runs[-1][1] + 1)
        else:
            runs.append((text, 1))
    shown = [text if count == 1 else f"{count} of {text}" for text, count in runs[:3]]
    return ", ".join(shown) + (f" … {len(shapes)} in all" if len(runs) > 3 else "")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return "×".join(map(str, value)) if len(value) > 1 else str(value[0])
    return str(value)
