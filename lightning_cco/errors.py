"""The one exception and the one warning category of the package."""

from lightning_cco.names import printable


class CCOError(Exception):
    """Base of every error this package raises on purpose.

    A message names the layer (or key, or file), "expected X, got Y", and what to write instead. What does not print in it is escaped: names of modules
    may hold anything.

    Example:
        >>> from lightning_cco import CCOError, load_settings
        >>> try:
        ...     load_settings({"global_quantization_settings": {"weights_num_bits": 1}})
        ... except CCOError as error:
        ...     print("refused")
        refused
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_lines(message))


class CCOWarning(UserWarning):
    """Category of every warning this package emits, so that users can filter them in one line.

    Example:
        >>> import warnings
        >>> from lightning_cco import CCOWarning
        >>> with warnings.catch_warnings():
        ...     warnings.filterwarnings("ignore", category=CCOWarning)
        ...     warnings.warn("not shown", CCOWarning)
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_lines(message))


def _lines(message: object) -> str:
    return "\n".join(printable(line) for line in str(message).split("\n"))
