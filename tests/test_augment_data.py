"""Variants of sentences: what may change, and the same bytes for any number of processes; and the analyzers."""

from __future__ import annotations

import builtins
import json
import operator
import subprocess
import sys
import types
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, make_lines, refusal, snapshot, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import augment_data
from augment_data import Augmenter, Lexicon, make_lexicon
from sentence_classifier.errors import InputError
from text import tagging
from text.labels import find_logits_info, write_logits_info
from text.workers import Workers

MASK = "[MASK]"


def augmenter(lexicon: Lexicon | None = None, **changes: Any) -> Augmenter:
    """One with the defaults of the flags."""
    given: dict[str, Any] = {"p_mask": 0.1, "p_pos": 0.1, "p_ng": 0.25, "max_ng": 5, "n_iter": 20, "mask_token": MASK,
                             "seed": 42, **changes}
    return Augmenter(lexicon or {}, **given)


def rows(path: Path) -> list[list[str]]:
    """The lines of a TSV file."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def groups(path: Path, sentences: list[str]) -> list[list[list[str]]]:
    """The lines of an output by the sentence that they come from; the sentences all differ in length or order."""
    found: list[list[list[str]]] = []
    for row in rows(path):
        if len(found) < len(sentences) and row[0] == " ".join(sentences[len(found)].split()):
            found.append([])
        found[-1].append(row)
    assert len(found) == len(sentences)
    return found


def changed(one: str, other: str) -> list[int]:
    """The places at which two sentences of the same number of words differ."""
    return [place for place, (a, b) in enumerate(zip(one.split(" "), other.split(" "), strict=True)) if a != b]


# --------------------------------------------------------------------------------------------------------- variants

words = st.sampled_from(["a", "the", "cat", "dog", "sat", "ran", "été", "東京", MASK, "'s", "."])
shares = st.floats(0, 0.5) | st.sampled_from([0.0, 0.5])


@settings(max_examples=150)
@given(sentence=st.lists(st.tuples(words, st.sampled_from("NVD")), min_size=1, max_size=12), tagged=st.booleans(),
       p_mask=shares, p_pos=shares, p_ng=st.floats(0, 1), max_ng=st.integers(1, 14), n_iter=st.integers(0, 12),
       seed=st.integers(0, 1 << 70), line=st.integers(1, 1 << 40))
def test_laws_of_variants(sentence: list[tuple[str, str]], tagged: bool, line: int, **flags: Any) -> None:
    counts = Counter((tag, word) for word, tag in sentence)
    make = augmenter(make_lexicon(counts), **flags)
    words, tags = [word for word, _ in sentence], [tag for _, tag in sentence] if tagged else []
    made = make.variants(words, tags, line)
    assert made[0] == " ".join(words)  # the original first
    assert len(made) <= flags["n_iter"] + 1 and len(set(made)) == len(made)  # no repeats
    for variant in made[1:]:
        places = changed(made[0], variant)
        assert 1 <= len(places) <= len(words) // 2  # never more than half
        for place in places:
            new = variant.split(" ")[place]
            assert new == MASK or (tagged and (tags[place], new) in counts)  # a word of the same part of speech
    assert make.variants(words, tags, line) == made


def test_masking_alone() -> None:
    words = [f"w{number}" for number in range(40)]
    made = augmenter(p_mask=0.25, p_pos=0, p_ng=0, n_iter=400).variants(words, [], 1)
    counts = [len(changed(made[0], variant)) for variant in made[1:]]
    assert sum(counts) / len(counts) == pytest.approx(10, abs=0.5)  # a quarter of 40
    assert {word for variant in made for word in variant.split(" ")} == {*words, MASK}


@pytest.mark.parametrize(("length", "max_ng", "longest"), [(12, 5, 5), (6, 5, 3), (3, 5, 1), (1, 5, 0)])
def test_masking_words_in_a_row(length: int, max_ng: int, longest: int) -> None:
    words = [f"w{number}" for number in range(length)]
    made = augmenter(p_mask=0, p_pos=0, p_ng=1, max_ng=max_ng, n_iter=300).variants(words, [], 1)
    runs = {tuple(changed(made[0], variant)) for variant in made[1:]}
    assert runs == {tuple(range(start, start + size)) for size in range(1, longest + 1)
                    for start in range(length - size + 1)}


def test_half_of_the_changes_are_taken_anywhere() -> None:
    words = [f"w{number}" for number in range(10)]
    made = augmenter(p_mask=1, p_pos=0, p_ng=0, n_iter=2000).variants(words, [], 1)
    assert {len(changed(made[0], variant)) for variant in made[1:]} == {5}
    assert len(made) == 1 + 252  # each five of ten places


def test_words_are_drawn_by_their_frequency() -> None:
    lexicon = make_lexicon(Counter({("N", "cat"): 6, ("N", "dog"): 3, ("N", "emu"): 1, ("V", "ran"): 50}))
    made: Counter[str] = Counter()
    make = augmenter(lexicon, p_mask=0, p_pos=1, p_ng=0, n_iter=1)
    for line in range(4000):
        for variant in make.variants(["owl", "owl"], ["N", "N"], line)[1:]:
            made.update(set(variant.split(" ")) - {"owl"})
    total = sum(made.values())
    assert total == 4000 and set(made) == {"cat", "dog", "emu"}
    assert [made[word] / total for word in ("cat", "dog", "emu")] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


# ------------------------------------------------------------------------------------------------------- whole files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Lines with CRLF, blanks before the TAB and no end of the last line."""
    lines = [f"{sentence} {number}  \t{label}" for number, (sentence, label) in enumerate(make_lines(30, 1))]
    path = tmp_path / "train.txt"
    path.write_bytes("\r\n".join(lines).encode())
    return path


