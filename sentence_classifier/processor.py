"""What the processor can do, as far as the accuracy of an int8 file depends on it."""

from __future__ import annotations

import re
from pathlib import Path


def has_vnni(cpuinfo: str | Path = "/proc/cpuinfo") -> bool | None:
    """Whether an x86 processor adds int8 products in 32 bits (VNNI); None if unknown, or another kind of processor.

    Without VNNI, pairs of products are added in 16 bits, and sums of 8-bit weights beyond 32,767 are cut off.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path(cpuinfo).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return None if flags is None else not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())
