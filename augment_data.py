"""Make more text of a data set: sentences with words masked or replaced, for a teacher to label.

Reads   INPUT (sentence TAB label).
Writes  OUTPUT: for each line the sentence as it is, its words separated by single blanks, and up to N_ITER variants
        of it, all with the label DUMMY_LABEL, or with --preserve_label with that of the line. Text is written in
        Unicode's form NFC.

    python augment_data.py --input data/sst2/train.txt --output data/sst2/augmented.raw --lower --parallel

After Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks" (arXiv 1903.12136),
section on data augmentation. A variant masks each word with the probability P_MASK, or else replaces it with the
probability P_POS by a word of the same part of speech, drawn from INPUT by frequency; and with the probability P_NG it
masks 1 to MAX_NG words in a row. Here, at most half of a sentence's words change.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from cli.flags import Parser, natural_int, number, positive_int
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.lines import Example
from sentence_classifier.tokenizers import MASK, normalize
from text.checks import not_english
from text.labels import find_logits_info, write_logits_info
from text.lines import TsvReader, chunks, progress
from text.tagging import ANALYZERS, ENGLISH, default_analyzer
from text.workers import Workers
from util import atomic_write, cores, sha256

logger = logging.getLogger(__name__)

SENTENCES = 256  # that a worker gets at a time


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input", required=True, help="This file holds a sentence TAB its label on each line.")
    files.add_argument("--output", required=True,
                       help="The augmented text is written to this file, such as data/sst2/augmented.raw.")
    files.add_argument("--preserve_label", action="store_true",
                       help="Give each line the label, or the logits, of the sentence that it comes from.")
    files.add_argument("--dummy_label", default="dummy",
                       help="Without --preserve_label all lines get this label (default: %(default)s).")
    files.add_argument("--skip_bad_lines", action="store_true",
                       help="Pass over unusable lines and count them, in place of ending at the first.")
    words = parser.add_argument_group("words")
    words.add_argument("--analyzer", choices=tuple(ANALYZERS), metavar="{spacy,hanta,kiwi,khaiii}",
                       help="The analyzer finds words and their parts of speech: spacy or hanta in English (hanta's "
                            "words are what blanks separate), kiwi or khaiii in Korean (default: spacy where it and "
                            "its English model are installed, else hanta).")
    words.add_argument("--no_analyzer", action="store_true",
                       help="Take what blanks separate for words, and replace none by another.")
    words.add_argument("--lower", action="store_true", help="Write the text in lower case.")
    variants = parser.add_argument_group("variants")
    variants.add_argument("--n_iter", type=natural_int, default=20,
                          help="Make at most so many variants of a sentence (default: %(default)s).")
    variants.add_argument("--p_mask", type=number(0, 1), default=0.1,
                          help="Mask each word with this probability (default: %(default)s).")
    variants.add_argument("--p_pos", type=number(0, 1), default=0.1,
                          help="Replace each word with this probability by another of its part of speech (default: "
                               "%(default)s).")
    variants.add_argument("--p_ng", type=number(0, 1), default=0.25,
                          help="Mask several words in a row with this probability (default: %(default)s).")
    variants.add_argument("--max_ng", type=positive_int, default=5,
                          help="Mask at most so many words in a row (default: %(default)s).")
    variants.add_argument("--mask_token", default=MASK,
                          help="A masked word becomes this one; preprocess.py --augmented knows [MASK] alone "
                               "(default: %(default)s).")
    variants.add_argument("--no_augment", action="store_true",
                          help="Make no variants: only split the sentences into words.")
    variants.add_argument("--seed", type=natural_int, default=42,
                          help="The seed decides about the variants (default: %(default)s).")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--parallel", action="store_true",
                         help="Work in several processes. The output is the same.")
    machine.add_argument("--num_workers", type=positive_int,
                         help="Start so many processes with --parallel (default: one for each core).")
    args = parser.parse_args(argv)
    if args.p_mask + args.p_pos > 1:
        parser.error("--p_mask and --p_pos: a word is masked or replaced or neither, so their sum is at most 1")
    if args.num_workers and not args.parallel:
        parser.error("--num_workers goes with --parallel")
    if args.analyzer and args.no_analyzer:
        parser.error("--analyzer and --no_analyzer: choose one of them")
    if len(args.mask_token.split()) != 1 or args.mask_token != args.mask_token.strip():
        parser.error(f"--mask_token {args.mask_token!r}: one word without blanks is expected")
    if not args.dummy_label.strip() or any(character in args.dummy_label for character in "\t\r\n\0"):
        parser.error(f"--dummy_label {args.dummy_label!r}: a label is not empty and holds no TAB and no line end")
    return args


class Tagged(NamedTuple):
    """A sentence whose words are known: a line of the temporary file between the two passes."""

    line: int  # of the input
    sentence: str  # words separated by single blanks
    tags: str  # likewise; empty without an analyzer
    label: str


class Tagger:
    """Finds the words of sentences and their tags, and counts which word has which tag how often.

    Args:
        analyzer: a key of tagging.ANALYZERS, or None: what blanks separate.
        lower: fold the words to lower case, after their tags are found.
        label: of all sentences; None keeps their own.
    """

    def __init__(self, analyzer: str | None, lower: bool, label: str | None) -> None:
        self.analyze = ANALYZERS[analyzer]() if analyzer else None
        self.lower = lower
        self.label = label

    def __call__(self, examples: list[Example]) -> tuple[list[Tagged], Counter[tuple[str, str]]]:
        """The sentences tagged, and the counts of (tag, word)."""
        sentences = [normalize(example.sentence) for example in examples]
        analyses = self.analyze(sentences) if self.analyze else [(sentence.split(), []) for sentence in sentences]
        rows: list[Tagged] = []
        counts: Counter[tuple[str, str]] = Counter()
        for example, (words, tags) in zip(examples, analyses, strict=True):
            if self.lower:
                words = [word.lower() for word in words]
            counts.update(zip(tags, words, strict=False))
            rows.append(Tagged(example.line, " ".join(words), " ".join(tags), self.label or example.label))
        return rows, counts


# Of each tag, its words, and how often these and all before them occur.
Lexicon = dict[str, tuple[list[str], list[int]]]


def make_lexicon(counts: Counter[tuple[str, str]]) -> Lexicon:
    """The words of each tag, by the counts of (tag, word)."""
    words: dict[str, list[str]] = {}
    for tag, word in sorted(counts):
        words.setdefault(tag, []).append(word)
    return {tag: (row, list(accumulate(counts[tag, word] for word in row))) for tag, row in words.items()}


@dataclass(frozen=True)
class Augmenter:
    """Makes variants of sentences. Those of a sentence depend on the seed and on its line's number alone."""

    lexicon: Lexicon
    p_mask: float
    p_pos: float
    p_ng: float
    max_ng: int
    n_iter: int
    mask_token: str
    seed: int

    def variants(self, words: list[str], tags: list[str], line: int) -> list[str]:
        """The sentence itself and up to n_iter different variants of it, in each of which at most half of the words
        have changed, rounded down. `tags` are as many as the words, or none; `line` is the sentence's number."""
        sentence = " ".join(words)
        made = {sentence: None}  # a set that keeps the order
        # Only random() is promised to draw alike in all versions of Python.
        draw = random.Random(self.seed << 64 | line).random
        most = len(words) // 2
        for _ in range(self.n_iter if most else 0):
            changes = self._single_words(words, tags, draw)
            free, gram = most, range(0)
            if draw() < self.p_ng:
                length = min(1 + int(draw() * self.max_ng), most)
                start = int(draw() * (len(words) - length + 1))
                free, gram = most - length, range(start, start + length)
                for place in gram:
                    changes.pop(place, None)
            while len(changes) > free:  # any of them, lest a sentence's end stay as it is
                del changes[list(changes)[int(draw() * len(changes))]]
            changes.update(dict.fromkeys(gram, self.mask_token))
            if changes:
                made.setdefault(" ".join([changes.get(place, word) for place, word in enumerate(words)]))
        return list(made)

    def _single_words(self, words: list[str], tags: list[str], draw: Callable[[], float]) -> dict[int, str]:
        """Place to new word, of the words that are masked or replaced one by one."""
        changes = {}
        p_mask, p_any = self.p_mask, self.p_mask + self.p_pos
        for place, word in enumerate(words):
            x = draw()
            if x < p_mask:
                changes[place] = self.mask_token
            elif x < p_any and tags:
                same, steps = self.lexicon[tags[place]]
                new = same[bisect_right(steps, int(draw() * steps[-1]))]
                if new != word:
                    changes[place] = new
        return changes

    def __call__(self, rows: list[Tagged]) -> tuple[str, int, int]:
        """The lines of the output for some sentences; how many lines, and how many sentences."""
        lines = [f"{variant}\t{row.label}\n" for row in rows
                 for variant in self.variants(row.sentence.split(" "), row.tags.split(), row.line)]
        return "".join(lines), len(lines), len(rows)


