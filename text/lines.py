"""Lines, labels and tokenizers: plain text in, token ids out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

from sentence_classifier.errors import InputError
from util import atomic_write, open_input

# ------------------------------------------------------------------------------------------------------------- TSV


BLOCK_BYTES = 1 << 20  # that are worked on at a time, rounded up to whole lines


class Example(NamedTuple):
    """One line of a TSV file."""

    line: int  # counted from 1
    sentence: str
    label: Any  # what `parse_label` made of it


class Lines:
    """The examples of a `sentence TAB label` file, read as a stream so that memory does not grow with the file.

    Lines end at LF or CRLF and at nothing else (a U+2028 inside a sentence is text). A byte order mark is dropped.

    Args:
        path: the file.
        skip_bad_lines: count bad lines in `skipped` in place of raising on the first.
        labelled: False reads a whole line as one sentence, and a TAB in it as an error.
        parse_label: turns a label's text into what Example.label holds; raises ValueError with the reason where it
            is unusable.

    Raises:
        InputError: with file, line, what is wrong and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], skip_bad_lines: bool = False, labelled: bool = True,
                 parse_label: Callable[[str], Any] = str) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self.labelled = labelled
        self.parse_label = parse_label
        self.skipped = 0
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Example]:
        with contextlib.ExitStack() as stack:
            if str(self.path) == "-":
                file: IO[bytes] = sys.stdin.buffer
            else:
                file = stack.enter_context(open_input(self.path))
            usable = False
            for example in self.parse(file):
                usable = True
                yield example
            if not usable:
                raise self.no_line()

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """The file in blocks of whole lines, each with the number of its first line."""
        first = 1
        with open_input(self.path) as file:
            while block := file.read(BLOCK_BYTES):
                block += file.readline()
                yield first, block
                first += block.count(b"\n")

    def parse(self, lines: Iterable[bytes], first: int = 1) -> Iterator[Example]:
        """The examples of raw lines, of which the first has the number `first`; see `blocks`."""
        self.skipped = self.bytes_read = 0
        for number, raw in enumerate(lines, first):
            self.bytes_read += len(raw)
            try:
                yield self._parse(number, raw)
            except ValueError as error:
                if not self.skip_bad_lines:
                    raise InputError(
                        f"{self.path}:{number}: {error} Correct the line, or pass --skip_bad_lines."
                    ) from None
                self.skipped += 1

    def no_line(self) -> InputError:
        """That no line is an example."""
        what = "no usable line" if self.skipped else "the file is empty"
        return InputError(f"{self.path}: {what}; one example a line is expected, sentence TAB label."
                          if self.labelled else f"{self.path}: {what}; one sentence a line is expected.")

    def _parse(self, number: int, raw: bytes) -> Example:
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"broken UTF-8 at byte {error.start + 1} of the line.") from None
        line = line.removesuffix("\n").removesuffix("\r")
        if "\0" in line:
            raise ValueError("the line holds a NUL character.")
        sentence, *rest = line.split("\t")
        sentence = sentence.strip()
        if len(rest) > self.labelled:
            raise ValueError("more than one TAB; sentence TAB label is expected." if self.labelled
                             else "a TAB; unlabelled input is one sentence a line.")
        if self.labelled and not rest:
            raise ValueError("no TAB; sentence TAB label is expected." if line.strip() else "the line is empty.")
        if not sentence:
            raise ValueError("the sentence is empty.")
        label = rest[0].strip() if rest else ""
        if self.labelled and not label:
            raise ValueError("the label is empty.")
        return Example(number, sentence, self.parse_label(label) if self.labelled else "")


def progress(path: str | os.PathLike[str], lines: Lines) -> Iterator[Example]:
    """The lines of `path`, with a bar that knows the file's size."""
    from tqdm import tqdm

    path = Path(path)
    with tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        for number, example in enumerate(lines):
            if number % 4096 == 0:
                bar.update(lines.bytes_read - bar.n)
            yield example
        bar.update(lines.bytes_read - bar.n)


class HasSentence(Protocol):
    """Something with a sentence, such as an Example."""

    @property
    def sentence(self) -> str: ...


Item = TypeVar("Item", bound=HasSentence)


