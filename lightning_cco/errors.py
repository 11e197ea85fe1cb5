"""The one exception and the one warning category of the package."""


class CCOError(Exception):
    """Base of every error this package raises on purpose.

    A message names the layer (or key, or file), what was expected, what came, and what to write instead.
    """


class CCOWarning(UserWarning):
    """Category of every warning this package emits, so that users can filter them in one line."""
