"""The first stage: what it writes, that bad input is named and changes nothing (law 6), and the vocabulary."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import make_model
from conftest import Place
from helpers import (
    COVERED,
    DIM,
    ENCODERS,
    INTENTS,
    ROOT,
    answer,
    make_config,
    make_lines,
    naive,
    refusal,
    restore,
    script,
    snapshot,
    write_config,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import preprocess
from dataset import EncodedData
from preprocess import build_vocabulary
from sentence_classifier.labels import Labels
from sentence_classifier.tokenizers import WordTokenizer
from text import lines as text
from text.checks import file_fault
from text.labels import UNKNOWN_LABEL, looks_like_logits, read_labels, write_labels
from text.workers import Workers
from util import exclusive

SPLITS = ("train.txt", "valid.txt", "test.txt")
MADE = {"train.txt.ids", "valid.txt.ids", "test.txt.ids", "vocab.txt", "label.txt", "embedding.npy"}


def decoded(folder: Path, name: str) -> list[tuple[list[str], Any]]:
    """An encoded file as words and labels (or logits)."""
    data = EncodedData(folder / f"{name}.ids")
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rows = [data.token_ids[start:end] for start, end in zip(data.offsets[:-1], data.offsets[1:], strict=True)]
    names = {**dict(enumerate(data.labels.names)), UNKNOWN_LABEL: None}
    targets = data.targets.tolist() if data.has_logits else [names[label] for label in data.targets.tolist()]
    return [([vocabulary[token] for token in row], target) for row, target in zip(rows, targets, strict=True)]


def check_decoded(folder: Path, name: str, examples: Sequence[tuple[str, str | None]]) -> None:
    """The encoded file holds exactly these sentences (words outside the vocabulary as <unk>) and labels.

    The label None is one that train.txt lacks.
    """
    vocabulary = set((folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")[2:])
    expected = [([word if word in vocabulary else "<unk>" for word in sentence.lower().split()], label)
                for sentence, label in examples]
    assert decoded(folder, name) == expected


# -------------------------------------------------------------------------------------------------- what it writes


def test_writes_these_files_and_no_others(raw: Place) -> None:
    before = snapshot(raw.data)
    preprocess.main(raw.preprocess_flags())
    after = snapshot(raw.data)
    assert set(after) == set(before) | MADE and {name: after[name] for name in before} == before
    assert read_labels(raw.data / "label.txt").names == tuple(INTENTS)  # in order of first appearance
    for split, (name, count) in enumerate(zip(SPLITS, (46, 16, 21), strict=True)):
        check_decoded(raw.data, name, make_lines(count, split))


def test_the_one_random_row_is_known(raw: Place) -> None:
    covered = {word for sentence, _ in make_lines(46, 0) for word in sentence.lower().split()}
    write_lines(raw.data / "train.txt", [*make_lines(46, 0), ("hapax", "PlayMusic")])
    raw.vectors.write_text("".join(f"{word} 0{' 0.5' * (DIM - 1)}\n" for word in [*covered, *map(str, range(5000))]))
    tables = set()
    for flags in ([], ["--seed=43"], ["--oov_scale=0.9"]):
        preprocess.main(raw.preprocess_flags(*flags))
        encoding = EncodedData(raw.data / "train.txt.ids").encoding
        assert encoding.own_rows == 3  # <pad>, <unk>, hapax
        tables.add(encoding.table)
    assert len(tables) == 3


def test_same_input_same_bytes(raw: Place, encoded_once: Place, tmp_path: Path) -> None:
    again = raw.copy(tmp_path / "again")
    preprocess.main(raw.preprocess_flags())
    first = snapshot(raw.data)
    preprocess.main(raw.preprocess_flags())
    assert snapshot(raw.data) == first
    preprocess.main(again.preprocess_flags("--seed=43"))
    assert (again.data / "embedding.npy").read_bytes() != first["embedding.npy"]


def test_table_holds_the_files_rows(encoded: Place) -> None:
    words = (encoded.data / "vocab.txt").read_text(encoding="utf-8").splitlines()
    table = np.load(encoded.data / "embedding.npy")
    encoding = EncodedData(encoded.data / "train.txt.ids").encoding
    file = {line.rsplit(" ", DIM)[0].lower(): np.array(line.rsplit(" ", DIM)[1:], np.float32)
            for line in encoded.vectors.read_text(encoding="utf-8").splitlines()}
    assert len(words) == len(table) == len(set(words))
    training = {word for sentence, _ in make_lines(46, 0) for word in sentence.lower().split()}
    assert set(words[2 : encoding.own_rows]) == training - set(file)
    assert set(words[encoding.own_rows : encoding.seen_rows]) == training & set(file)
    assert words[encoding.seen_rows :] == [word for word in map(str.lower, COVERED) if word not in training]
    for word, row in zip(words, table, strict=True):
        if word in file:
            np.testing.assert_array_equal(row, file[word])
    assert not table[0].any()


def test_vectors_learned_from_scratch(raw: Place) -> None:
    preprocess.main([*raw.preprocess_flags(), "--embedding_path=none"])
    encoding = EncodedData(raw.data / "train.txt.ids").encoding
    table = np.load(raw.data / "embedding.npy")
    assert encoding.own_rows == encoding.seen_rows == len(table) and table.shape[1] == DIM


def test_long_sentences_are_cut_and_counted(raw: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    preprocess.main(raw.preprocess_flags("--n_ctx=3"))
    long = sum(len(sentence.split()) > 3 for sentence, _ in make_lines(16, 1))
    assert f"[valid.txt] {long} sentences are longer than n_ctx=3 and were truncated" in caplog.text
    expected = [sentence.lower().split()[:3] for sentence, _ in make_lines(16, 1)]
    assert [len(words) for words, _ in decoded(raw.data, "valid.txt")] == [len(words) for words in expected]


def test_report(raw: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = make_lines(16, 1)
    write_lines(raw.data / "valid.txt", [*lines, ("only here", "GetWeather"), ("only here", "PlayMusic")])
    preprocess.main(raw.preprocess_flags())
    words = [word for sentence, _ in [*lines, ("only here", ""), ("only here", "")] for word in sentence.split()]
    assert f"[valid.txt] 18 sentences, {len(words)} words; words a sentence: mean {len(words) / 18:.2f}" in caplog.text
    assert "PlayMusic 5, GetWeather 5, book a table 4, none of these 4" in caplog.text
    assert "[valid.txt] 1 sentences stand with two labels (such as valid.txt:17, valid.txt:18)" in caplog.text
    assert "[coverage]" in caplog.text


def test_encoding_is_what_raw_text_inference_reads(encoded: Place) -> None:
    data = EncodedData(encoded.data / "test.txt.ids")
    tokenize = WordTokenizer((encoded.data / "vocab.txt").read_text(encoding="utf-8"), data.encoding)
    expected = [token for sentence, _ in make_lines(21, 2) for token in tokenize(sentence)]
    assert data.token_ids.tolist() == expected


# -------------------------------------------------------------------------------------------------- the vocabulary

COUNTS = Counter({"the": 9, "zoo": 5, "cat": 5, "paris": 2, "<unk>": 1})
FILE = ["dog", "the", "Paris", "PARIS", "cat", "<unk>"]


@pytest.mark.parametrize(("lowercase", "max_vocab", "expected", "own", "seen"), [
    (True, 0, ["zoo", "the", "cat", "paris", "<unk>", "dog"], 3, 7),
    (True, 3, ["zoo", "the", "cat"], 3, 5),
    (True, 4, ["zoo", "the", "cat", "paris"], 3, 6),
    (True, 6, ["zoo", "the", "cat", "paris", "<unk>", "dog"], 3, 7),
    (False, 0, ["zoo", "paris", "the", "cat", "<unk>", "dog", "Paris", "PARIS"], 4, 7),
])
def test_vocabulary_order_and_borders(lowercase: bool, max_vocab: int, expected: list[str], own: int,
                                      seen: int) -> None:
    words, rows, borders = build_vocabulary(COUNTS, FILE, lowercase, max_vocab, ["<pad>", "<unk>"])
    assert words == ["<pad>", "<unk>", *expected] and borders == {"own": own, "seen": seen}
    for word, row in zip(words[2:], rows[2:], strict=True):
        assert (FILE[row] if row >= 0 else None) in (word, word.capitalize(), None) and (row >= 0) == (
            word in (map(str.lower, FILE) if lowercase else FILE))
    assert rows[:2].tolist() == [-1, -1]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="session")
def arena(encoded_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place of hypothesis tests, put back after each example. What stands there can be told from new files."""
    place = encoded_once.copy(tmp_path_factory.mktemp("arena") / "place")
    for name in MADE - {"label.txt"}:
        (place.data / name).write_text("of an earlier run")
    return place


