"""The compiled library of kernels: built by the system's compiler, kept in the user's cache, checked before it is used."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("kernels.c")
log = logging.getLogger("lightning_cco")
# Contraction would round once where torch rounds twice; errno and traps keep compilers from using vector instructions.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_PATIENCE, _TIMEOUT = 5.0, 60.0  # seconds until a line says what is waited for, and until it is given up

_float, _int, _long, _pointer = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_TYPES: dict[str, tuple[Any, list[Any]]] = {
    "fake_quantize": (_long, [_pointer, _pointer, _long, _int, *[_float] * 7, _pointer, _pointer, _int]),
    "round_to_grid": (_long, [_pointer, _pointer, _long, _int, ctypes.c_char_p, _pointer, _int]),
    "ready_grid": (None, [*[_float] * 6, _int, _pointer]),
    "gradient_ends": (None, [ctypes.c_char_p, _int, _pointer]),
    "widen": (None, [_pointer, _long, _int, _float, _float, _pointer, _int]),
    "mask_gradient": (None, [_pointer, _pointer, _pointer, _long, _int, _int]),
    "fake_quantize_weight": (None, [_pointer, _pointer, *[_long] * 3, _int, _float, _float, _int, _pointer, _int, _int]),
    "weight_scale": (None, [_pointer, *[_long] * 3, _int, _float, _float, _int, _pointer, _int]),
    "affine_weight_scale": (None, [_pointer, _long, _long, _int, _int, _float, _int, _pointer, _pointer, _int]),
    "fake_quantize_affine_weight": (None, [_pointer, _pointer, _long, _long, _int, _int, _float, _int, _pointer, _pointer, _int, _int]),
    "fake_quantize_rows": (None, [_pointer, _pointer, _long, _long, _int, _float, _int]),
    "move_ranges": (None, [ctypes.c_char_p, _long, _int, _float, _int, _float, _pointer, _pointer, _pointer]),
    "energies": (None, [_pointer, _pointer, _long, _int, *[_float] * 3, _pointer, _int]),
}
"""Types of the result and of the arguments of each function."""


def declare_types(library: ctypes.CDLL) -> None:
    """Tell ctypes the types of the library's functions.

    Raises:
        AttributeError: It lacks one.
    """
    for name, (result, arguments) in _TYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def open_library() -> ctypes.CDLL | None:
    """The library, out of the cache or compiled. `None`, after a line in the log that says why, if there is none."""
    if os.environ.get("LIGHTNING_CCO_NATIVE", "1") == "0":
        _without("LIGHTNING_CCO_NATIVE=0")
        return None
    if sys.platform == "win32":
        _without("they are not built on Windows")
        return None
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        _without("no C compiler was found (cc, gcc, clang, or the environment variable CC)")
        return None
    # torch's own OpenMP: a second pool of threads would wait for the first one's processors.
    openmp = _loaded_openmp()
    # Compilers use half of AVX-512's width if not told otherwise: a weight is rounded in 0.97 ms instead of 1.36.
    width = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    extra = shlex.split(os.environ.get("LIGHTNING_CCO_CFLAGS", ""))  # such as a sanitizer's: `make test-sanitize`
    command = [compiler, *_FLAGS, *width, *extra, str(SOURCE), *openmp]
    key = hashlib.sha256("\0".join([*command[1:], _processor(), SOURCE.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    cache = _cache_folder()
    try:
        kept = _kept(cache, key) if cache is not None else None
        if kept is not None:
            return ctypes.CDLL(str(kept))
        if cache is not None and os.access(cache, os.W_OK):
            return ctypes.CDLL(str(_compile(command, cache / f"kernels-{key}.so")))
        with tempfile.TemporaryDirectory(prefix="lightning_cco-", ignore_cleanup_errors=True) as folder:
            return ctypes.CDLL(str(_compile(command, Path(folder) / f"kernels-{key}.so")))
    except subprocess.TimeoutExpired:
        _without(f"{compiler} did not end within {_TIMEOUT:.0f} s", logging.WARNING)
        return None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        _without(f"{compiler} failed{f': {lines[0][:200]}' if lines else ''}", logging.WARNING)
        return None
    except OSError as error:
        _without(f"{type(error).__name__}: {str(error)[:200]}", logging.WARNING)
        return None


def _without(why: str, level: int = logging.INFO) -> None:
    log.log(level, "lightning_cco: kernels are off, torch operations are used, which are slower: %s.", why)


def _kept(cache: Path, key: str) -> Path | None:
    """The library that was kept, if it is as it was written: its name ends with the hash of its content. Loading half a file would end the process."""
    for path in sorted(cache.glob(f"kernels-{key}-*.so")):
        if path.stem.rpartition("-")[2] == _hash_of(path):
            return path
        log.warning("lightning_cco: %s is damaged and is compiled again.", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _hash_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _compile(command: list[str], library: Path) -> Path:
    """Compile, and put the library where it belongs at once, so that no other process sees a part of it; its content's hash is added to the name."""
    with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder:
        built = Path(folder) / library.name
        _run([*command, "-lm", "-o", str(built)])
        kept = library.with_name(f"{library.stem}-{_hash_of(built)}.so")
        os.replace(built, kept)
    return kept


def _run(command: list[str]) -> None:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        try:
            _, errors = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            log.warning(
                "lightning_cco: waiting for %s, which compiles the kernels, up to %.0f s; LIGHTNING_CCO_NATIVE=0 does without.",
                command[0],
                _TIMEOUT,
            )
            _, errors = process.communicate(timeout=_TIMEOUT - _PATIENCE)
    except BaseException:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


def _cache_folder() -> Path | None:
    """A folder of the user's own, or `None`."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "lightning_cco"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return folder


def _loaded_openmp() -> list[str]:
    """Path of the OpenMP runtime that this process has loaded, on Linux."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    return sorted(path for path in paths if path.startswith("/") and ".so" in path)[:1]


def _processor() -> str:
    """What the compiler's ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