def run(source: Path, *flags: str, output: str = "augmented.raw") -> Path:
    target = source.with_name(output)
    augment_data.main([f"--input={source}", f"--output={target}", *flags])
    return target


@pytest.mark.parametrize("flags", [[], ["--preserve_label"], ["--dummy_label=no label", "--no_analyzer"]])
def test_a_file(source: Path, flags: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    given = [line.split("\t") for line in source.read_bytes().decode().split("\r\n")]
    sentences = [sentence for sentence, _ in given]
    found = groups(run(source, "--analyzer=hanta", *flags) if not flags[1:] else run(source, *flags), sentences)
    vocabulary = {word for sentence in sentences for word in sentence.split()} | {MASK}
    replaced = 0
    for (sentence, label), (first, *variants) in zip(given, found, strict=True):
        kept = {0: "dummy", 1: label, 2: "no label"}[len(flags)]
        assert all(row[1] == kept for row in (first, *variants))
        assert len({row[0] for row in (first, *variants)}) == len(variants) + 1 <= 21
        for variant, _ in variants:
            places = changed(first[0], variant)
            assert 1 <= len(places) <= len(sentence.split()) // 2
            new = {variant.split(" ")[place] for place in places}
            assert new <= vocabulary
            replaced += bool(new - {MASK})
    assert (replaced > 0) == ("--no_analyzer" not in flags)
    assert "30 sentences" in caplog.text and "a second" in caplog.text


def test_the_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    lines = [(f"{sentence} {number}", label) for number, (sentence, label) in enumerate(make_lines(600, 1))]
    write_lines(tmp_path / "train.txt", lines)
    flags = ["--analyzer=hanta", "--n_iter=3", "--lower"]
    expected = run(tmp_path / "train.txt", *flags).read_bytes()
    target = run(tmp_path / "train.txt", *flags, "--parallel", "--num_workers=3", output="3.raw")
    assert target.read_bytes() == expected
    assert run(tmp_path / "train.txt", *flags, "--seed=43", output="43.raw").read_bytes() != expected
    # Another number of variants changes no variant: each is one more draw.
    more = run(tmp_path / "train.txt", *flags[:1], "--n_iter=5", "--lower", output="5.raw").read_bytes()
    assert set(expected.splitlines()) <= set(more.splitlines())


def test_memory_does_not_grow_with_the_number_of_pieces() -> None:
    taken = []

    def pieces() -> Any:
        for number in range(40):
            taken.append(number)
            yield number

    for workers, ahead in ((1, 1), (2, 5)):
        taken.clear()
        done = []
        with Workers(workers, partial(operator.attrgetter, "real")) as pool:
            for result in pool.map(pool.made, pieces()):
                done.append(result)
                assert len(taken) <= len(done) + ahead
        assert done == list(range(40))


def test_no_augment_only_splits_into_words(source: Path) -> None:
    found = rows(run(source, "--no_augment", "--no_analyzer", "--lower", "--preserve_label"))
    given = [line.split("\t") for line in source.read_bytes().decode().split("\r\n")]
    assert found == [[" ".join(sentence.lower().split()), label] for sentence, label in given]


def test_lower_case_leaves_the_mask_token_alone(source: Path) -> None:
    text = run(source, "--no_analyzer", "--lower", "--mask_token=<Mask>").read_text(encoding="utf-8")
    assert "<Mask>" in text and text.replace("<Mask>", "").islower()


@pytest.mark.parametrize("recorded", [True, False])
def test_logits_are_kept_to_the_letter_with_their_record(tmp_path: Path, recorded: bool) -> None:
    source = tmp_path / "augmented.raw.pred"
    write_lines(source, [("a b c d", "1.5 -2e-05"), ("e f g h", "0.1 0.25")])
    if recorded:
        write_logits_info(source, ["no", "yes"], teacher={"run_id": "abc"})
    target = run(source, "--no_analyzer", "--preserve_label", output="more.raw")
    assert {label for _, label in rows(target)} == {"1.5 -2e-05", "0.1 0.25"}
    record = find_logits_info(target)
    assert (record is not None) == recorded
    if record:
        assert record["labels"] == ["no", "yes"] and record["teacher"] == {"run_id": "abc"}
        assert record["source"]["file"] == source.name
    assert find_logits_info(run(source, "--no_analyzer", output="unlabelled.raw")) is None


def test_text_in_another_script_is_no_matter_for_an_english_analyzer(tmp_path: Path,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "train.txt", [("내일 서울 날씨 어때", "날씨")] * 3)
    for flags, warned in (["--analyzer=hanta"], True), (["--no_analyzer"], False):
        caplog.clear()
        run(tmp_path / "train.txt", *flags)
        assert ("--analyzer=kiwi" in caplog.text) == warned == ("knows English" in caplog.text)


def test_the_unicode_form_does_not_matter(tmp_path: Path) -> None:
    written = []
    for form in ("NFC", "NFD"):
        lines = [(unicodedata.normalize(form, f"내일 café {number} naïve"), unicodedata.normalize(form, "날씨"))
                 for number in range(9)]
        write_lines(tmp_path / "train.txt", lines)
        written.append(run(tmp_path / "train.txt", "--analyzer=hanta", "--preserve_label").read_text(encoding="utf-8"))
    assert written[0] == written[1] == unicodedata.normalize("NFC", written[0])


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("content", "place"), [
    (b"fine\tx\nno label\nfine\tx\n", ":2: no TAB"), (b"a\tb\tc\n", ":1: more than one TAB"),
    (b"fine\tx\n\xff\tx\n", ":2: broken UTF-8"), (b"fine\tx\n \tx\n", ":2: the sentence is empty"),
    (b"", ": the file is empty")])