def expectation(contents: dict[str, bytes]) -> tuple[str, int | None] | dict[str, list[tuple[str, str | None]]]:
    """What a naive reader makes of three files: the examples of each, or (file, line) of the first fault."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    labels: set[str] = set()
    for name in SPLITS:
        lines = naive(contents[name])
        found[name] = []
        for line in lines:
            if isinstance(line, int):
                return name, line
            number, sentence, label = line
            if looks_like_logits(label):
                return name, number
            found[name].append((sentence, label if name == "train.txt" or label in labels else None))
        if not lines:
            return name, None
        if name == "train.txt":
            labels = {str(label) for _, label in found[name]}
            if len(labels) < 2:
                return name, None
    return found


def check_against_naive_reader(arena: Place, name: str, content: bytes) -> None:
    before = snapshot(arena.data)
    try:
        (arena.data / name).write_bytes(content)
        changed = snapshot(arena.data)
        expected = expectation({split: (arena.data / split).read_bytes() for split in SPLITS})
        said = answer(preprocess.main, *arena.preprocess_flags())
        if isinstance(expected, tuple):
            file, line = expected
            fault = file_fault(arena.data / file)  # of all lines, where there is one
            place = f": {fault}" if fault else f":{line}: " if line else ": "
            assert said is not None and said.startswith(f"{arena.data / file}{place}")
            assert snapshot(arena.data) == changed
        else:
            assert said is None
            for split in SPLITS:
                check_decoded(arena.data, split, expected[split])
    finally:
        restore(arena.data, before)


labels = st.sampled_from([*INTENTS, *INTENTS, *INTENTS, "unheard of", "", " ", "a\u2028b", "\u00a0"])
sentences = st.sampled_from(["play jazz", "weather", "x\u2028y", "é\x85 z", "a\rb", "東京 <pad> <unk>", "", " ",
                             "\ufeffx"])
separators = st.sampled_from(["\t"] * 8 + [" \t", "", "\t\t", "\0\t"])
tails = st.sampled_from([b""] * 8 + [b"\r", b" ", b"\xff", b"\n"])
some_lines = st.lists(st.tuples(sentences, separators, labels, tails).map(
    lambda parts: "".join(parts[:3]).encode() + parts[3]), max_size=5)
good_line = b"play some jazz\tPlayMusic"


@settings(max_examples=120)
@given(name=st.sampled_from(SPLITS), lines=some_lines, bom=st.booleans(), end=st.sampled_from([b"", b"\n", b"\r\n"]),
       whole=st.booleans())
def test_malformed_lines(arena: Place, name: str, lines: list[bytes], bom: bool, end: bytes, whole: bool) -> None:
    start = (arena.data / name).read_bytes() if whole else b""
    check_against_naive_reader(arena, name, b"\xef\xbb\xbf" * bom + start + b"\n".join(lines) + end)


@settings(max_examples=80)
@given(name=st.sampled_from(SPLITS), place=st.integers(0, 3000), cut=st.integers(0, 4), put=st.binary(max_size=3))
def test_damaged_bytes(arena: Place, name: str, place: int, cut: int, put: bytes) -> None:
    content = (arena.data / name).read_bytes()
    place %= len(content)
    check_against_naive_reader(arena, name, content[:place] + put + content[place + cut :])


@settings(max_examples=40)
@given(bad=st.lists(st.sampled_from([b"no tab", b"", b"a\tb\tc", b"\xff\tPlayMusic", b"x\t ", b"\tPlayMusic"]),
                    min_size=1, max_size=6), name=st.sampled_from(SPLITS[1:]))
def test_skipped_lines_are_counted(arena: Place, bad: list[bytes], name: str) -> None:
    before = snapshot(arena.data)
    examples = make_lines(8, 7)
    good = [f"{sentence}\t{label}".encode() for sentence, label in examples]
    mixed = [line for pair in zip(bad, good, strict=False) for line in pair] + bad[len(good) :] + good[len(bad) :]
    try:
        (arena.data / name).write_bytes(b"\n".join(mixed) + b"\n")
        if not file_fault(arena.data / name):
            assert refusal(preprocess.main, *arena.preprocess_flags()).startswith(f"{arena.data / name}:1: ")
        preprocess.main(arena.preprocess_flags("--skip_bad_lines"))
        check_decoded(arena.data, name, examples)
        encoding = EncodedData(arena.data / f"{name}.ids").encoding
        assert (encoding.skipped, encoding.sentences) == (len(bad), 8)
    finally:
        restore(arena.data, before)


def test_skipped_lines_of_train(raw: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open(raw.data / "train.txt", "ab") as file:
        file.write(b"hapax legomenon\n\xff\tPlayMusic\n")
    preprocess.main(raw.preprocess_flags("--skip_bad_lines"))
    check_decoded(raw.data, "train.txt", make_lines(46, 0))
    assert "[train.txt] 2 bad lines were skipped" in caplog.text
    assert "hapax" not in (raw.data / "vocab.txt").read_text(encoding="utf-8")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is warned of since the last call."""
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return said


