"""Files appear whole or not at all, under their name and through symbolic links; what a killed process left is removed by the next one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = re.compile(r"\.cco-([0-9a-f]{8})-(\d+)-[0-9a-f]{12}\.tmp")
_ABANDONED = 24 * 3600.0  # seconds after which what a process elsewhere left counts as left for good


def write_file(path: str | Path, data: str | bytes) -> None:
    """Write a file atomically: first under another name in the same folder, then renamed. Its folder is made if missing.

    Args:
        path: Where; a symbolic link is followed.
        data: What; text is written as UTF-8.

    Raises:
        OSError: It can't be written, or something that is no file is in its place. Nothing is left then.
    """
    target = real_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target.parent)
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` for files that are moved to their place once all of them are whole; removed in the end, also after Ctrl-C.

    Raises:
        OSError: It can't be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    folder = _temporary_name(parent)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def real_file(path: str | Path) -> Path:
    """Where a path really leads: through symbolic links, also to what is not there yet.

    Raises:
        OSError: Something that is no file is there (a folder, a pipe, a device), or there can be no such path.
    """
    try:
        target = Path(os.path.realpath(path))  # fails where the working directory is gone
    except ValueError as error:  # a NUL
        raise OSError(errno.EINVAL, str(error)) from error
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"it is {kind}")
    return target


def check_writable(folder: Path) -> None:
    """Make a folder, and see whether files can be written there.

    Raises:
        OSError: They can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary_name(folder)
        probe.touch()
        probe.unlink()
    except ValueError as error:  # a NUL
        raise OSError(errno.EINVAL, str(error)) from error


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders of processes that are no more."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None:
                continue
            place, process = found.group(1), int(found.group(2))
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if (place == _place() and not _runs(process)) or age > _ABANDONED:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _temporary_name(folder: Path) -> Path:
    return folder / f".cco-{_place()}-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def _place() -> str:
    """Where numbers of processes mean the same: a machine, or a container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode(errors="replace")).hexdigest()[:8]


def _runs(process: int) -> bool:
    if os.name != "posix":  # there a signal would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