def tag_all(args: argparse.Namespace, analyzer: str | None, workers: int, file: IO[str]) -> tuple[int, Lexicon]:
    """The first pass: write the sentences, tagged, to `file`. Returns how many they are, and the words of each tag."""
    label = None if args.preserve_label else args.dummy_label
    if analyzer and workers > 1:
        ANALYZERS[analyzer]()  # what is missing is said once, and here
    if analyzer in ENGLISH:
        head = (example.sentence for example in TsvReader(args.input, args.skip_bad_lines))
        if warning := not_english(islice(head, SENTENCES), analyzer):
            logger.warning("[%s] %s", args.input, warning)
    lines = TsvReader(args.input, args.skip_bad_lines)
    counts: Counter[tuple[str, str]] = Counter()
    sentences = 0
    with Workers(workers, partial(Tagger, analyzer, args.lower, label)) as pool:
        for rows, some in pool.map(pool.made, chunks(progress(lines), SENTENCES)):
            for row in rows:
                if not row.sentence:
                    raise InputError(f"{args.input}:{row.line}: --analyzer={analyzer} finds no word in the sentence; "
                                     "correct the line, or pass --no_analyzer.")
                file.write("\t".join(map(str, row)) + "\n")
            counts.update(some)
            sentences += len(rows)
    if lines.skipped:
        logger.warning("[%s] %d bad lines were skipped", args.input, lines.skipped)
    return sentences, make_lexicon(counts)