def test_labels_that_train_lacks_are_kept(raw: Place, caplog: pytest.LogCaptureFixture) -> None:
    for name, split in (("valid.txt", 1), ("test.txt", 2)):
        write_lines(raw.data / name, [("an odd one", "oos"), *make_lines(16, split), ("play", "PlayMusic#x"),
                                      ("of a class of its own", "oos")])
    contents = {name: (raw.data / name).read_bytes() for name in SPLITS}
    for flags in ([], ["--skip_bad_lines"], ["--num_workers=2"]):
        preprocess.main(raw.preprocess_flags(*flags))
        for name in SPLITS[1:]:
            check_decoded(raw.data, name, expectation(contents)[name])
            data = EncodedData(raw.data / f"{name}.ids")
            assert (data.targets == UNKNOWN_LABEL).sum() == 3 and data.encoding.skipped == 0
        assert (EncodedData(raw.data / "train.txt.ids").targets >= 0).all()
        said = warnings(caplog)
        assert len(said) == 2 and said[1].startswith("[test.txt] 3 sentences have ")
        assert said[0].startswith("[valid.txt] 3 sentences have a label that train.txt lacks ('oos', 'PlayMusic#x')")
        assert read_labels(raw.data / "label.txt").names == tuple(INTENTS)


def test_augmented_text_with_an_unknown_label_is_an_error(encoded: Place) -> None:
    write_lines(encoded.data / "augmented.raw", [*make_lines(3, 1), ("an odd one", "oos")])
    said = refused_without_a_trace(encoded, "--augmented")
    assert said.startswith(f"{encoded.data / 'augmented.raw'}:4: unknown label 'oos'")


