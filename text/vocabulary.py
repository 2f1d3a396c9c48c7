"""The vocabulary of the GloVe path: which word has which row of embedding.npy, and the table itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from sentence_classifier.tokenizers import normalize
from util import atomic_write


def build_vocabulary(counts: Counter[str], file_words: list[str], lowercase: bool, max_vocab: int,
                     specials: list[str]) -> tuple[list[str], np.ndarray, dict[str, int]]:
    """Order the vocabulary so that the rows that training may change come first.

    The order: <pad>, <unk>, words of train.txt that the vector file lacks, words of train.txt that it has (both by
    frequency), the file's other words in its order.

    Returns:
        The words; for each its row in the file, or -1; and how many words come before each border:
        {"own": those without a row in the file, "seen": those of train.txt}, specials counted in.
    """
    rows: dict[str, int] = {}
    for row, word in enumerate(file_words):
        rows.setdefault(word, row)
    for word, row in list(rows.items()):  # "Paris" serves for "paris" where the file has none, and NFD for NFC
        form = normalize(word).lower() if lowercase else normalize(word)
        if form != word:
            del rows[word]
            rows.setdefault(form, row)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    if max_vocab:
        ranked = ranked[:max_vocab]
    own = [word for word in ranked if word not in rows]
    covered = [word for word in ranked if word in rows]
    seen = set(covered)
    others = [word for word in sorted(rows, key=rows.__getitem__) if word not in seen and word not in specials]
    if max_vocab:
        others = others[: max_vocab - len(ranked)]
    words = specials + own + covered + others
    file_rows = np.array([-1] * (len(specials) + len(own)) + [rows[word] for word in covered + others])
    return words, file_rows, {"own": len(specials) + len(own), "seen": len(specials) + len(ranked)}


def write_table(path: Path, table: np.ndarray | None, file_rows: np.ndarray, dim: int, oov_scale: float,
                seed: int) -> None:
    """Write embedding.npy: [V, dim] float32, the file's rows and random ones for the words that it lacks.

    Random rows are normal with `oov_scale` times the standard deviation of the file's numbers. <pad> is zero and
    <unk> the mean of the file's rows.
    """
    generator = np.random.default_rng(seed)
    scale, mean = 0.1, np.zeros(dim, dtype=np.float32)
    if table is not None and len(table):
        sample = np.asarray(table[: 1 << 15])
        scale, mean = oov_scale * float(sample.std()), sample.mean(0)
    with atomic_write(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (len(file_rows), dim)}
        )
        for start in range(0, len(file_rows), 1 << 14):
            part = file_rows[start : start + (1 << 14)]
            lacking = part < 0
            rows = np.empty((len(part), dim), dtype=np.float32)
            rows[lacking] = generator.normal(0.0, scale, (int(lacking.sum()), dim))
            if table is not None:
                rows[~lacking] = table[part[~lacking]]
            if start == 0:
                rows[0], rows[1] = 0.0, mean
            file.write(rows.tobytes())
