"""Write the sample data set: requests to a spoken assistant, each with its intent.

Reads sample_templates.json, beside this script. Writes train.txt, valid.txt and test.txt (sentence TAB intent; lower
case and without punctuation, as a speech recogniser would hand them on). The same seed gives the same bytes on every
machine.

    python etc/make_sample_data.py

The templates hold slots such as {city}, and a slot's values may hold slots themselves. The valid and test splits have
templates and values of their own, which train lacks. Many requests quote another intent ("remind me to play the tape
for mark"), so that the words of a sentence alone do not give its intent away.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

from root import ROOT

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly
from util import atomic_write

# Templates by intent and values by slot: those under "train" serve every split, the others theirs alone.
TEMPLATES: dict[str, dict[str, dict[str, list[str]]]] = json.loads(
    (ROOT / "etc" / "sample_templates.json").read_text(encoding="utf-8"))
SLOTS, INTENTS = TEMPLATES["slots"], TEMPLATES["intents"]
# The intents whose imperatives, which start with {do}, can stand inside other sentences: "text mark to {request}".
QUOTED = ["play_music", "book_table", "make_call", "control_home", "get_directions"]

SPLITS = {"train": 3000, "valid": 400, "test": 400}
# How often a split takes a template, or a slot value, of its own in place of one that train has too.
OWN_TEMPLATE = {"train": 0.0, "valid": 0.2, "test": 0.25}
OWN_VALUE = {"train": 0.0, "valid": 0.2, "test": 0.3}
LEAD_SHARE, TAIL_SHARE = 0.15, 0.2  # of the sentences that begin with "hey" and the like, or end with "please"

SLOT = re.compile(r"\{(\w+)\}")
ARTICLE = re.compile(r"\ba(?= [aeiou])")  # "a", where a slot's value asks for "an"


class Writer:
    """Draws the sentences of all splits, none of them twice."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: set[str] = set()

    def choose(self, options: list[str]) -> str:
        """One of `options`. Only random() itself is promised to give the same numbers in every Python version."""
        return options[int(self.random.random() * len(options))]

    def draw(self, pool: dict[str, list[str]], split: str, own_share: float) -> str:
        """A template or value, with the chance `own_share` one that train lacks."""
        own = split != "train" and split in pool and self.random.random() < own_share
        return self.choose(pool[split if own else "train"])

    def value(self, slot: str, split: str) -> str:
        """A slot value that may hold slots itself."""
        return self.request(split) if slot == "request" else self.draw(SLOTS[slot], split, OWN_VALUE[split])

    def request(self, split: str) -> str:
        """A bare request of one of the intents that quote no other."""
        while True:
            template = self.draw(INTENTS[self.choose(QUOTED)], split, OWN_TEMPLATE[split])
            if template.startswith("{do}"):
                return template.removeprefix("{do} ")

    def sentence(self, intent: str, split: str) -> str:
        """One sentence that no split has yet."""
        for _ in range(1000):
            sentence = self.draw(INTENTS[intent], split, OWN_TEMPLATE[split])
            if sentence.startswith("{do}") and self.random.random() < TAIL_SHARE:
                sentence += " {tail}"
            if self.random.random() < LEAD_SHARE:
                sentence = "{lead} " + sentence
            while SLOT.search(sentence):
                sentence = SLOT.sub(lambda match: self.value(match[1], split), sentence)
            sentence = ARTICLE.sub("an", " ".join(sentence.split()))
            if sentence not in self.seen:
                self.seen.add(sentence)
                return sentence
        raise InputError(f"sample_templates.json: {intent} has too few templates for {split}.txt; write some more.")

    def lines(self, split: str) -> list[str]:
        """All lines of a split in random order: every intent equally often, and none_of_these takes the rest."""
        share = int(SPLITS[split] / (len(INTENTS) + 0.25))
        intents = [intent for intent in INTENTS for _ in range(share)]
        intents += ["none_of_these"] * (SPLITS[split] - len(intents))
        lines = [f"{self.sentence(intent, split)}\t{intent}\n" for intent in intents]
        return sorted(lines, key=lambda _: self.random.random())


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "data" / "sample",
                        help="The folder of train.txt, valid.txt and test.txt (default: data/sample of this project).")
    parser.add_argument("--seed", type=int, default=42,
                        help="Another seed gives other sentences (default: %(default)s).")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Write the three splits."""
    args = get_params(argv)
    writer = Writer(args.seed)
    for split, lines in {split: writer.lines(split) for split in SPLITS}.items():
        path = args.output_dir / f"{split}.txt"
        with atomic_write(path) as file:
            file.writelines(lines)
        print(f"{path}: {len(lines)} sentences", file=sys.stderr)


if __name__ == "__main__":
    main()
