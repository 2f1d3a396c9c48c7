"""What ends a stage, and how."""

from __future__ import annotations

import pytest
from helpers import refusal

from sentence_classifier.errors import InputError, fail_cleanly


def test_fail_cleanly() -> None:
    def fails(argv: list[str] | None = None) -> None:
        if argv == ["user"]:
            raise InputError("file.txt:3: the line is empty.")
        if argv == ["disk"]:
            raise OSError(28, "No space left on device", "file.txt")
        raise RuntimeError("a fault of ours")

    assert refusal(fail_cleanly(fails), "user") == "file.txt:3: the line is empty."
    assert refusal(fail_cleanly(fails), "disk") == "file.txt: No space left on device."
    with pytest.raises(RuntimeError):
        fail_cleanly(fails)([])
