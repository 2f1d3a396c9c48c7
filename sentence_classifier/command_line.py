"""Classify the lines of a file or of standard input, or the rows of a table.

The answer is one JSON object a line, or a copy of the table with answers.

    echo "play some jazz" | python -m sentence_classifier pytorch-model.onnx
    python -m sentence_classifier pytorch-model.onnx --input_path=sentences.txt --batch_size=32 > answers.jsonl
    python -m sentence_classifier pytorch-model.onnx --input_path=reviews.csv --output_path=answers.csv
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import PurePath

from sentence_classifier.answers import DIGITS, predict_table, table_lines
from sentence_classifier.classifier import TextClassifier, load
from sentence_classifier.errors import FlagError, InputError, fail_cleanly
from sentence_classifier.lines import Example, SentenceReader
from sentence_classifier.tables import DELIMITERS, TableFormat, read_table

logger = logging.getLogger(__name__)


def add_answer_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of how a table is answered; see answer_input."""
    group.add_argument("--output_path", metavar="FILE",
                       help="Write the table, each row and column as it is, with answers to this .csv, .tsv, .jsonl or "
                            ".parquet file (default: JSON lines on standard output).")
    group.add_argument("--top_k", type=int, metavar="K",
                       help="Give the K likeliest labels (default: 1 in a table, all in a JSON line).")


def add_table_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of a table's columns and of how it is written, where that is not found out; see given_format."""
    group.add_argument("--text_column", metavar="NAME",
                       help="The column of the sentences, by name, or by number from 1 (default: the one that is "
                            "called text, sentence, utterance, query, comment or the like).")
    group.add_argument("--label_column", metavar="NAME",
                       help="The column of the labels, likewise (default: the one that is called label, intent, "
                            "category, class or the like).")
    group.add_argument("--encoding", help="The text's encoding, such as CP949 (default: UTF-8, or UTF-16 where the "
                                          "file begins as such).")
    group.add_argument("--delimiter", type=delimiter,
                       help=f"Cells are separated by a {', '.join(DELIMITERS)} or another character (default: what "
                            "gives all rows as many cells).")
    group.add_argument("--quotes", choices=("double", "none"),
                       help="Double quotes may stand round cells, or quotes are text (default: what fits the file).")
    group.add_argument("--header", action=argparse.BooleanOptionalAction,
                       help="The first row names the columns (default: what fits the file).")


def delimiter(text: str) -> str:
    """A flag's value that must be a delimiter."""
    found = DELIMITERS.get(text, text.replace("\\t", "\t"))
    if len(found) != 1 or found in '"\r\n':
        raise argparse.ArgumentTypeError(f"{text!r} is neither {', '.join(DELIMITERS)} nor one character")
    return found


def given_format(args: argparse.Namespace) -> TableFormat:
    """What the flags say of how a table is written."""
    return TableFormat(encoding=args.encoding, delimiter=args.delimiter, header=args.header,
                       quoted=None if args.quotes is None else args.quotes == "double")


def answer_input(classifier: TextClassifier, args: argparse.Namespace, limit: int = 0) -> None:
    """Answer --input_path: a table (by its ending, or because a column or an output is named), or lines of sentences.

    `limit`: only the first so many sentences, where the answers are JSON lines.
    """
    path = args.input_path
    if args.top_k is not None and args.top_k < 1:
        raise FlagError("--top_k is at least 1.")
    ending = PurePath(path.removesuffix(".gz")).suffix.lower()
    if args.output_path:
        begin = time.perf_counter()
        found = predict_table(classifier, path, args.output_path, args.text_column, args.label_column, args.top_k or 1,
                              max(args.batch_size, 32), given_format(args))  # answers do not depend on it
        logger.info("[wrote %s] %d rows, %d of them without text and so without an answer, in %.1f s; new columns: %s",
                    args.output_path, found.rows, found.blank, time.perf_counter() - begin, ", ".join(found.added))
        if found.labelled:
            logger.info(f"[Accuracy] : {found.correct / found.labelled:.4f}, {found.correct:5d}/{found.labelled:5d}")
    elif args.text_column or ending in (".csv", ".tsv", ".jsonl", ".parquet"):
        names = [args.text_column] if args.text_column else []
        with read_table(path, given_format(args), names) as table:
            answer_lines(classifier, table_lines(table, args.text_column), args.batch_size, limit, args.top_k)
    else:
        answer_lines(classifier, SentenceReader(path, args.skip_bad_lines), args.batch_size, limit, args.top_k)


def answer_lines(classifier: TextClassifier, lines: Iterable[Example], batch_size: int = 1, limit: int = 0,
                 top_k: int | None = None) -> None:
    """Answer each line, or only the first `limit`, on standard output, in UTF-8, with a JSON object.

    A batch's lines are read before they are answered together. `top_k`: name only so many labels; None: all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as JSON is, whatever the locale has
    for batch in _batches(islice(lines, limit or None), batch_size):
        found = classifier.predict([line.sentence for line in batch], batch_size)
        for line, prediction in zip(batch, found, strict=True):
            named = [(name, round(p, DIGITS)) for name, p in prediction.probabilities.items()]
            if top_k:
                named = sorted(named, key=lambda pair: -pair[1])[:top_k]
            answer = ({"labels": prediction.labels} if classifier.decision.multi_label else
                      {"label": prediction.label, "probability": round(prediction.probability, DIGITS)})
            print(json.dumps({"line": line.line, "sentence": line.sentence, **answer, "probabilities": dict(named)},
                             ensure_ascii=False))
        sys.stdout.flush()


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
    parser.add_argument("--input_path", default="-",
                        help="Sentences, one a line, or a table: CSV, TSV, JSON lines or parquet (default: -, which is "
                             "standard input).")
    parser.add_argument("--batch_size", type=int, default=1, help="So many lines are read before they are answered "
                                                                  "together (default: %(default)s).")
    parser.add_argument("--num_threads", type=int, default=0, help="How many threads compute an answer (default: 0, "
                                                                   "ONNX Runtime's choice).")
    parser.add_argument("--skip_bad_lines", action="store_true", help="Leave out and count lines that are not UTF-8 "
                                                                      "or hold a TAB or NUL character.")
    add_table_flags(parser.add_argument_group("tables"))
    add_answer_flags(parser.add_argument_group("answers to a table"))
    args = parser.parse_args(argv)
    if args.batch_size < 1 or not 0 <= args.num_threads <= 1024:
        parser.error("--batch_size is at least 1, and --num_threads is from 0 to 1024.")

    logging.basicConfig(level=logging.INFO)
    answer_input(load(args.model, args.num_threads), args)
