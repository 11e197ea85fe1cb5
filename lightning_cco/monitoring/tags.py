"""Names under which loggers are shown what a run has, in the order in which TensorBoard's pages have them.

TensorBoard sorts by name, takes ``/``, ``_`` and digits for one sign that comes before letters, and opens a page on the first group: ``cco_details/graph``
would come before ``cco/overview``, ``cco-details/graph`` does not. Numbers put first what is looked at first.
"""

from __future__ import annotations

from lightning_cco.names import printable

SUMMARY, SUGGESTIONS, EXPORT, BUDGET = "cco/1_summary", "cco/2_suggestions", "cco/3_export", "cco/4_budget"
"""Texts."""
OVERVIEW, TRADE_OFF = "cco/1_overview", "cco/2_trade_off"
"""Pictures."""


def detail(name: str) -> str:
    """The tag of a picture, a table or a histogram that is looked at later."""
    return f"cco-details/{name}"


def of_layer(kind: str, layer: str) -> str:
    """The tag of a layer's curve.

    >>> of_layer("qs", "conv_1")
    'cco-qs/conv_1'
    """
    return f"cco-{kind}/{printable(layer)}"
