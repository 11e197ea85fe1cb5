"""Places in the user's code: which call in the text of a program a frame is at.

An offset into the code tells less. Compilers copy code: the end of a function that both branches of an ``if`` lead to, the condition of a ``while``, what
is under ``finally``. The interpreter stands at one offset or another of a call, depending on how often it has run, and on who watches. Two functions may have
calls at the same offset. So a place is one of the text: the lines and columns of an expression, in the function that begins at a line. Where only lines are
known (Python 3.10, ``-X no_debug_ranges``) short ends of functions are recognized by their instructions; two ends in one line that have the same can't be told
apart.
"""

from __future__ import annotations

import dis
from types import CodeType, FrameType
from typing import NamedTuple

_BITS = 20
"""Of a part of a place: an offset, or a line."""
_PARTS_OF_FUNCTIONS = frozenset(("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"))
"""What has frames of its own, and is at a place of the function around it. Comprehensions have none since Python 3.12."""
_COPIED = 4
"""Of how many instructions at most are ends of functions that are copied."""
_MOST = 1 << 12
"""Code that is known; a forward may make new code each time that it runs."""


class _Places(NamedTuple):
    """The place of each two bytes of code; the code itself, which keeps its identity its own; and whether it is a part of a function."""

    at: list[int]
    code: CodeType
    part: bool


_by_identity: dict[int, _Places] = {}
_by_code: dict[CodeType, _Places] = {}  # slower: Python hashes all of the code


def place_of(frame: FrameType) -> int:
    """The place that a frame is at.

    >>> import sys
    >>> def twice():
    ...     return [sys._getframe(), place_of(sys._getframe())], place_of(sys._getframe())
    >>> (_, first), second = twice()
    >>> first == second
    False
    """
    places = _by_identity.get(id(frame.f_code)) or _read(frame.f_code)
    place = places.at[frame.f_lasti >> 1]
    while places.part and frame.f_back is not None:
        frame = frame.f_back
        places = _by_identity.get(id(frame.f_code)) or _read(frame.f_code)
        place = place << 2 * _BITS | places.at[frame.f_lasti >> 1]
    return place


def _read(code: CodeType) -> _Places:
    known = _by_code.get(code)
    if known is None:
        known = _Places(_places_in(code), code, code.co_name in _PARTS_OF_FUNCTIONS)
        if len(_by_code) >= _MOST:
            _by_code.clear()
        _by_code[code] = known
    if len(_by_identity) >= _MOST:
        _by_identity.clear()
    _by_identity[id(code)] = known._replace(code=code)
    return known


def _places_in(code: CodeType) -> list[int]:
    """The place of each two bytes of code: the first line of the function, and where in the code what stands in one place of the text is first."""
    instructions = list(dis.get_instructions(code))
    first: dict[object, int] = {}
    at = [0] * (len(code.co_code) // 2)
    line = 0
    for number, instruction in enumerate(instructions):
        where = getattr(instruction, "positions", None)  # since Python 3.11
        line = (instruction.starts_line if where is None else where.lineno) or line
        if where is None or where.col_offset is None:
            # Python 3.11 has two instructions for a call, and may do all of it in the first one.
            call = number + (instruction.opname == "PRECALL")
            where = line, _copied_end(instructions[call : call + _COPIED]) or instructions[call].offset
        place = code.co_firstlineno << _BITS | first.setdefault(where, instruction.offset)
        end = instructions[number + 1].offset if number + 1 < len(instructions) else len(code.co_code)
        at[instruction.offset // 2 : end // 2] = [place] * ((end - instruction.offset) // 2)  # with the memory of its own that follows it
    return at


def _copied_end(instructions: list[dis.Instruction]) -> tuple[tuple[int, int | None], ...]:
    """The instructions up to the return, if they are so few that they may be copied: what tells copies where only lines are known."""
    found = []
    for instruction in instructions:
        found.append((instruction.opcode, instruction.arg))
        if instruction.opname == "RETURN_VALUE":
            return tuple(found)
    return ()