def test_what_is_surely_not_meant_is_warned_of_once(raw: Place, caplog: pytest.LogCaptureFixture) -> None:
    for split, name in enumerate(SPLITS):
        write_lines(raw.data / name, [("sentence", "label"), *make_lines(40, split), ('"hey, you"', '"PlayMusic"')])
    preprocess.main(raw.preprocess_flags())
    said = "\n".join(warnings(caplog))
    assert said.count("looks like a table's header") == 3 and said.count("looks like") == 3
    assert said.count("""look alike are classes of their own: 'PlayMusic' and '"PlayMusic"';""") == 1
    assert said.count("sentences stand in double quotes") == 3 and said.count('label "PlayMusic" stands in double') == 1
    assert len(said.splitlines()) == 8


def test_swapped_columns_and_text_without_blanks_are_warned_of(raw: Place, caplog: pytest.LogCaptureFixture) -> None:
    lines = [(label, f"내일{number}시에날씨가어떤지알려줘") for number, (_, label) in enumerate(make_lines(40, 1))]
    for name in SPLITS:
        write_lines(raw.data / name, lines)
    preprocess.main(raw.preprocess_flags())
    assert ["the columns seem to be swapped" in warning for warning in warnings(caplog)] == [True]
    for name in SPLITS:
        write_lines(raw.data / name, [(text, label) for label, text in lines])
    preprocess.main(raw.preprocess_flags())
    (blanks, coverage) = warnings(caplog)
    assert "without blanks" in blanks and coverage.startswith("[coverage] only 0.0% of the running words")
    assert "'play', 'on', 'in'" in coverage