def chunks(examples: Iterable[Item], sentences: int = 1024, characters: int = 1 << 18) -> Iterator[list[Item]]:
    """Examples by so many, and fewer of long ones at a time."""
    chunk: list[Item] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += len(example.sentence)
        if len(chunk) == sentences or size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ---------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """The label map: names in the order of their ids."""

    names: tuple[str, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Labels:
        """Read label.txt: one name a line, the line's place is the id."""
        with open_input(path) as file:
            try:
                names = file.read().decode("utf-8-sig").removesuffix("\n").split("\n")
            except UnicodeDecodeError:
                raise InputError(f"{path}: broken UTF-8; run preprocess.py again.") from None
        names = [name.removesuffix("\r") for name in names]
        if len(set(names)) != len(names) or not all(names):
            raise InputError(f"{path}: an empty or repeated label; run preprocess.py again.")
        return cls(tuple(names))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write label.txt."""
        with atomic_write(path) as file:
            file.writelines(f"{name}\n" for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def index(self) -> dict[str, int]:
        """Name to id."""
        return {name: number for number, name in enumerate(self.names)}


NO_LABEL = -1  # the target of text without a label


def looks_like_logits(label: str) -> bool:
    """Whether a label is two or more numbers separated by blanks, as a teacher's logits are."""
    try:
        return len([float(part) for part in label.split()]) > 1
    except ValueError:
        return False


class LabelParser:
    """Turns a file's labels into targets: class ids, or a teacher's logits. The first usable label decides.

    Args:
        labels: the label map.
        dummy: what stands in the place of a label in text that has none, unless the label map has it; such text gets
            the target NO_LABEL. None: text without labels is an error.
        columns: asked once, at the first logits, for the column of each label; None: they are in the labels' order.

    Attributes:
        logits: True where the file holds logits, None before the first label.
    """

    def __init__(self, labels: Labels, dummy: str | None = None,
                 columns: Callable[[], list[int] | None] | None = None) -> None:
        self.ids = labels.index()
        self.dummy = None if dummy in self.ids else dummy
        self.columns = columns
        self.order: list[int] | None = None
        self.logits: bool | None = None
        self.labelled: bool | None = None

    def __call__(self, label: str) -> int | list[float]:
        """The target of one label.

        Raises:
            ValueError: an unknown label, logits of the wrong count or not finite, or a mixture of the kinds.
            InputError: from `columns`.
        """
        labelled = label != self.dummy
        if self.labelled not in (None, labelled):
            raise ValueError(f"the label {_short(label)}, and the file's first line has "
                             + ("none." if labelled else "one: this says that there is none."))
        if not labelled:
            self.labelled = self.logits = False
            return NO_LABEL
        target = self._logits(label) if self._is_logits(label) else self._class_id(label)
        self.labelled = True
        return target

    def _is_logits(self, label: str) -> bool:
        return self.logits or (self.logits is None and label not in self.ids and looks_like_logits(label))

    def _class_id(self, label: str) -> int:
        if label not in self.ids:
            raise ValueError(f"unknown label {_short(label)}; train.txt has {_short(', '.join(self.ids))}.")
        self.logits = False
        return self.ids[label]

    def _logits(self, label: str) -> list[float]:
        try:
            numbers = [float(part) for part in label.split()]
        except ValueError:
            raise ValueError(f"the label {_short(label)} is not a row of logits, as the file's first one is.") from None
        if self.columns:
            self.order, self.columns = self.columns(), None
        if len(numbers) != len(self.ids):
            raise ValueError(f"{len(numbers)} logits where label.txt names {len(self.ids)} labels.")
        # Beyond single precision's range a finite number would be stored as infinity.
        if not all(math.isfinite(number) and abs(number) < 3e38 for number in numbers):
            raise ValueError("a logit that is not finite.")
        self.logits = True
        return numbers if self.order is None else [numbers[column] for column in self.order]


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


# ------------------------------------------------------------------------------------------------------ tokenizers


def split_whitespace(sentence: str) -> list[str]:
    """Words as the blanks of the text separate them."""
    return sentence.split()


_PUNCTUATION = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]", re.UNICODE)


def split_punctuation(sentence: str) -> list[str]:
    """Words and punctuation marks, each on its own: "Play jazz!" becomes Play, jazz, !."""
    return _PUNCTUATION.findall(sentence)


WORD_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "whitespace": split_whitespace,
    "punctuation": split_punctuation,
}


def word_tokenizer(name: str = "whitespace", lowercase: bool = True) -> Callable[[str], list[str]]:
    """The function from a sentence to its words that preprocess.py and raw-text inference share.

    Args:
        name: a key of WORD_TOKENIZERS.
        lowercase: fold the sentence to lower case first.
    """
    split = WORD_TOKENIZERS[name]
    return (lambda sentence: split(sentence.lower())) if lowercase else split


MASK = "[MASK]"  # in augmented text, a word that is hidden from the model


