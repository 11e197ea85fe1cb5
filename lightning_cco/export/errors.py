"""The errors of an export: what each says is kept without the word before it, so that another error or the report can quote it."""

from __future__ import annotations

from lightning_cco.errors import CCOError


class ExportError(CCOError):
    """A file can't be written, or is wrong.

    Args:
        said: What is wrong and what to do, in sentences.

    Attributes:
        said: The same; the message has ``export: `` before it.

    >>> str(ExportError("the file does not run")), ExportError("the file does not run").said
    ('export: the file does not run', 'the file does not run')
    """

    def __init__(self, said: object = "") -> None:
        super().__init__(f"export: {said}")
        self.said = str(said)


class BatchDoesNotVary(ExportError):
    """A file whose batch was to vary can't be written, or gives outputs of another size; one with the example's batch may do."""


class SizesDoNotVary(ExportError):
    """A file whose sizes were to vary can't be written, or is wrong at other sizes."""


class VaryingSizesCost(SizesDoNotVary):
    """Sizes could vary, but at a cost that only who asks for it takes."""


class FileDiffers(ExportError):
    """A file gives something else than the fake-quantized model.

    Args:
        what: What differs, and by how much.
        target: The engine in which it does; empty for the check in ONNX Runtime or PyTorch.

    Attributes:
        what: The same.
    """

    def __init__(self, what: object = "", target: str = "") -> None:
        where = f"in {target}, the target, " if target else ""
        super().__init__(
            f"{where}the file differs from the fake-quantized model: {what}. No file was written. "
            "Skip that layer, or change the limit if the difference is known to be harmless."
        )
        self.what = str(what)


def quoted(error: Exception) -> str:
    """What an error says, for another one that quotes it."""
    return error.said if isinstance(error, ExportError) else str(error)