def test_bad_lines(tmp_path: Path, content: bytes, place: str) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.raw"
    source.write_bytes(content)
    target.write_text("what was there")
    before = snapshot(tmp_path)
    flags = [f"--input={source}", f"--output={target}", "--no_analyzer"]
    assert refusal(augment_data.main, *flags).startswith(f"{source}{place}")
    assert snapshot(tmp_path) == before
    if content.startswith(b"fine"):
        augment_data.main([*flags, "--skip_bad_lines"])
        assert {label for _, label in rows(target)} == {"dummy"}


@pytest.mark.parametrize("flags", [
    ["--p_mask=0.6", "--p_pos=0.5"], ["--num_workers=2"], ["--analyzer=hanta", "--no_analyzer"], ["--mask_token=a b"],
    ["--mask_token="], ["--dummy_label=a\tb"], ["--dummy_label= "], ["--p_ng=1.5"], ["--max_ng=0"], ["--n_iter=-1"],
    ["--analyzer=other"], ["--n_itre=3"]])
def test_flags_that_make_no_sense(source: Path, flags: list[str]) -> None:
    before = snapshot(source.parent)
    said = refusal(augment_data.main, f"--input={source}", f"--output={source.with_name('out')}", *flags)
    assert flags[0].split("=")[0].replace("itre", "iter") in said
    assert snapshot(source.parent) == before


def test_files_that_cannot_be(source: Path) -> None:
    before = snapshot(source.parent)
    assert "choose another --output" in refusal(augment_data.main, f"--input={source}", f"--output={source}")
    missing = source.with_name("missing.txt")
    assert f"{missing}: " in refusal(augment_data.main, f"--input={missing}", f"--output={source.with_name('out')}",
                                     "--no_analyzer")
    assert snapshot(source.parent) == before


# --------------------------------------------------------------------------------------------------------- analyzers


def test_hanta_decodes_as_hanta_does() -> None:
    analyze = tagging.make_hanta()
    sentences = [sentence for sentence, _ in make_lines(40, 5)] + [
        "The old man the boats , and I can can a can .", "'s '' -- ...", "東京 naïve 😀", "it 's n't"]
    from HanTa.HanoverTagger import HanoverTagger

    model = HanoverTagger(str(Path(sys.modules["HanTa"].__path__[0]) / "morphmodel_en.pgz"))
    for sentence, (words, tags) in zip(sentences, analyze(sentences), strict=True):
        assert words == sentence.split()
        assert tags == model.tag_sent(words, taglevel=0)
    # Of a word without end only the end is looked at.
    assert analyze(["he likes " + "x" * 100_000 + "ing"])[0][1][:2] == analyze(["he likes singing"])[0][1][:2]