# ------------------------------------------------------------------------------------------------------ Unicode forms

words = st.sampled_from(["내일", "날씨", "café", "naïve", "ệ", "play", "東京", "İ", "q\u0323\u0307"])
pairs = st.tuples(st.lists(words, min_size=1, max_size=5).map(" ".join), st.sampled_from(["날씨", "café", "mu sic"]))


@settings(max_examples=30)
@given(lines=st.lists(pairs, min_size=4, max_size=8),
       forms=st.lists(st.sampled_from(["NFC", "NFD"]), min_size=6, max_size=6), lowercase=st.booleans())
def test_the_unicode_form_does_not_matter(arena: Place, lines: list[tuple[str, str]], forms: list[str],
                                          lowercase: bool) -> None:
    before = snapshot(arena.data)
    config = write_config(arena.root / "forms.json", lowercase=lowercase)
    vectors = arena.root / "forms.txt"
    lines = [*lines, ("play", "날씨"), ("play", "café")]
    table = "".join(f"{word}{' 0.5' * DIM}\n" for word in ("Café", "날씨", "ệ", "play"))
    made = []
    try:
        for choice in (["NFC"] * 6, forms):
            for name, form, label_form in zip(SPLITS, choice, choice[3:], strict=False):
                write_lines(arena.data / name, [
                    (unicodedata.normalize(form, sentence), "\u200b" + unicodedata.normalize(label_form, label))
                    for sentence, label in lines] + [("play", "날씨")])
            vectors.write_text(unicodedata.normalize(choice[3], table), encoding="utf-8")
            Path(f"{vectors}.cache").unlink(missing_ok=True)
            preprocess.main(arena.preprocess_flags(f"--config={config}", f"--embedding_path={vectors}"))
            found = [EncodedData(arena.data / f"{name}.ids") for name in SPLITS]
            assert found[0].token_ids.tolist() == found[1].token_ids.tolist() == found[2].token_ids.tolist()
            assert all((data.targets == found[0].targets).all() for data in found)
            made.append([(arena.data / name).read_bytes() for name in ("vocab.txt", "label.txt", "embedding.npy")])
            tokenize = WordTokenizer(made[-1][0].decode(), found[0].encoding)
            for (sentence, _), row in zip(lines, found[0].rows(range(len(lines))), strict=True):
                assert tokenize(unicodedata.normalize("NFD", sentence)) == tokenize(sentence) == row.tolist()
        assert made[0] == made[1]
    finally:
        restore(arena.data, before)


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Workers]]:
    """Processes that last over many runs."""
    with Workers(2) as two, Workers(3) as three:
        yield {2: two, 3: three}


