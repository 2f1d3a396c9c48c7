"""Two strings that look the same are the same to every tokenizer."""

from __future__ import annotations

import unicodedata

import pytest
from architectures import byte_level, unigram, wordpiece
from hypothesis import given
from hypothesis import strategies as st

from sentence_classifier.tokenizers import SUBWORDS, WORDS, Tokenizer, TokenizerInfo, make_tokenizer

KOREAN = ["내일 날씨 어때", "음악 재생해 줘", "카페 예약", "café crème à la carte", "Ångström ǰazz"]
LETTERS = "가각나날씨음악éèüñÅǰẖ JjHTtWy\u030c\u0331\u0308 abc"
SENTENCES = st.one_of(st.sampled_from(KOREAN), st.text(LETTERS, max_size=12), st.text(max_size=12))


def words(lowercase: bool, tokenizer: str = "whitespace") -> Tokenizer:
    """A word tokenizer whose vocabulary are the words of KOREAN."""
    known = [word for sentence in KOREAN for word in (sentence.lower() if lowercase else sentence).split()]
    vocabulary = "".join(f"{unicodedata.normalize('NFC', word)}\n" for word in ("<pad>", "<unk>", *sorted({*known})))
    return make_tokenizer(vocabulary, TokenizerInfo(kind=WORDS, n_ctx=20, tokenizer=tokenizer, lowercase=lowercase))


def subwords(make: object) -> Tokenizer:
    """A transformer's tokenizer, trained on KOREAN."""
    made = make(KOREAN)  # type: ignore[operator]
    return make_tokenizer(made.backend_tokenizer.to_str(), TokenizerInfo(kind=SUBWORDS, n_ctx=60))


TOKENIZERS = {"words": words(False), "words, lower case": words(True),
              "punctuation": words(True, "punctuation"), "wordpiece": subwords(wordpiece),
              "byte_level": subwords(byte_level), "unigram": subwords(unigram)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(sentence=SENTENCES.filter(lambda text: text.isprintable()))
def test_each_normal_form_gives_the_same_ids(name: str, sentence: str) -> None:
    tokenizer = TOKENIZERS[name]
    forms = [sentence, *(unicodedata.normalize(form, sentence) for form in ("NFC", "NFD"))]
    found = [tokenizer(form) for form in forms]
    assert found[0] == found[1] == found[2] and tokenizer.tokenize_batch(forms) == [(found[0], len(found[0]))] * 3
    assert found[0]  # every model reads at least one token


def test_korean_in_nfd_has_no_unknown_words() -> None:
    for tokenizer in (TOKENIZERS["words"], TOKENIZERS["words, lower case"]):
        for sentence in KOREAN[:3]:
            assert 1 not in tokenizer(unicodedata.normalize("NFD", sentence))
    assert 1 not in TOKENIZERS["words, lower case"]("J\u030cAZZ")  # whose small letters have a form of fewer characters