class WordTokenizer:
    """From sentences to the ids of their words: what the GloVe models read.

    Args:
        vocabulary: the words, a line each, <pad> and <unk> first.
        facts: `tokenizer`, `lowercase` and `n_ctx`, as preprocess.py recorded them; where `augmented` is true, a
            [MASK] in the text is an unknown word, whatever the tokenizer would make of it.
    """

    unknown = 1

    def __init__(self, vocabulary: str, facts: dict[str, Any]) -> None:
        words = vocabulary.removesuffix("\n").split("\n")
        # A "<pad>" that somebody types is a word like any other, never the special one.
        self.ids = {word: number for number, word in enumerate(words) if number > 1}
        self.split = word_tokenizer(facts["tokenizer"], facts["lowercase"])
        self.n_ctx = facts["n_ctx"]
        self.masks = facts.get("augmented", False)

    def __call__(self, sentence: str) -> list[int]:
        """Word ids, at most n_ctx of them; 1 for an unknown word."""
        return [self.ids.get(word, 1) for word in self.split(sentence)[: self.n_ctx]]

    def encode_batch(self, sentences: list[str]) -> list[tuple[list[int], int]]:
        """The ids of each sentence, and how many it would have without truncation."""
        rows = [self._masked(sentence) if self.masks and MASK in sentence else
                [self.ids.get(word, 1) for word in self.split(sentence)] for sentence in sentences]
        return [(row[: self.n_ctx], len(row)) for row in rows]

    def _masked(self, sentence: str) -> list[int]:
        ids: list[int] = []
        for part in sentence.split(MASK):
            ids += [self.ids.get(word, 1) for word in self.split(part)]
            ids.append(self.unknown)
        return ids[:-1]


class SubwordTokenizer:
    """From sentences to the token ids that a transformer reads, its special tokens among them.

    Text never becomes a special token: a "[SEP]" that somebody types is split like any other word.

    Args:
        vocabulary: the content of a tokenizer.json.
        facts: `n_ctx`, `mask_token`, `truncation_side` (default: right) and `empty_id` (default: 0), which a sentence
            without any token becomes; where `augmented` is true, a [MASK] in the text becomes the mask token.
    """

    def __init__(self, vocabulary: str, facts: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        description = json.loads(vocabulary)
        for token in description["added_tokens"]:
            if facts.get("augmented") and token["content"] == facts["mask_token"]:
                token["special"] = False
        self.tokenizer = Tokenizer.from_str(json.dumps(description))
        self.tokenizer.encode_special_tokens = True
        self.mask = facts["mask_token"] if facts.get("augmented") else None
        self.specials = self.tokenizer.num_special_tokens_to_add(False)
        if facts["n_ctx"] <= self.specials:
            raise InputError(f"n_ctx is {facts['n_ctx']}, and the tokenizer adds {self.specials} special tokens to "
                             "each sentence; raise n_ctx.")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(facts["n_ctx"], direction=facts.get("truncation_side", "right"))
        self.empty = [facts.get("empty_id", 0)]
        model = description["model"]
        unknown = model.get("unk_token") or model.get("unk_id")
        found = self.tokenizer.token_to_id(unknown) if isinstance(unknown, str) else unknown
        self.special_ids = {token["id"] for token in description["added_tokens"] if token["special"]} - {found}
        self.unknown: int = -1 if found is None else found  # byte-level tokenizers know everything

    def __call__(self, sentence: str) -> list[int]:
        """Token ids, at most n_ctx of them, special tokens kept."""
        return self.encode_batch([sentence])[0][0]

    def encode_batch(self, sentences: list[str]) -> list[tuple[list[int], int]]:
        """The ids of each sentence, and how many it would have without truncation."""
        if self.mask:
            sentences = [sentence.replace(MASK, self.mask) for sentence in sentences]
        rows = []
        for encoding in self.tokenizer.encode_batch(sentences):
            ids = encoding.ids
            if sum(token in self.special_ids for token in ids) != self.specials:  # unigram models match "<pad>" in text
                ids = [self.unknown if token in self.special_ids and not own else token
                       for token, own in zip(ids, encoding.special_tokens_mask, strict=True)]
            length = len(ids) + sum(len(part.ids) - self.specials for part in encoding.overflowing)
            # A sentence of control characters may hold no token at all, and a model reads at least one.
            rows.append((ids or self.empty, length))
        return rows


# What the encoded files of each kind are read with, and where the vocabulary stands in the data folder.
TEXT_ENCODERS: dict[str, Callable[[str, dict[str, Any]], WordTokenizer | SubwordTokenizer]] = {
    "ids": WordTokenizer, "fs": SubwordTokenizer}
VOCABULARY_FILES = {"ids": "vocab.txt", "fs": "tokenizer.json"}


def text_encoder(vocabulary: str, facts: dict[str, Any]) -> WordTokenizer | SubwordTokenizer:
    """The one function from text to token ids that preprocess.py and raw-text inference share."""
    return TEXT_ENCODERS[facts["kind"]](vocabulary, facts)
