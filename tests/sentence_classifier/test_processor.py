"""What /proc/cpuinfo says of int8 products."""

from __future__ import annotations

from pathlib import Path

import pytest

from sentence_classifier.processor import has_vnni


@pytest.mark.parametrize(("content", "expected"), [
    ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\nbugs\t\t:\n", True),
    ("flags : fpu avx2 avx_vnni\n", True),
    ("vmx flags\t: vnmi avx_vnni\nflags\t\t: fpu avx2 avx512f\n", False),
    ("processor\t: 0\nFeatures\t: fp asimd i8mm\n", None),  # ARM
    ("", None),
])
def test_flags(tmp_path: Path, content: str, expected: bool | None) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert has_vnni(tmp_path / "cpuinfo") is expected


def test_no_such_file(tmp_path: Path) -> None:
    assert has_vnni(tmp_path / "cpuinfo") is None
