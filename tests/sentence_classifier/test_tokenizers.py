"""The functions from text to token ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentence_classifier.tokenizers import WORDS, TokenizerInfo, WordTokenizer, word_tokenizer


@pytest.mark.parametrize(("name", "lowercase", "sentence", "expected"), [
    ("whitespace", True, "Play  JAZZ!\u00a0now", ["play", "jazz!", "now"]),
    ("whitespace", False, "Play JAZZ!", ["Play", "JAZZ!"]),
    ("punctuation", True, "Play jazz!", ["play", "jazz", "!"]),
    ("punctuation", True, "it's 3.5 l’été ...", ["it's", "3", ".", "5", "l’été", ".", ".", "."]),
    ("punctuation", False, "東京 _x_ 😀", ["東京", "_x_", "😀"]),
])
def test_word_tokenizers(name: str, lowercase: bool, sentence: str, expected: list[str]) -> None:
    assert word_tokenizer(name, lowercase)(sentence) == expected


@pytest.mark.parametrize("name", ["whitespace", "punctuation"])
@settings(max_examples=300)
@given(sentence=st.text(max_size=20).filter(lambda s: s.strip()))
def test_no_sentence_loses_all_its_words(name: str, sentence: str) -> None:
    found = word_tokenizer(name, True)(sentence)
    assert found and not any(set(word) & set(" \n\t") for word in found)
    assert "".join(found) == "".join(sentence.lower().split())


def test_word_tokenizer_of_a_checkpoint() -> None:
    info = TokenizerInfo(kind=WORDS, tokenizer="whitespace", lowercase=True, n_ctx=4)
    tokenize = WordTokenizer("<pad>\n<unk>\nplay\nnew york\n", info)
    assert tokenize("<pad> PLAY <unk> new play play") == [1, 2, 1, 1]
    assert WordTokenizer("<pad>\n<unk>\nplay\n<pad>\n", info)("<pad>") == [3]  # a word of the training text