class Token(types.SimpleNamespace):
    """A token of spaCy or of Kiwi."""


@pytest.fixture
def fake_spacy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A spaCy whose model splits off a full stop and tags by length."""
    def pipe(sentences: list[str]) -> Any:
        for sentence in sentences:
            yield [Token(text=word, tag_=f"L{len(word)}") for word in sentence.replace(".", " .").split(" ")]

    fake = types.ModuleType("spacy")
    fake.load = lambda name, **_: types.SimpleNamespace(pipe=pipe)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", fake)
    return fake


def test_spacy(fake_spacy: Any, tmp_path: Path) -> None:
    assert tagging.ANALYZERS["spacy"]()(["I  am.", "so"]) == [
        (["I", "am", "."], ["L1", "L2", "L1"]), (["so"], ["L2"])]
    write_lines(tmp_path / "in.txt", [("I am.", "x")])
    assert rows(run(tmp_path / "in.txt", "--analyzer=spacy"))[0] == ["I am .", "dummy"]


def test_spacy_without_its_model(fake_spacy: Any, source: Path) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise OSError("[E050] Can't find model")

    fake_spacy.load = load
    said = refusal(augment_data.main, f"--input={source}", f"--output={source}.raw", "--analyzer=spacy")
    assert "python -m spacy download en_core_web_sm" in said


@pytest.mark.parametrize(("installed", "chosen"), [({"spacy", "en_core_web_sm"}, "spacy"), ({"spacy"}, "hanta"),
                                                   (set(), "hanta")])
def test_the_default(monkeypatch: pytest.MonkeyPatch, installed: set[str], chosen: str, source: Path,
                     caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(tagging.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setitem(tagging.ANALYZERS, chosen, lambda: lambda sentences: [
        (sentence.split(), ["X"] * len(sentence.split())) for sentence in sentences])
    run(source)
    assert f"[analyzer] {chosen}" in caplog.text


@pytest.mark.parametrize(("name", "says"), [
    ("spacy", "python -m spacy download en_core_web_sm"), ("hanta", "pip install HanTa"),
    ("kiwi", "pip install kiwipiepy"), ("khaiii", "https://github.com/kakao/khaiii"), ("npc", "pip install kiwipiepy")])
def test_analyzers_that_are_missing(monkeypatch: pytest.MonkeyPatch, source: Path, name: str, says: str) -> None:
    imported = builtins.__import__

    def without(module: str, *rest: Any) -> Any:
        if module.split(".")[0] in ("spacy", "HanTa", "kiwipiepy", "khaiii"):
            raise ImportError(module)
        return imported(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    before = snapshot(source.parent)
    for more in ([], ["--parallel", "--num_workers=2"]):
        said = refusal(augment_data.main, f"--input={source}", f"--output={source}.raw", f"--analyzer={name}", *more)
        assert says in said and f"--analyzer={name}" in said
    assert snapshot(source.parent) == before


def test_korean_morphemes(monkeypatch: pytest.MonkeyPatch) -> None:
    kiwi = types.ModuleType("kiwipiepy")
    kiwi.Kiwi = lambda **_: types.SimpleNamespace(  # type: ignore[attr-defined]
        tokenize=lambda sentences: [[Token(form="새 집", tag="NNG"), Token(form="이", tag="JKS")] for _ in sentences])
    monkeypatch.setitem(sys.modules, "kiwipiepy", kiwi)
    assert tagging.ANALYZERS["kiwi"]()(["새 집이"]) == [(["새", "집", "이"], ["NNG", "NNG", "JKS"])]
    khaiii = types.ModuleType("khaiii")
    word = types.SimpleNamespace(morphs=[types.SimpleNamespace(lex="집", tag="NNG")])
    khaiii.KhaiiiApi = lambda: types.SimpleNamespace(analyze=lambda sentence: [word])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "khaiii", khaiii)
    assert tagging.ANALYZERS["khaiii"]()(["집"]) == [(["집"], ["NNG"])]


def test_a_sentence_without_words(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tagging.ANALYZERS, "hanta", lambda: lambda sentences: [([], []) for _ in sentences])
    with pytest.raises(InputError, match="train.txt:1: --analyzer=hanta finds no word"):
        augment_data.augment(augment_data.get_params([f"--input={source}", f"--output={source}.raw",
                                                      "--analyzer=hanta"]))


def test_it_loads_no_torch(source: Path) -> None:
    code = ("import json, sys, augment_data\n"
            f"augment_data.main(['--input={source}', '--output={source}.raw', '--no_analyzer'])\n"
            "print(json.dumps(sorted({'torch', 'transformers', 'HanTa', 'spacy'} & set(sys.modules))))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
