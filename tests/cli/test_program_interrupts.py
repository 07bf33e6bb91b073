"""A Ctrl-C that a library turned into an error of its own still ends a program as a Ctrl-C."""

from __future__ import annotations

import signal

import pytest

from common.program import program


def test_an_interrupt_that_became_another_error(capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors made a ValueError of it, and the program ended in a traceback."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop, program("x.py"):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError(
                    "could not determine the shape of object type 'torch.storage.UntypedStorage'"
                ) from None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_an_error_without_an_interrupt_stays_one() -> None:
    with pytest.raises(ValueError, match="a bug"), program("x.py"):
        raise ValueError("a bug")