def augment(args: argparse.Namespace) -> dict[str, Any]:
    """Make OUTPUT. Returns the figures: sentences, lines, and the seconds of both passes."""
    analyzer = None if args.no_analyzer else args.analyzer or default_analyzer()
    if analyzer and not args.analyzer:
        logger.info("[analyzer] %s%s", analyzer, "" if analyzer == "spacy" else
                    ", since spaCy and its English model are not both installed")
    workers = (args.num_workers or cores()) if args.parallel else 1
    n_iter = 0 if args.no_augment else args.n_iter
    with (atomic_write(args.output) as target,
          tempfile.TemporaryFile("w+", dir=Path(args.output).parent, encoding="utf-8", newline="\n") as between):
        start = time.perf_counter()
        sentences, lexicon = tag_all(args, analyzer, workers, between)
        middle = time.perf_counter()
        make = partial(Augmenter, lexicon, args.p_mask, args.p_pos, args.p_ng, args.max_ng, n_iter, args.mask_token,
                       args.seed)
        # Fewer sentences at a time where each becomes many lines.
        between.seek(0)
        rows = (row.removesuffix("\n").split("\t") for row in between)
        tagged = (Tagged(int(line), *rest) for line, *rest in rows)
        pieces = chunks(tagged, max(1, min(SENTENCES, 8192 // (n_iter + 1))), 1 << 20)
        lines = 0
        with (Workers(workers, make) as pool,
              tqdm(total=sentences, unit="sentence", desc=Path(args.output).name, disable=None) as bar):
            for text, count, done in pool.map(pool.made, pieces):
                target.write(text)
                lines += count
                bar.update(done)
    return {"analyzer": analyzer, "workers": workers, "sentences": sentences, "lines": lines,
            "tagging_seconds": middle - start, "augmenting_seconds": time.perf_counter() - middle}


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args = get_params(argv)
    logging.basicConfig(level=logging.INFO)
    if os.path.exists(args.output) and os.path.exists(args.input) and os.path.samefile(args.input, args.output):
        raise InputError(f"{args.output}: is the input; choose another --output.")
    figures = augment(args)
    info = find_logits_info(args.input) if args.preserve_label else None
    if info:  # the labels are logits: they keep their order
        write_logits_info(args.output, info["labels"], teacher=info.get("teacher"),
                          source={"file": Path(args.input).name, "sha256": sha256(args.input)})
    for what, count in (("tagging", figures["sentences"]), ("augmenting", figures["lines"])):
        seconds = figures[f"{what}_seconds"]
        logger.info("[%s] %d sentences in %.1f s, %.0f a second", what, count, seconds, count / seconds)
    logger.info("[wrote to %s] %d lines of %d sentences", args.output, figures["lines"], figures["sentences"])


if __name__ == "__main__":
    main()