def outcome(place: Place, workers: Workers | None, block: int, *flags: str) -> tuple[str | None, dict[str, Any], str]:
    """What preprocess.py says and writes with these workers and blocks of so many bytes."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    before = snapshot(place.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block)
        if workers:
            patch.setattr(preprocess, "Workers", lambda number: contextlib.nullcontext(workers))
        preprocess.logger.addHandler(handler)
        try:
            answered = answer(preprocess.main, *place.preprocess_flags(*flags))
            return answered, snapshot(place.data), said.getvalue()
        finally:
            preprocess.logger.removeHandler(handler)
            restore(place.data, before)


@settings(max_examples=40)
@given(name=st.sampled_from(SPLITS), lines=st.lists(some_lines, max_size=6).map(lambda parts: sum(parts, [])),
       place=st.integers(0, 46), skip=st.booleans(), block=st.integers(1, 600), number=st.sampled_from([1, 2, 3]))
def test_same_bytes_whatever_the_number_of_processes(arena: Place, pools: dict[int, Workers], name: str,
                                                     lines: list[bytes], place: int, skip: bool, block: int,
                                                     number: int) -> None:
    before = snapshot(arena.data)
    try:
        good = (arena.data / name).read_bytes().splitlines()
        (arena.data / name).write_bytes(b"\n".join([*good[:place], *lines, *good[place:]]))
        flags = ["--skip_bad_lines"] * skip
        assert outcome(arena, pools.get(number), block, *flags) == outcome(arena, None, 1 << 20, *flags)
    finally:
        restore(arena.data, before)


@settings(max_examples=10)
@given(block=st.integers(1, 400), skip=st.booleans(), wrong=st.integers(0, 12))
def test_same_bytes_of_logits(arena: Place, pools: dict[int, Workers], block: int, skip: bool, wrong: int) -> None:
    before = snapshot(arena.data)
    try:
        lines = logit_lines(12)
        lines[wrong:wrong] = [("wrong", "1 2 3")]
        write_lines(arena.data / "train.txt", lines)
        flags = ["--skip_bad_lines"] * skip
        assert outcome(arena, pools[2], block, *flags) == outcome(arena, None, 1 << 20, *flags)
    finally:
        restore(arena.data, before)


def test_same_bytes_of_a_transformer(raw: Place, tmp_path: Path, pools: dict[int, Workers]) -> None:
    folder = make_model("BERT", tmp_path / "tiny", [sentence for sentence, _ in make_lines(40, 0)])
    raw.config.write_text(json.dumps({"emb_class": "bert", "enc_class": "cls", "n_ctx": 9, "dropout": 0.1}))
    shutil.copy(raw.data / "train.txt", raw.data / "augmented.raw")
    for flags in ([], ["--augmented"]):
        if flags:
            preprocess.main(raw.preprocess_flags(f"--bert_model_name_or_path={folder}"))
        flags.append(f"--bert_model_name_or_path={folder}")
        alone = outcome(raw, None, 1 << 20, *flags)
        assert alone[0] is None and "train.txt.fs" in alone[1]
        assert outcome(raw, pools[2], 100, *flags) == alone


def test_num_workers(raw: Place) -> None:
    alone = outcome(raw, None, 1 << 20)
    done = script("preprocess.py", *raw.preprocess_flags("--num_workers=2"))
    assert done.communicate()[1] and done.returncode == 0
    assert snapshot(raw.data) == alone[1]


damaged_configs = st.tuples(st.sampled_from(ENCODERS), st.integers(0, 400), st.integers(0, 3),
                            st.binary(max_size=2)).map(
    lambda parts: (text := json.dumps(make_config(parts[0])).encode())[: parts[1] % len(text)] + parts[3]
    + text[parts[1] % len(text) + parts[2] :])


@settings(max_examples=60)
@given(content=damaged_configs)
def test_damaged_configs(arena: Place, content: bytes) -> None:
    path = arena.root / "damaged.json"
    path.write_bytes(content)
    before = snapshot(arena.data)
    try:
        said = answer(preprocess.main, *arena.preprocess_flags(f"--config={path}"))
        if said is not None:
            assert said.startswith(f"{path}:") and snapshot(arena.data) == before
        else:
            config = json.loads(content)
            assert config.keys() <= {*make_config(config["enc_class"]), "tokenizer"}
            assert EncodedData(arena.data / "train.txt.ids").encoding.n_ctx == config["n_ctx"]
    finally:
        restore(arena.data, before)


@settings(max_examples=40)
@given(line=st.integers(0, len(COVERED) - 1), change=st.sampled_from(
    [lambda s: s + b" 1", lambda s: s.rsplit(b" ", 1)[0], lambda s: s + b"x", lambda s: b"word", lambda s: b"",
     lambda s: s.replace(b".", b",", 1), lambda s: s.rsplit(b" ", 1)[0] + b" nan",
     lambda s: s.rsplit(b" ", 1)[0] + b" 1e99", lambda s: b"\xff" + s,
     lambda s: s.replace(b" ", b"\t"), lambda s: s + b" ", lambda s: b"two words " + s]))
def test_malformed_vectors(arena: Place, line: int, change: Callable[[bytes], bytes]) -> None:
    lines = (arena.root / "vectors.txt").read_bytes().splitlines()
    lines[line] = change(lines[line])
    path = arena.root / "other.txt"
    path.write_bytes(b"\n".join(lines) + b"\n")
    Path(f"{path}.cache").unlink(missing_ok=True)
    before = snapshot(arena.data)
    try:
        said = answer(preprocess.main, *arena.preprocess_flags(f"--embedding_path={path}"))
        if said is not None:
            assert said.startswith(f"{path}:{line + 1}: ") and snapshot(arena.data) == before
            assert not Path(f"{path}.cache").exists()
        else:
            assert np.load(arena.data / "embedding.npy").shape[1] == DIM
    finally:
        restore(arena.data, before)


def refused_without_a_trace(place: Place, *flags: Any) -> str:
    before = snapshot(place.data)
    said = refusal(preprocess.main, *place.preprocess_flags(*flags))
    assert snapshot(place.data) == before
    return said


@pytest.mark.parametrize("missing", [*SPLITS, "vectors", "config"])
def test_missing_files(encoded: Place, missing: str) -> None:
    path = getattr(encoded, missing) if missing in ("vectors", "config") else encoded.data / missing
    path.unlink()
    assert refused_without_a_trace(encoded).startswith(f"{path}: no such file")


@pytest.mark.parametrize("content", [b"", b"\n", b"word\n", b"3 8\nword 1 2\n", b"PK\x03\x04zip"])
def test_files_without_vectors(encoded: Place, content: bytes) -> None:
    encoded.vectors.write_bytes(content)
    assert refused_without_a_trace(encoded).startswith(f"{encoded.vectors}:")


def test_damaged_labels_matter_only_where_they_are_read(encoded: Place) -> None:
    good = (encoded.data / "label.txt").read_bytes()
    (encoded.data / "label.txt").write_bytes(b"\xff\n\n")
    shutil.copy(encoded.data / "train.txt", encoded.data / "augmented.raw")
    assert refused_without_a_trace(encoded, "--augmented").startswith(f"{encoded.data / 'label.txt'}: ")
    preprocess.main(encoded.preprocess_flags())
    assert (encoded.data / "label.txt").read_bytes() == good


# -------------------------------------------------------------------------------------------- logits, augmented data


def logit_lines(count: int, classes: int = 4) -> list[tuple[str, str]]:
    numbers = np.random.default_rng(0).normal(size=(count, classes)).round(3)
    return [(sentence, " ".join(map(str, row)))
            for (sentence, _), row in zip(make_lines(count, 3), numbers.tolist(), strict=True)]


def test_logits_as_labels(raw: Place) -> None:
    lines = logit_lines(20)
    write_lines(raw.data / "train.txt", lines)
    assert "label.txt" in refused_without_a_trace(raw)
    write_labels(Labels(tuple(INTENTS)), raw.data / "label.txt")
    preprocess.main(raw.preprocess_flags())
    found = [target for _, target in decoded(raw.data, "train.txt")]
    expected = [[float(part) for part in label.split()] for _, label in lines]
    np.testing.assert_array_equal(np.array(found, np.float32), np.array(expected, np.float32))
    assert EncodedData(raw.data / "valid.txt.ids").has_logits is False
    assert read_labels(raw.data / "label.txt").names == tuple(INTENTS)


@settings(max_examples=40)
@given(place=st.integers(0, 9), wrong=st.sampled_from(
    ["1 2 3", "1 2 3 4 5", "1 2 3 nan", "1 2 -inf 4", "1 2 3 1e39", "PlayMusic", "1 2 three 4", "1"]))
def test_bad_logits(arena: Place, place: int, wrong: str) -> None:
    lines = logit_lines(10)
    lines[place] = (lines[place][0], wrong)
    before = snapshot(arena.data)
    try:
        write_lines(arena.data / "train.txt", lines)
        changed = snapshot(arena.data)
        said = answer(preprocess.main, *arena.preprocess_flags())
        # A class in the first line makes the second one the odd one out.
        line = 2 if place == 0 and not looks_like_logits(wrong) else place + 1
        assert said is not None and said.startswith(f"{arena.data / 'train.txt'}:{line}: ")
        assert snapshot(arena.data) == changed
        if line == place + 1:
            preprocess.main(arena.preprocess_flags("--skip_bad_lines"))
            assert len(EncodedData(arena.data / "train.txt.ids")) == 9
    finally:
        restore(arena.data, before)


def test_augmented(encoded: Place) -> None:
    preprocess.main(encoded.preprocess_flags())
    before = snapshot(encoded.data)
    write_lines(encoded.data / "augmented.txt", [*logit_lines(9), ("a word never met", "1 2 3 4")])
    preprocess.main(encoded.preprocess_flags("--augmented", "--augmented_filename=augmented.txt",
                                             f"--logits_order={encoded.data / 'label.txt'}"))
    after = snapshot(encoded.data)
    assert set(after) - set(before) == {"augmented.txt", "augmented.txt.ids"}
    assert {name for name in before if before[name] != after[name]} == set()
    words, target = decoded(encoded.data, "augmented.txt")[-1]
    assert words[-1] == "<unk>" and target == [1.0, 2.0, 3.0, 4.0]


def test_augmented_needs_the_labels_of_train(encoded: Place) -> None:
    write_lines(encoded.data / "augmented.raw", logit_lines(9))
    write_labels(Labels(tuple(reversed(INTENTS))), encoded.data / "label.txt")
    assert "label.txt" in refused_without_a_trace(encoded, "--augmented")
    (encoded.data / "label.txt").unlink()
    assert "label.txt: no such file" in refused_without_a_trace(encoded, "--augmented")


# ------------------------------------------------------------------------------------------------------- real data


def test_the_sample_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(ROOT / "data/sample", tmp_path / "sample")
    preprocess.main([f"--config={write_config(tmp_path / 'config.json')}", f"--data_dir={tmp_path / 'sample'}",
                     "--embedding_path=none"])
    assert warnings(caplog) == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["snips", "sst2", "clinc150", "3i4k", "korean-hate-speech", "banking77"])
def test_ordinary_files_give_no_warning(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                        name: str) -> None:
    source = shared / "data" / name
    if (source / "train.txt").exists():
        lines = {split: (source / split).read_text(encoding="utf-8") for split in SPLITS}
    else:
        if name == "3i4k":
            rows = [line.split("\t")[::-1] for line in (source / "fci_test.txt").read_text().splitlines()]
        elif name == "banking77":
            with open(source / "train.csv", newline="") as file:
                rows = [[" ".join(text.split()), label] for text, label in csv.reader(file)][1:]
        else:
            rows = [[fields[0].strip(), fields[3]] for line in (source / "train.tsv").read_text().splitlines()[1:]
                    if len(fields := line.split("\t")) == 4]
        lines = {split: "".join(f"{text}\t{label}\n" for text, label in rows) for split in SPLITS}
    for split, content in lines.items():
        (tmp_path / split).write_text(content, encoding="utf-8")
    preprocess.main([f"--config={write_config(tmp_path / 'config.json')}", f"--data_dir={tmp_path}",
                     "--embedding_path=none"])
    assert warnings(caplog) == []


@pytest.mark.real
def test_out_of_scope_sentences_stay(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = shared / "data/clinc150"
    for split in SPLITS:
        shutil.copy(source / split, tmp_path / split)
    with open(tmp_path / "test.txt", "ab") as file:
        file.write((source / "oos.test.txt").read_bytes())
    preprocess.main([f"--config={write_config(tmp_path / 'config.json')}", f"--data_dir={tmp_path}",
                     "--embedding_path=none"])
    (said,) = warnings(caplog)
    assert "[test.txt] 1000 sentences have a label that train.txt lacks ('oos')" in said
    assert len(EncodedData(tmp_path / "test.txt.ids")) == 5500


@pytest.mark.real
@pytest.mark.parametrize(("name", "known"), [
    ("snips", ["[test.txt] 26 sentences stand in train.txt too"]),
    ("sst2", ["[test.txt] 5 sentences stand in train.txt too", "[train.txt] 371 sentences repeat an earlier one",
              "[train.txt] 5 sentences stand with two labels"]),
])
def test_what_is_known_of_the_real_data(shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str,
                                        known: list[str]) -> None:
    caplog.set_level(logging.INFO)
    shutil.copytree(shared / "data" / name, tmp_path / name)
    config = write_config(tmp_path / "config.json")
    preprocess.main([f"--config={config}", f"--data_dir={tmp_path / name}", "--embedding_path=none"])
    for fact in known:
        assert fact in caplog.text


def test_of_two_runs_on_one_folder_the_second_is_refused(raw: Place) -> None:
    before = snapshot(raw.data)
    with exclusive("--data_dir", str(raw.data)):
        assert "another run is writing to it" in refusal(preprocess.main, *raw.preprocess_flags())
    assert snapshot(raw.data) == before
