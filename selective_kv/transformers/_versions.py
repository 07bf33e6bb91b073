"""Which versions of transformers the plug-in was written and tested for."""

from __future__ import annotations

OLDEST, NEWEST = (5, 17), (5, 24)


def check_version() -> None:
    """Raises ImportError, in one line, where transformers is missing or of a version that nobody has tried."""
    wanted = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(f"selective_kv.transformers needs transformers {wanted}, which is not installed") from error
    version = tuple(int(part) for part in __version__.split(".")[:2])
    if not OLDEST <= version <= NEWEST:
        raise ImportError(f"selective_kv.transformers supports transformers {wanted}, and this is {__version__}")
