"""Words and their parts of speech, by one of several analyzers, none of which is imported before it is asked for.

An analyzer takes sentences and returns for each its words and their tags. Tags are the analyzer's own: they are
compared with one another, never interpreted. Each maker raises InputError where its package is missing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from functools import lru_cache

from sentence_classifier.errors import InputError

Analysis = tuple[list[str], list[str]]  # words and tags, as many of each
Analyzer = Callable[[list[str]], list[Analysis]]

SPACY_MODEL = "en_core_web_sm"
# Time grows with the third power of a word's length; what inflects a word stands at its end.
LONGEST_WORD = 30


def default_analyzer() -> str:
    """spacy where it and its English model are installed, else hanta."""
    return "spacy" if all(map(importlib.util.find_spec, ("spacy", SPACY_MODEL))) else "hanta"


def make_spacy() -> Analyzer:
    try:
        import spacy
    except ImportError:
        raise InputError("--analyzer=spacy: spaCy is not installed; pip install spacy, then python -m spacy download "
                         f"{SPACY_MODEL}, or take --analyzer=hanta.") from None
    try:
        model = spacy.load(SPACY_MODEL, disable=["parser", "ner", "lemmatizer"])
    except OSError:
        raise InputError(f"--analyzer=spacy: its English model is not installed; python -m spacy download "
                         f"{SPACY_MODEL}, or take --analyzer=hanta.") from None
    return lambda sentences: [_joined((token.text, token.tag_) for token in document)
                              for document in model.pipe(sentences)]


def make_hanta() -> Analyzer:
    """HanTa (Wartena 2019, "A Probabilistic Morphology Model for German Lemmatization"), whose package has an English
    model. Words are what blanks separate, as in text that was tokenized before."""
    try:
        import HanTa
    except ImportError:
        raise InputError("--analyzer=hanta: HanTa is not installed; pip install HanTa.") from None
    # By its whole path: of a bare name, HanTa would take a file of the current folder first, and it unpickles.
    tagger = HantaTagger(os.path.join(os.path.dirname(HanTa.__file__), "morphmodel_en.pgz"))

    return lambda sentences: [(words, tagger(words)) for words in map(str.split, sentences)]


class HantaTagger:
    """HanTa's model of words and of tags in their order, decoded exactly and fast.

    HanTa's own decoder goes through all tags that may follow two others, for each word; here only through those that
    the word may have, and what a word may be is computed once.

    Args:
        path: the model's file.
    """

    def __init__(self, path: str) -> None:
        from HanTa.HanoverTagger import EMPTY, END, START, UNKNOWN, HanoverTagger

        self.begin, self.end, self.unknown = (EMPTY, START), END, UNKNOWN
        self.model = HanoverTagger(path)
        self.model.analyze_forward = lru_cache(1 << 16)(self.model.analyze_forward)
        self.followers: dict[tuple[int, int], dict[int, float]] = {
            state: dict(following) for state, following in self.model.LP_trans_word.items()}
        self.names: dict[int, str] = self.model.int2tag
        self.candidates = lru_cache(1 << 16)(self._candidates)

    def _candidates(self, word: str, case: bool) -> list[tuple[int, float]]:
        """The tags that a word may have, with log p(word | tag); empty where the model knows nothing of it.

        Args:
            case: whether a capital letter says something, as it does not in a sentence's first word.
        """
        found = self.model._tag_word(word[-LONGEST_WORD:], cutoff=5, casesensitive=case, conditional=True)
        return [(tag, value) for tag, value in found if tag not in (self.unknown, self.end)]

    def __call__(self, words: list[str]) -> list[str]:
        """The most probable tags of a sentence: Viterbi over pairs of tags."""
        best = {self.begin: 0.0}
        back: list[dict[tuple[int, int], tuple[int, int]]] = []
        for place, word in enumerate(words):
            candidates = self.candidates(word, place > 0)
            row: dict[tuple[int, int], float] = {}
            came: dict[tuple[int, int], tuple[int, int]] = {}
            for state, value in best.items():
                following = self.followers.get(state, {})
                for tag, emitted in candidates or [(tag, 0.0) for tag in following if tag != self.end]:
                    if tag in following:
                        total = value + following[tag] + emitted
                        target = (state[1], tag)
                        if target not in row or total > row[target]:
                            row[target] = total
                            came[target] = state
            if not row:  # no sequence that the model has seen: each word by itself
                return [self.names[(self.candidates(word, True) or [(self.unknown, 0.0)])[0][0]] for word in words]
            best = row
            back.append(came)
        ends = {state: value + self.followers.get(state, {}).get(self.end, float("-inf"))
                for state, value in best.items()}
        state = max(ends, key=ends.__getitem__)
        tags = []
        for came in reversed(back):
            tags.append(self.names[state[1]])
            state = came[state]
        return tags[::-1]


def make_kiwi() -> Analyzer:
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise InputError("--analyzer=kiwi: Kiwi is not installed; pip install kiwipiepy.") from None
    model = Kiwi(num_workers=1)
    return lambda sentences: [_joined((token.form, token.tag) for token in row) for row in model.tokenize(sentences)]


def make_khaiii() -> Analyzer:
    try:
        from khaiii import KhaiiiApi
    except ImportError:
        raise InputError("--analyzer=khaiii: khaiii is not installed; build it from https://github.com/kakao/khaiii, "
                         "or pip install kiwipiepy and take --analyzer=kiwi.") from None
    model = KhaiiiApi()
    return lambda sentences: [_joined((part.lex, part.tag) for word in model.analyze(sentence) for part in word.morphs)
                              for sentence in sentences]


def make_npc() -> Analyzer:
    raise InputError("--analyzer=npc: this analyzer was never published; pip install kiwipiepy and take "
                     "--analyzer=kiwi, or build khaiii from https://github.com/kakao/khaiii.")


def _joined(tokens: Iterable[tuple[str, str]]) -> Analysis:
    """Words and tags; a token with a blank in it becomes several words, a blank token none."""
    words: list[str] = []
    tags: list[str] = []
    for token, tag in tokens:
        parts = token.split()
        words += parts
        tags += [tag] * len(parts)
    return words, tags


ANALYZERS: dict[str, Callable[[], Analyzer]] = {
    "spacy": make_spacy, "khaiii": make_khaiii, "npc": make_npc, "hanta": make_hanta, "kiwi": make_kiwi}
ENGLISH = ("spacy", "hanta")
