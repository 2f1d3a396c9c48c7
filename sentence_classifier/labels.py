"""The label map: which class each of a model's outputs stands for."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # zero-width space, word joiner, byte order mark


def normalize_label(name: str) -> str:
    """A label's name in Unicode's form NFC, without characters that show nothing: what looks the same is the same."""
    return unicodedata.normalize("NFC", name.translate(INVISIBLE)).strip()


SEPARATOR = "|"  # of several labels of a sentence, where no other is named


def split_labels(text: str, separator: str) -> list[str]:
    """The names of several labels, each once; of an empty text, none."""
    return list(dict.fromkeys(name for name in map(normalize_label, text.split(separator)) if name))


@dataclass(frozen=True)
class Labels:
    """The label map: names in the order of their ids."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def index(self) -> dict[str, int]:
        """Name to id."""
        return {name: number for number, name in enumerate(self.names)}
