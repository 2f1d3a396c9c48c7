"""Classify the lines of a file or of standard input, one sentence a line; answer with one JSON object a line.

    echo "play some jazz" | python -m sentence_classifier pytorch-model.onnx
    python -m sentence_classifier pytorch-model.onnx --input_path=sentences.txt --batch_size=32 > answers.jsonl
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import islice

from sentence_classifier.classifier import TextClassifier, load
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.lines import Example, SentenceReader

logger = logging.getLogger(__name__)


def answer_lines(classifier: TextClassifier, lines: SentenceReader, batch_size: int = 1, limit: int = 0) -> None:
    """Answer each line, or only the first `limit`, on standard output, in UTF-8, with a JSON object.

    A batch's lines are read before they are answered together.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as JSON is, whatever the locale has
    for batch in _batches(islice(lines, limit or None), batch_size):
        found = classifier.predict([line.sentence for line in batch], batch_size)
        for line, prediction in zip(batch, found, strict=True):
            print(json.dumps({"line": line.line, "sentence": line.sentence, "label": prediction.label,
                              "probability": round(prediction.probability, 6),
                              "probabilities": {name: round(p, 6) for name, p in prediction.probabilities.items()}},
                             ensure_ascii=False))
        sys.stdout.flush()
    if lines.skipped:
        logger.warning("[%s] %d bad lines were skipped", lines.path, lines.skipped)


def _batches(lines: Iterable[Example], size: int) -> Iterator[list[Example]]:
    batch: list[Example] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) == size:
                yield batch
                batch = []
    except InputError:  # a bad line; those before it get their answers
        if batch:
            yield batch
        raise
    if batch:
        yield batch


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Answer the lines of --input_path."""
    parser = argparse.ArgumentParser(prog="sentence-classifier", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="The .onnx file that evaluate.py --convert_onnx wrote.")
    parser.add_argument("--input_path", default="-", help="A file of sentences, one a line (default: -, which is "
                                                          "standard input).")
    parser.add_argument("--batch_size", type=int, default=1, help="So many lines are read before they are answered "
                                                                  "together (default: %(default)s).")
    parser.add_argument("--num_threads", type=int, default=0, help="How many threads compute an answer (default: 0, "
                                                                   "ONNX Runtime's choice).")
    parser.add_argument("--skip_bad_lines", action="store_true", help="Leave out and count lines that are not UTF-8 "
                                                                      "or hold a TAB or NUL character.")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or not 0 <= args.num_threads <= 1024:
        parser.error("--batch_size is at least 1, and --num_threads is from 0 to 1024.")

    logging.basicConfig(level=logging.INFO)
    classifier = load(args.model, args.num_threads)
    answer_lines(classifier, SentenceReader(args.input_path, args.skip_bad_lines), args.batch_size)
