"""Numbers for people: how a figure is written, which of two is worse, and which is above a threshold."""

from __future__ import annotations

import math
import re


def figure(value: float, digits: int = 4) -> str:
    """A figure in so many significant digits; thousands apart; an exponent where people would have to count digits.

    >>> figure(12345.6), figure(1234.5), figure(0.00123456), figure(-31.4159), figure(9999.9), figure(float("nan"))
    ('12,346', '1,234', '0.001235', '-31.42', '10,000', 'nan')
    >>> figure(999.9, digits=3), figure(31.4159, digits=3)
    ('1,000', '31.4')
    >>> figure(2837384517668543488.0), figure(123456789.0)
    ('2.837e+18', '123,456,789')
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 10**digits - 0.5 <= abs(value) < 1e9 else f"{value:,.{digits}g}"


def short_figure(value: float) -> str:
    """A figure in five characters at most, for the cells of a picture.

    >>> short_figure(0.000123), short_figure(1.2345), short_figure(12345.0), short_figure(2.5e7)
    ('1e-4', '1.23', '12k', '2e7')
    """
    if not math.isfinite(value):
        return str(value)
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e")
    if value >= 9999.5:
        return f"{value / 1000:.0f}k"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def per_cent(share: float) -> str:
    """A part of a whole, from 0 to 1, as a whole number of per cent; all and nothing are never said of what is not quite that.

    >>> per_cent(0.5), per_cent(0.999), per_cent(1.0), per_cent(0.001)
    ('50 %', 'over 99 %', '100 %', 'under 1 %')
    """
    if 0.995 <= share < 1:
        return "over 99 %"
    return "under 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def number_of(count: int, many: str, one: str) -> str:
    """So many of something.

    >>> number_of(1, "held batches", "batch"), number_of(2, "steps", "step")
    ('1 held batch', '2 steps')
    """
    return f"{count} {re.sub(rf'{one}e?s', one, many, count=1) if count == 1 else many}"


def badness(value: float) -> float:
    """A sensitivity to sort by: NaN is as bad as infinity.

    >>> sorted([1.0, float("nan"), 2.0], key=badness, reverse=True)
    [nan, 2.0, 1.0]
    """
    return math.inf if math.isnan(value) else value


def is_above(value: float, threshold: float | None) -> bool:
    """Whether a sensitivity is too high: above the threshold, or not a finite number. `None` is above everything finite.

    >>> is_above(2.0, 1.0), is_above(1.0, 1.0), is_above(1e9, None), is_above(float("nan"), None)
    (True, False, False, True)
    """
    return not math.isfinite(value) or (threshold is not None and value > threshold)
