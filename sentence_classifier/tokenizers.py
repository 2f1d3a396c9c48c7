"""From sentences to token ids: words of a vocabulary, or a transformer's subwords.

Training and service tokenize by the same functions here, so that a served model reads what it was trained on.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from sentence_classifier.errors import InputError


def normalize(text: str) -> str:
    """Text in Unicode's normal form NFC, in which strings that look the same are the same."""
    return unicodedata.normalize("NFC", text)


# From a sentence to its words: as blanks separate them, or with punctuation marks on their own (Play, jazz, !).
WORD_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "whitespace": str.split,
    "punctuation": re.compile(r"\w+(?:['’]\w+)*|[^\w\s]").findall,
}


def word_tokenizer(name: str = "whitespace", lowercase: bool = True) -> Callable[[str], list[str]]:
    """The function from a sentence, folded to lower case first or not, to its words, by a key of WORD_TOKENIZERS."""
    split = WORD_TOKENIZERS[name]
    if lowercase:  # which may leave the normal form: the small letter of J with a caron is one character, J's is two
        return lambda sentence: split(normalize(normalize(sentence).lower()))
    return lambda sentence: split(normalize(sentence))


MASK = "[MASK]"  # in augmented text, a word that is hidden from the model

# What the encoded files of a model are read with; also these files' ending.
WORDS, SUBWORDS = "ids", "fs"
VOCABULARY_FILES = {WORDS: "vocab.txt", SUBWORDS: "tokenizer.json"}  # in the data folder


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """How text becomes token ids, beside the vocabulary: what a checkpoint and a .onnx file say of it.

    Attributes:
        kind: WORDS or SUBWORDS.
        n_ctx: most tokens of a sentence; what is beyond is cut off.
        tokenizer, lowercase: of words; see word_tokenizer.
        mask_token: of subwords; what a [MASK] in augmented text becomes.
        truncation_side: of subwords; the end at which a sentence is cut off.
        empty_id: of subwords; what a sentence without any token becomes.
        augmented: whether a [MASK] in the text is a mask; typed text has none.
    """

    kind: str
    n_ctx: int
    tokenizer: str | None = None
    lowercase: bool | None = None
    mask_token: str | None = None
    truncation_side: str = "right"
    empty_id: int = 0
    augmented: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """From what to_json returned, or from more than that.

        Raises:
            TypeError: something is missing.
        """
        known = {field.name for field in fields(cls)}
        held: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                for key, value in found.items() if key in known}
        return cls(**held)


class WordTokenizer:
    """From sentences to the ids of their words: what the GloVe models read.

    A sentence without words becomes one unknown word: every model reads at least one.

    Args:
        vocabulary: the words, a line each, <pad> and <unk> first.
        info: in augmented text a [MASK] is an unknown word, whatever the tokenizer would make of it.
    """

    unknown = 1

    def __init__(self, vocabulary: str, info: TokenizerInfo) -> None:
        words = vocabulary.removesuffix("\n").split("\n")
        # A "<pad>" that somebody types is a word like any other, never the special one.
        self.ids = {word: number for number, word in enumerate(words) if number > 1}
        self.split = word_tokenizer(info.tokenizer or "whitespace", bool(info.lowercase))
        self.n_ctx = info.n_ctx
        self.masks = info.augmented

    def __call__(self, sentence: str) -> list[int]:
        """Word ids, at most n_ctx of them; 1 for an unknown word."""
        return [self.ids.get(word, 1) for word in self.split(sentence)[: self.n_ctx]] or [self.unknown]

    def tokenize_batch(self, sentences: list[str]) -> list[tuple[list[int], int]]:
        """The ids of each sentence, and how many it would have without truncation."""
        rows = [self._words(sentence) or [self.unknown] for sentence in sentences]
        return [(row[: self.n_ctx], len(row)) for row in rows]

    def _words(self, sentence: str) -> list[int]:
        ids: list[int] = []
        for part in sentence.split(MASK) if self.masks else [sentence]:
            ids += [*(self.ids.get(word, 1) for word in self.split(part)), self.unknown]
        return ids[:-1]


class SubwordTokenizer:
    """From sentences to the token ids that a transformer reads, its special tokens among them.

    Text never becomes a special token: a "[SEP]" that somebody types is split like any other word.

    Args:
        vocabulary: the content of a tokenizer.json.
        info: in augmented text a [MASK] becomes the mask token.

    Raises:
        InputError: n_ctx leaves no room beside the special tokens.
    """

    def __init__(self, vocabulary: str, info: TokenizerInfo) -> None:
        from tokenizers import Tokenizer

        description = json.loads(vocabulary)
        for token in description["added_tokens"]:
            if info.augmented and token["content"] == info.mask_token:
                token["special"] = False
        self.tokenizer = Tokenizer.from_str(json.dumps(description))
        self.tokenizer.encode_special_tokens = True
        self.mask = info.mask_token if info.augmented else None
        self.specials = self.tokenizer.num_special_tokens_to_add(False)
        if info.n_ctx <= self.specials:
            raise InputError(f"n_ctx is {info.n_ctx}, and the tokenizer adds {self.specials} special tokens to "
                             "each sentence; raise n_ctx.")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(info.n_ctx, direction=info.truncation_side)
        self.empty = [info.empty_id]
        model = description["model"]
        unknown = model.get("unk_token") or model.get("unk_id")
        found = self.tokenizer.token_to_id(unknown) if isinstance(unknown, str) else unknown
        self.special_ids = {token["id"] for token in description["added_tokens"] if token["special"]} - {found}
        self.unknown: int = -1 if found is None else found  # byte-level tokenizers know everything

    def __call__(self, sentence: str) -> list[int]:
        """Token ids, at most n_ctx of them, special tokens kept."""
        return self.tokenize_batch([sentence])[0][0]

    def tokenize_batch(self, sentences: list[str]) -> list[tuple[list[int], int]]:
        """The ids of each sentence, and how many it would have without truncation."""
        sentences = [normalize(sentence) for sentence in sentences]
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


Tokenizer = WordTokenizer | SubwordTokenizer


def make_tokenizer(vocabulary: str, info: TokenizerInfo) -> Tokenizer:
    """The one function from text to token ids that training and every way of inference share."""
    return (WordTokenizer if info.kind == WORDS else SubwordTokenizer)(vocabulary, info)
