"""What a run shows of its budget: the log, files, loggers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.monitoring import tables, tags
from lightning_cco.monitoring.loggers import Payload, show
from lightning_cco.monitoring.run_folder import RunFolder
from lightning_cco.monitoring.run_log import say
from lightning_cco.monitoring.trade_off import HEADER, budget_csv, budget_lines, layer_rows, trade_off


def show_budget(budget: BudgetPlan, step: int, folder: RunFolder, loggers: Sequence[Any]) -> None:
    """Say what a budget has chosen; write the trade-off as ``trade_off.png``, the layers as ``budget.csv``, and all of it as ``budget.json``.

    Args:
        budget: The choice.
        step: Global step.
        folder: Where the files go; with a speed ``layer_times.json`` is one of them.
        loggers: What gets the table, the picture and the files.
    """
    with folder.unharmed("the budget"):
        say("\n".join(budget_lines(budget)))
    folder.write("budget.json", lambda: json.dumps(budget.to_dict(), indent=1))
    folder.write("budget.csv", lambda: budget_csv(budget))
    names = ["budget.csv", "budget.json", "trade_off.png"]
    if (times := budget.times) is not None:
        folder.write("layer_times.json", times.to_json)
        names.append("layer_times.json")
    picture = folder.write_picture("trade_off.png", lambda: trade_off(budget))
    with folder.unharmed("what goes to the loggers"):
        rows = layer_rows(budget)
        text = tables.markdown_table(HEADER, rows[: tables.MOST_ROWS], of=len(rows))
        images = {} if picture is None else {tags.TRADE_OFF: picture}
        show(loggers, Payload(step, texts={tags.BUDGET: text}, images=images, files=[folder.path / name for name in names]))
