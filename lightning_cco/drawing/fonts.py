"""A font for pictures on machines that have none, such as slim containers, where Graphviz draws a box for every letter."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SYSTEM_FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "/usr/share/X11/fonts", "~/.fonts", "~/.local/share/fonts")
_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@dataclass(frozen=True)
class Fonts:
    """What Graphviz needs to write letters.

    Attributes:
        found: Whether there is a font at all.
        environment: What to add to the environment of Graphviz.
        missing: Signs that the font lacks, with what to write instead (in an HTML-like label).
    """

    found: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)


@cache
def find_fonts() -> Fonts:
    """Returns the system's fonts, or else those of matplotlib, or else the one of Pillow."""
    if not sys.platform.startswith("linux") or "FONTCONFIG_FILE" in os.environ or _has_fonts():
        return Fonts()
    if (folder := _matplotlib_fonts()) is not None:
        return Fonts(environment=_environment(folder))
    if (folder := _pillow_font()) is not None:
        missing = str.maketrans({"×": "x", "→": "to", "↔": "/", "…": "..."})
        return Fonts(environment=_environment(folder), missing=missing)
    return Fonts(found=False)


def _environment(folder: Path) -> dict[str, str]:
    config = Path(_temporary_folder(), "fonts.conf")
    config.write_text(
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">\n'
        f"<fontconfig><dir>{folder}</dir><cachedir>{config.parent}</cachedir>"
        '<alias binding="same"><family>Helvetica</family><prefer><family>DejaVu Sans</family></prefer></alias>'
        '<alias binding="same"><family>Courier New</family><prefer><family>DejaVu Sans Mono</family></prefer></alias></fontconfig>\n'
    )
    return {"FONTCONFIG_FILE": str(config)}


def _has_fonts() -> bool:
    folders = (Path(folder).expanduser() for folder in SYSTEM_FONTS)
    return any(
        next(folder.rglob(pattern), None) is not None for folder in folders for pattern in ("*.[to]tf", "*.ttc", "*.pf[ab]*", "*.t1")
    )


def _matplotlib_fonts() -> Path | None:
    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec is not None and spec.origin else None
    return folder if folder is not None and folder.is_dir() else None


def _pillow_font() -> Path | None:
    """Pillow, which TensorBoard brings along, carries one font inside a module."""
    try:
        from PIL import ImageFont

        data = getattr(ImageFont.load_default(size=12), "font_bytes", None)
    except (ImportError, OSError, TypeError):  # a Pillow without FreeType, or before 10.1
        return None
    if not data:
        return None
    folder = Path(_temporary_folder())
    (folder / "font.ttf").write_bytes(data)
    return folder


def _temporary_folder() -> str:
    _kept.append(tempfile.TemporaryDirectory(prefix="lightning_cco_fonts_", ignore_cleanup_errors=True))
    return _kept[-1].name
