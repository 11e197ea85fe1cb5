"""The hooks and the parts of a module as they were, and how they are put back.

A model may register hooks at its first forward, and note in an attribute that it has (models of transformers that collect hidden states do). Where that
attribute is put back and the hooks are not, the next forward registers them once more, and what they collect comes twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lightning_cco.compat.modules import children_of, hook_tables

_OWN = __name__.partition(".")[0]


def undo_hooks(module: nn.Module) -> Callable[[], None]:
    """What takes off the hooks that come from now on, and registers again those that go; hooks of this package are left as they are.

    Args:
        module: The module, as it is now.
    """
    before = {name: dict(table) for name, table in hook_tables(module).items()}
    return partial(_restore, module, before)


def undo_children(module: nn.Module) -> Callable[[], None]:
    """What puts submodules back where others are by then, or none; those under new names stay.

    Args:
        module: The module, as it is now.
    """
    return partial(_restore_children, module, dict(children_of(module)))


def _restore_children(module: nn.Module, before: dict[str, nn.Module | None]) -> None:
    now = children_of(module)
    if any(now.get(name) is not child for name, child in before.items() if child is not None):
        new = {name: child for name, child in now.items() if before.get(name) is None}
        now.clear()
        now.update({**before, **new})  # in the order in which containers go through them


def _restore(module: nn.Module, before: dict[str, dict[int, Any]]) -> None:
    now = hook_tables(module)
    new = {
        number for name, table in now.items() for number, hook in table.items() if number not in before.get(name, ()) and _is_other(hook)
    }
    gone = {
        number for name, table in before.items() for number, hook in table.items() if number not in now.get(name, ()) and _is_other(hook)
    }
    if not new and not gone:
        return
    for name, table in now.items():
        then = before.get(name, {})
        kept = {number: hook for number, hook in then.items() if number in table or number in gone}
        kept |= {number: hook for number, hook in table.items() if number not in then and number not in new}
        table.clear()
        table.update(kept)


def _is_other(hook: Any) -> bool:
    """Whether a hook is not of this package. Tables of flags hold `True` for what another table holds."""
    while isinstance(hook, partial):
        hook = hook.func
    if not callable(hook):
        return False
    return str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0] != _OWN
