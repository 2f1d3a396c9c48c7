"""The random split of a labelled file."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import split
from helpers import refusal, snapshot
from hypothesis import given
from hypothesis import strategies as st

WORD = st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() == text != "" and not text.startswith("\ufeff"))


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def outputs(pattern: str) -> dict[str, list[str]]:
    """The lines of the three outputs, without their ends."""
    texts = {name: Path(pattern.format(name)).read_bytes().decode() for name in ("train", "valid", "test")}
    assert all(text.endswith("\n") and "\r" not in text for text in texts.values())
    return {name: text.removesuffix("\n").split("\n") for name, text in texts.items()}


@given(lines=st.lists(st.tuples(WORD, WORD, st.sampled_from(["\n", "\r\n"])), min_size=3, max_size=60),
       last_end=st.booleans(), seed=st.integers(0, 1 << 40))
def test_split_deals_out_every_line_once(tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str, str]],
                                         last_end: bool, seed: int) -> None:
    folder = tmp_path_factory.mktemp("split")
    text = "".join(f"{sentence}\t{label}{end}" for sentence, label, end in lines)
    path = write(folder / "total.txt", text if last_end else text.removesuffix("\n").removesuffix("\r"))
    split.main([f"--data_path={path}", f"--base_path={folder / 'data'}", f"--seed={seed}"])
    parts = outputs(f"{folder}/data.{{}}")
    assert (Counter(line for part in parts.values() for line in part)
            == Counter(f"{sentence}\t{label}" for sentence, label, _ in lines))
    split.main([f"--data_path={path}", f"--output_dir={folder}", f"--seed={seed}"])
    assert outputs(f"{folder}/{{}}.txt") == parts


def test_split_shares_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "total.txt", "".join(f"sentence {number}\tlabel\n" for number in range(1003)))
    for base, seed in (("data", []), ("same", ["--seed=42"]), ("other", ["--seed=43"])):
        split.main([f"--data_path={path}", f"--base_path={base}", *seed])
    parts = outputs("data.{}")
    assert {name: len(part) for name, part in parts.items()} == {"train": 702, "valid": 100, "test": 201}
    assert parts == outputs("same.{}") and parts != outputs("other.{}")
    order = [int(re.findall(r"\d+", line)[0]) for line in parts["train"]]
    assert order != sorted(order) and max(order[:100]) > 500  # shuffled, not merely cut
    assert not capsys.readouterr().out


def test_each_label_is_split_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "total.txt", "".join(f"sentence {number}\t{'rare' if number < 30 else 'frequent'}\n"
                                                 for number in range(330)))
    split.main([f"--data_path={path}", "--base_path=data"])
    assert {name: [sum(line.endswith(f"\t{label}") for line in part) for label in ("rare", "frequent")]
            for name, part in outputs("data.{}").items()} == {"train": [21, 210], "valid": [3, 30], "test": [6, 60]}


def test_split_refuses_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "total.txt", "a\tx\nno label\nb\tx\n\nc\tx\n")
    assert "total.txt:2: no TAB" in refusal(split.main, f"--data_path={path}", "--base_path=data")
    assert list(tmp_path.iterdir()) == [path]
    split.main([f"--data_path={path}", "--base_path=data", "--skip_bad_lines"])
    assert sorted(sum(outputs("data.{}").values(), [])) == ["a\tx", "b\tx", "c\tx"]
    assert "2 bad lines left out" in capsys.readouterr().err
    two = write(tmp_path / "two.txt", "a\tx\nb\tx\n")
    assert "2 usable lines are too few" in refusal(split.main, f"--data_path={two}", "--base_path=two")


def test_split_overwrites_only_when_told(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", "a\tx\nb\tx\nc\tx\n")
    write(tmp_path / "data.test", "mine\n")
    before = snapshot(tmp_path)
    assert "data.test: already there" in refusal(split.main, f"--data_path={path}", "--base_path=data")
    assert "is the file to split" in refusal(split.main, f"--data_path={path}", "--output_dir=.", "--force")
    assert snapshot(tmp_path) == before
    split.main([f"--data_path={path}", "--base_path=data", "--force"])
    assert sorted(sum(outputs("data.{}").values(), [])) == ["a\tx", "b\tx", "c\tx"]
