"""The kernels in ``kernels.c``: compiled on first use, kept in the user's cache, called through ctypes. Without a C compiler there are none.

PyTorch runs fake-quantization as four operations, each of which passes over the memory; one pass costs a quarter. The compiler is the system's own (``CC``,
else ``cc``, ``gcc`` or ``clang``), and takes under a second once per machine. ``LIGHTNING_CCO_NATIVE=0`` turns the kernels off,
``LIGHTNING_CCO_CFLAGS`` holds further flags for the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_cco.errors import CCOError

SOURCE = Path(__file__).with_name("kernels.c")
# Contraction would round once where torch rounds twice; errno and traps keep compilers from using vector instructions.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_TIMEOUT = 60.0  # seconds
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_INF = float("inf")

_float, _int, _long, _pointer = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class Kernels:
    """The compiled functions, for dense CPU tensors of float32 or bfloat16.

    Every pointer is checked before C gets it (`_address`): a tensor of another type, size or device is an error, never a write past its end.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._fake_quantize = library.fake_quantize
        self._fake_quantize.argtypes = [_pointer, _pointer, _long, _int, *[_float] * 7, _pointer, _pointer, _int]
        self._fake_quantize.restype = _long
        self._widen = library.widen
        self._widen.argtypes = [_pointer, _long, _int, _float, _float, _pointer, _int]
        self._widen.restype = None
        self._mask_gradient = library.mask_gradient
        self._mask_gradient.argtypes = [_pointer, _pointer, _pointer, _long, _int, _int]
        self._mask_gradient.restype = None
        self._fake_quantize_weight = library.fake_quantize_weight
        self._fake_quantize_weight.argtypes = [_pointer, _pointer, _long, _long, _long, _int, _float, _float, _pointer, _int, _int]
        self._fake_quantize_weight.restype = None
        self._weight_scale = library.weight_scale
        self._weight_scale.argtypes = [_pointer, _long, _long, _long, _int, _float, _float, _pointer, _int]
        self._weight_scale.restype = None
        self._energies = library.energies
        self._energies.argtypes = [_pointer, _pointer, _long, _int, *[_float] * 3, _pointer, _int]
        self._energies.restype = None

    def fake_quantize(
        self,
        x: Tensor,
        out: Tensor,
        scale: float,
        levels: tuple[float, float],
        ends: tuple[float, float],
        limits: tuple[float, float],
        mask: Tensor | None,
        extrema: Tensor | None,
    ) -> int:
        """Round to the grid.

        Args:
            x: What to round.
            out: Where to, of the same type and strides; may be ``x``.
            scale: Step of the grid.
            levels: First and last level that are used.
            ends: First and last level of the format: beyond them there is no gradient.
            limits: Interval of an activation function applied on the way: beyond it there is no gradient either.
            mask: uint8 of ``(x.numel() + 7) // 8`` for one bit per value that has a gradient.
            extrema: float32 of 2, widened to the smallest and the largest value.

        Returns:
            How many values have no gradient; 0 without a mask.
        """
        count, dtype = x.numel(), x.dtype
        blocked: int = self._fake_quantize(
            _address(x, dtype, count),
            _address_like(out, x),
            count,
            FORMATS[dtype],
            scale,
            *levels,
            *ends,
            *limits,
            None if mask is None else _address(mask, torch.uint8, (count + 7) // 8),
            None if extrema is None else _address(extrema, torch.float32, 2),
            torch.get_num_threads(),
        )
        return blocked

    def widen(self, x: Tensor, limits: tuple[float, float], extrema: Tensor) -> None:
        """Widen ``extrema``, float32 of 2, to the smallest and the largest value of ``x`` after a clamp to the limits."""
        count = x.numel()
        ends = _address(extrema, torch.float32, 2)
        self._widen(_address(x, x.dtype, count), count, FORMATS[x.dtype], *limits, ends, torch.get_num_threads())

    def mask_gradient(self, grad: Tensor, out: Tensor, mask: Tensor) -> None:
        """Copy a gradient to ``out`` (which may be ``grad``) and set it to 0 where the mask's bit is 0."""
        count, dtype = grad.numel(), grad.dtype
        bits = _address(mask, torch.uint8, (count + 7) // 8)
        self._mask_gradient(_address(grad, dtype, count), _address_like(out, grad), bits, count, FORMATS[dtype], torch.get_num_threads())

    def fake_quantize_weight(
        self, weight: Tensor, out: Tensor, axis: int, limit: int, smallest_scale: float, scales: Tensor | None = None, known: bool = False
    ) -> None:
        """Round a contiguous weight to the symmetric grid of each channel's largest magnitude.

        Args:
            weight: Any shape.
            out: The same shape and type.
            axis: Axis of the channels.
            limit: Largest level.
            smallest_scale: Least scale.
            scales: float32 with one value for each channel, written unless they are known.
            known: Whether to take the scales as they are instead of computing them.
        """
        self._fake_quantize_weight(
            _address(weight, weight.dtype, weight.numel()),
            _address_like(out, weight),
            *_around(weight, axis),
            FORMATS[weight.dtype],
            limit,
            smallest_scale,
            None if scales is None else _address(scales, torch.float32, weight.shape[axis]),
            known,
            torch.get_num_threads(),
        )

    def weight_scale(self, weight: Tensor, axis: int, limit: int, smallest_scale: float, scales: Tensor) -> None:
        """The scales that `fake_quantize_weight` takes, float32 with one value for each channel."""
        self._weight_scale(
            _address(weight, weight.dtype, weight.numel()),
            *_around(weight, axis),
            FORMATS[weight.dtype],
            limit,
            smallest_scale,
            _address(scales, torch.float32, weight.shape[axis]),
            torch.get_num_threads(),
        )

    def energies(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Squared norms of ``y - x`` and of ``x``, two tensors of the same type and strides."""
        sums = (ctypes.c_double * 2)()
        count = x.numel()
        self._energies(
            _address(x, x.dtype, count), _address_like(y, x), count, FORMATS[x.dtype], 0.0, 0.0, 0.0, sums, torch.get_num_threads()
        )
        return sums[0], sums[1]

    def rounding_energies(self, x: Tensor, scale: float, levels: tuple[float, float]) -> tuple[float, float]:
        """Squared norms of what rounding to a grid changes, and of ``x``."""
        sums = (ctypes.c_double * 2)()
        count = x.numel()
        self._energies(_address(x, x.dtype, count), None, count, FORMATS[x.dtype], scale, *levels, sums, torch.get_num_threads())
        return sums[0], sums[1]


def _around(weight: Tensor, axis: int) -> tuple[int, int, int]:
    """How many values there are before an axis, along it, and behind it."""
    shape = weight.shape
    return shape[:axis].numel(), shape[axis], shape[axis + 1 :].numel()


def _address(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Address of a tensor's values, for C.

    Args:
        tensor: On the CPU.
        dtype: What C takes its values for.
        count: How many values C reads or writes from the address on.

    Raises:
        CCOError: It is of another type, size or device, or its memory ends earlier.
    """
    if tensor.dtype is dtype and tensor.numel() == count and tensor.is_cpu:
        address, storage = tensor.data_ptr(), tensor.untyped_storage()
        if not count or (address and address + count * dtype.itemsize <= storage.data_ptr() + storage.nbytes()):
            return address
    raise CCOError(
        f"kernels: expected {count} values of {dtype} in memory of the CPU, got {tensor.numel()} of {tensor.dtype}, shape {tuple(tensor.shape)}, on "
        f"{tensor.device}, in {tensor.untyped_storage().nbytes()} bytes. Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
    )


def _address_like(tensor: Tensor, other: Tensor) -> int:
    """Address of a tensor whose values lie in memory like those of another one, whose own address is checked as well."""
    if tensor is not other and tensor.stride() != other.stride() and not (tensor.is_contiguous() and other.is_contiguous()):
        raise CCOError(
            f"kernels: expected two tensors of the same strides, got {tensor.stride()} and {other.stride()} for shape {tuple(other.shape)}. "
            "Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
        )
    return _address(tensor, other.dtype, other.numel())


_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def runs_plainly() -> bool:
    """Whether an operation runs now as it is, on memory: nobody traces it, transforms it, differentiates it forwards or watches it by a dispatch mode.

    `torch.jit.trace`, `make_fx`, `torch.export`, fake tensors, `torch.func`, vectorized autograd, forward-mode AD, flop counters: none of them would see what a
    kernel does, and some hand out tensors without memory. The one place where this is decided.
    """
    return not (
        torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _key_included(_PRE_DISPATCH)
        or torch.compiler.is_compiling()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but strided memory: no subclass, and none of the tensors that PyTorch computes only when they are read."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor._is_zerotensor() or _is_wrapped(tensor))
    )


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The kernels, if they may work on a tensor now: an ordinary one, dense, on the CPU, of a type that they know, while nobody traces or transforms."""
    if tensor.dtype not in FORMATS or not tensor.is_cpu or not runs_plainly() or not is_plain(tensor):
        return None
    return load() if tensor.is_contiguous() or is_dense(tensor) else None


def is_dense(tensor: Tensor) -> bool:
    """Whether the values fill their memory without gaps or overlaps, in whatever order: channels last, or heads swapped with positions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


@functools.cache
def load() -> Kernels | None:
    """Compile the kernels, or take them out of the cache. `None` if that is turned off or there is no compiler that can."""
    if os.environ.get("LIGHTNING_CCO_NATIVE", "1") == "0" or sys.platform == "win32":
        return None
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    # torch's own OpenMP: a second pool of threads would wait for the first one's processors.
    openmp = _loaded_openmp()
    # Compilers use half of AVX-512's width if not told otherwise: a weight is rounded in 0.97 ms instead of 1.36.
    width = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    extra = shlex.split(os.environ.get("LIGHTNING_CCO_CFLAGS", ""))  # such as a sanitizer's: `make test-sanitize`
    command = [compiler, *_FLAGS, *width, *extra, str(SOURCE), *openmp]
    key = hashlib.sha256("\0".join([*command[1:], _processor(), SOURCE.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    try:
        library = _cache_folder() / f"kernels-{key}.so"
        if not library.exists():
            _compile(command, library)
        return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _compile(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run([*command, "-lm", "-o", str(built)], check=True, capture_output=True, timeout=_TIMEOUT)
        os.replace(built, library)


def _cache_folder() -> Path:
    """A folder of the user's own; one for this process alone where there is none that can be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "lightning_cco"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="lightning_cco-"))


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
