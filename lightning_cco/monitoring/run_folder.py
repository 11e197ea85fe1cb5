"""The folder of a run: files that appear whole or not at all, and errors that end no training."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image

from lightning_cco.errors import CCOWarning
from lightning_cco.files import check_writable, remove_abandoned, write_file

_Data = TypeVar("_Data", str, bytes)
_FILE_URL = re.compile(r"^file:/+")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class RunFolder:
    """Where a run writes what a user sees of it. What can't be made, written or shown is one warning for each kind of error.

    Args:
        path: The folder; made if missing, also when somebody removes it.

    Attributes:
        path: The folder.
        on_disk: Whether it is on a disk. Nothing is written to remote ones.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(_FILE_URL.sub("/", str(path)))
        self.on_disk = True
        self._warned: set[object] = set()

    def open(self) -> None:
        """Make the folder, and remove what killed processes have left in it."""
        if _REMOTE.match(str(self.path)):  # pathlib has made one slash of two
            self.on_disk = False
            self._warn(
                "remote", f"'{self.path}' is not on a disk: pictures and recipes are not written. Set monitoring_settings.output_dir."
            )
            return
        try:
            check_writable(self.path)
        except OSError as error:
            self._warn(
                (type(error), error.errno),
                f"The folder '{self.path}' for pictures and recipes can't be written: {error}. The training goes on without them. "
                "Set monitoring_settings.output_dir to one that can, or the Trainer's default_root_dir.",
            )
        remove_abandoned(self.path)

    def write(self, name: str, make: Callable[[], _Data]) -> _Data | None:
        """Make the content of a file and write it whole or not at all. Returns the content, also if it could not be written."""
        made = None
        with self.unharmed(self.path / name):
            made = make()
            if self.on_disk:
                write_file(self.path / name, made)
        return made

    def write_picture(self, name: str, draw: Callable[[], Image.Image]) -> bytes | None:
        """Draw a picture and write it as a PNG file, as `write` does. Returns the file's content."""

        def drawn() -> bytes:
            buffer = io.BytesIO()
            draw().save(buffer, format="PNG")
            return buffer.getvalue()

        return self.write(name, drawn)

    @contextlib.contextmanager
    def unharmed(self, what: object) -> Iterator[None]:
        """Make a warning of any error, one for each kind of it.

        Args:
            what: The path of a file, or words for something else.
        """
        try:
            yield
        except CCOWarning:  # turned into errors by the user
            raise
        except OSError as error:
            self._warn(
                (type(error), error.errno),
                f"'{what}' can't be written: {error}. The training goes on; is monitoring_settings.output_dir right?",
            )
        except Exception as error:
            self._warn(
                (str(what), type(error)), f"'{what}' could not be made or shown: {type(error).__name__}: {error}. The training goes on."
            )

    def _warn(self, kind: object, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"lightning_cco: {message}", CCOWarning, stacklevel=3)
