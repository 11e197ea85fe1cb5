"""Triton's compiler makes of each kernel what its interpreter runs: machine code for several GPUs, without needing one, and without other arithmetic."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_here import needs_triton

pytestmark = needs_triton

# Contracted, flushed to zero or approximate; numbers are exact only without.
INEXACT = re.compile(r"\b(fma\.|mad\.f|div\.full|div\.approx|rcp\.|ex2\.)|\.ftz")


def compile_all(folder: str) -> None:
    """Run in a separate process, where Triton's interpreter is off."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_cco.quantization import triton_kernels

    def compiled(kernel: str, capability: int, value: str, **constants: object) -> None:
        function = getattr(triton_kernels, kernel)
        types = dict.fromkeys(("mask",), "*u8") | dict.fromkeys(("extrema", "scale", "zero_point", "scales"), "*fp32")
        types |= (
            dict.fromkeys(("x", "y", "grad", "out", "weight"), f"*{value}")
            | dict.fromkeys(("n", "inner", "count"), "i64")
            | {"channels": "i32"}
        )
        names = function.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if signature[name][0] == "*" or name in ("n", "inner", "count")
        }
        source = ASTSource(function, signature, {(names.index(name),): constant for name, constant in constants.items()}, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
        found.append({"kernel": f"{kernel} {value} sm_{capability} {constants}", "ptx": made.asm["ptx"], "code": len(made.asm["cubin"])})

    found: list[dict[str, object]] = []
    for capability, value in ((80, "fp32"), (90, "bf16"), (75, "fp16")):
        compiled("fake_quantize", capability, value, MASK=True, EXTREMA=True, BYTES=256)
        compiled("mask_gradient", capability, value, BYTES=256)
    wide = {"ROWS": 1, "COLUMNS": 1024, "POSITION": tl.int64, "RUNS": False}
    narrow = {"ROWS": 16, "COLUMNS": 64, "POSITION": tl.int32, "RUNS": True}
    compiled("fake_quantize_weight", 80, "bf16", MSE=False, KNOWN=False, KEEP=True, **wide)
    compiled("fake_quantize_weight", 90, "fp32", MSE=True, KNOWN=False, KEEP=False, **narrow)
    compiled("fake_quantize_weight", 90, "fp16", MSE=False, KNOWN=True, KEEP=False, **wide)
    (Path(folder) / "found.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code = f"import sys; sys.path[:0] = {sys.path!r}; import runpy; runpy.run_path({__file__!r})['compile_all']({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 9
    for entry in found:
        assert entry["code"] > 0, entry["kernel"]
        assert INEXACT.findall(entry["ptx"]) == [], entry["kernel"]
        assert re.search(r"ld\.global\S*\.v[24]", entry["ptx"]), f"{entry['kernel']} reads value by value"
        assert "div.rn.f32" in entry["ptx"] or "mask_gradient" in entry["kernel"]
