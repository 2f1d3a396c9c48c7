"""Encode raw text for training: the first stage.

Reads   DATA_DIR/train.txt, valid.txt, test.txt (sentence TAB label), and a file of word vectors (GloVe) or a
        transformer's tokenizer.
Writes  DATA_DIR/label.txt; for GloVe train.txt.ids, valid.txt.ids, test.txt.ids, vocab.txt, embedding.npy; for
        transformers train.txt.fs, valid.txt.fs, test.txt.fs, tokenizer.json.

    python preprocess.py --config=configs/config-glove-cnn.json --data_dir=data/snips
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cli.config import encoded_kind, parse_with_config
from cli.flags import (
    EMBEDDING_PATH,
    Parser,
    add_bert_flag,
    add_config_flag,
    add_data_dir_flag,
    natural_int,
    number,
    positive_int,
)
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.labels import Labels
from sentence_classifier.tokenizers import SUBWORDS, VOCABULARY_FILES, WORDS, Tokenizer, make_tokenizer, word_tokenizer
from text.arrays import ENCODED_FORMAT, ArrayWriter, fingerprint
from text.labels import LabelParser, label_parser, looks_like_logits, read_labels, write_labels
from text.lines import TsvReader, chunks
from text.report import RECORD, DuplicateFinder, SplitReport, record
from text.workers import Workers
from util import EncodingInfo, atomic_write, sha256, sweep

logger = logging.getLogger(__name__)

SPLITS = ("train.txt", "valid.txt", "test.txt")


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    parser = Parser(__doc__, __file__)
    files = parser.add_argument_group("files")
    add_config_flag(files, "configs/config-glove-cnn.json")
    add_data_dir_flag(files)
    files.add_argument("--embedding_path", default=EMBEDDING_PATH,
                       help="word vectors, a word and its numbers a line; none: learn them from the training data "
                            "(default: %(default)s)")
    add_bert_flag(files)
    files.add_argument("--augmented", action="store_true",
                       help="encode --augmented_filename in place of train.txt; label.txt is read, not written")
    files.add_argument("--augmented_filename", default="augmented.raw", help="(default: %(default)s)")
    files.add_argument("--dummy_label", default="dummy",
                       help="what stands in it in the place of labels that it lacks (default: %(default)s)")
    files.add_argument("--logits_order", metavar="FILE",
                       help="a file of the labels, one a line, in the order of the logits in it, where no record of "
                            "evaluate.py --augmented says it")
    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--n_ctx", type=positive_int, help="most words a sentence, over the config's")
    encoding.add_argument("--max_vocab", type=natural_int, default=0,
                          help="at most so many words: those of train.txt by frequency, then the vector file's by "
                               "place (default: 0, all)")
    encoding.add_argument("--oov_scale", type=number(), default=1.0,
                          help="size of the random vectors of words that the file lacks, 1.0 being that of the file's "
                               "vectors; below it, what training hardly reaches hardly matters (default: 1.0)")
    encoding.add_argument("--skip_bad_lines", action="store_true", help="pass over unusable lines and count them")
    encoding.add_argument("--num_workers", type=positive_int, default=1,
                          help="processes; the files are the same whatever their number (default: 1, enough for some "
                               "million lines)")
    encoding.add_argument("--seed", type=natural_int, default=42,
                          help="for the vectors of words that the file lacks (default: %(default)s)")
    args, config = parse_with_config(parser, argv)
    if args.n_ctx:
        config["n_ctx"] = args.n_ctx
    return args, config


# ------------------------------------------------------------------------------------------------ the training text


class TrainingLabels:
    """Collects the labels of train.txt; where the first of them is a teacher's logits, follows label.txt instead.

    Args:
        path: the text, for messages.
        label_path: label.txt.

    Attributes:
        names: the labels as keys, in order of first appearance.
        follow: the parser of logits, None where labels are collected.
    """

    def __init__(self, path: Path, label_path: Path) -> None:
        self.path = path
        self.label_path = label_path
        self.names: dict[str, int] = {}
        self.follow: LabelParser | None = None

    def __call__(self, label: str) -> None:
        """Take in a label. ValueError: it is of another kind than the file's first one."""
        logits = looks_like_logits(label)
        if logits and not self.names and self.follow is None:
            if not self.label_path.exists():
                raise InputError(f"{self.path}: the label {label!r} reads as a teacher's logits, and the label map "
                                 f"that they follow is missing; put the class names into {self.label_path}, one a "
                                 "line.")
            self.follow = label_parser(self.path, read_labels(self.label_path))
        if self.follow is not None:
            self.follow(label)
        elif logits:
            raise ValueError(f"the label {label!r} reads as a teacher's logits, and the file's first one does not.")
        else:
            self.names.setdefault(label, len(self.names))


def count_words(path: Path, tokenizer: tuple[str, bool] | None, skip_bad_lines: bool, label_path: Path,
                workers: Workers) -> tuple[Counter[str], Labels]:
    """Count the words of train.txt and collect its labels in order of first appearance.

    Args:
        tokenizer: see text.word_tokenizer; None counts no words.
        label_path: label.txt, read where train.txt holds a teacher's logits.
    """
    words: Counter[str] = Counter()
    names: dict[str, int] = {}
    parser = TrainingLabels(path, label_path)
    lines = TsvReader(path, skip_bad_lines, parse_label=parser)
    next(iter(lines))  # the first usable line decides what labels are
    for counts, labels in workers.map(partial(count_block, lines, tokenizer), progress(lines)):
        words.update(counts)
        for name in labels:
            names.setdefault(name, len(names))
    if parser.follow is not None:
        return words, read_labels(label_path)
    if len(names) < 2:
        raise InputError(f"{path}: all lines have the one label {next(iter(names))!r}; a classifier needs two.")
    return words, Labels(tuple(names))


def count_block(lines: TsvReader, tokenizer: tuple[str, bool] | None,
                block: tuple[int, bytes]) -> tuple[Counter[str], list[str]]:
    """The words of a part of train.txt, and its labels in order of first appearance."""
    first, raw = block
    words: Counter[str] = Counter()
    split = word_tokenizer(*tokenizer) if tokenizer else None
    for example in lines.parse(io.BytesIO(raw), first):
        if split is not None:
            words.update(split(example.sentence))
    assert isinstance(lines.parse_label, TrainingLabels)
    return words, list(lines.parse_label.names)


def progress(lines: TsvReader) -> Iterator[tuple[int, bytes]]:
    """The blocks of a file, with a bar that knows the file's size."""
    path = Path(lines.path)
    with tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        for block in lines.blocks():
            yield block
            bar.update(len(block[1]))


# -------------------------------------------------------------------------------------------------- the vocabulary


def build_vocabulary(counts: Counter[str], file_words: list[str], lowercase: bool, max_vocab: int,
                     specials: list[str]) -> tuple[list[str], np.ndarray, dict[str, int]]:
    """Order the vocabulary so that the rows that training may change come first.

    The order: <pad>, <unk>, words of train.txt that the vector file lacks, words of train.txt that it has (both by
    frequency), the file's other words in its order.

    Returns:
        The words; for each its row in the file, or -1; and how many words come before each border:
        {"own": those without a row in the file, "seen": those of train.txt}, specials counted in.
    """
    rows: dict[str, int] = {}
    for row, word in enumerate(file_words):
        rows.setdefault(word, row)
    if lowercase:  # a cased file's "Paris" serves for "paris" where the file has no "paris"
        for word, row in list(rows.items()):
            folded = word.lower()
            if folded != word:
                del rows[word]
                rows.setdefault(folded, row)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    if max_vocab:
        ranked = ranked[:max_vocab]
    own = [word for word in ranked if word not in rows]
    covered = [word for word in ranked if word in rows]
    seen = set(covered)
    others = [word for word in sorted(rows, key=rows.__getitem__) if word not in seen and word not in specials]
    if max_vocab:
        others = others[: max_vocab - len(ranked)]
    words = specials + own + covered + others
    file_rows = np.array([-1] * (len(specials) + len(own)) + [rows[word] for word in covered + others])
    return words, file_rows, {"own": len(specials) + len(own), "seen": len(specials) + len(ranked)}


def write_table(path: Path, table: np.ndarray | None, file_rows: np.ndarray, dim: int, oov_scale: float,
                seed: int) -> None:
    """Write embedding.npy: [V, dim] float32, the file's rows and random ones for the words that it lacks.

    Random rows are normal with `oov_scale` times the standard deviation of the file's numbers. <pad> is zero and
    <unk> the mean of the file's rows.
    """
    random = np.random.default_rng(seed)
    scale, mean = 0.1, np.zeros(dim, dtype=np.float32)
    if table is not None and len(table):
        sample = np.asarray(table[: 1 << 15])
        scale, mean = oov_scale * float(sample.std()), sample.mean(0)
    with atomic_write(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (len(file_rows), dim)}
        )
        for start in range(0, len(file_rows), 1 << 14):
            part = file_rows[start : start + (1 << 14)]
            lacking = part < 0
            rows = np.empty((len(part), dim), dtype=np.float32)
            rows[lacking] = random.normal(0.0, scale, (int(lacking.sum()), dim))
            if table is not None:
                rows[~lacking] = table[part[~lacking]]
            if start == 0:
                rows[0], rows[1] = 0.0, mean
            file.write(rows.tobytes())


# ------------------------------------------------------------------------------------------------------- encoding


class Part(NamedTuple):
    """A part of an encoded file.

    Attributes:
        token_ids: [T] int32, of all sentences one after another.
        lengths: [N] int64, how many each sentence has.
        targets: [N] int32 class ids or [N, C] float32 logits.
        records: [N], see corpus.record.
        report: the figures.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    records: np.ndarray
    report: SplitReport


def encode_split(path: Path, target: Path, vocabulary: Path, parser: LabelParser, info: EncodingInfo,
                 skip_bad_lines: bool, repeats: DuplicateFinder, workers: Workers) -> SplitReport:
    """Encode one file to flat arrays; see dataset.py."""
    report = SplitReport(path.name)
    repeats.add_split(path.name)
    lines = TsvReader(path, skip_bad_lines, parse_label=parser)
    next(iter(lines))  # the first usable line decides what labels are
    name, column = target_column(parser)
    end = np.zeros(1, dtype=np.int64)
    with ArrayWriter(target, {"token_ids": ("i4", ()), "offsets": ("i8", ()), name: column}) as writer:
        writer.append("offsets", end)
        for part in workers.map(partial(encode_block, lines, vocabulary, info), progress(lines)):
            writer.append("token_ids", part.token_ids)
            writer.append("offsets", end + np.cumsum(part.lengths))
            writer.append(name, part.targets)
            end += part.lengths.sum()
            repeats.add(part.records)
            report.add(part.report)
        writer.metadata["format"] = ENCODED_FORMAT
        made = replace(info, augmented=False, source_sha256=sha256(path), skip_bad_lines=skip_bad_lines,
                       sentences=report.sentences, skipped=report.skipped)
        writer.metadata["encoding"] = json.dumps(made.to_json())
    return report


def target_column(parser: LabelParser) -> tuple[str, tuple[str, tuple[int, ...]]]:
    """The name, dtype and shape of a target: logits or class ids."""
    return ("logits", ("f4", (len(parser.ids),))) if parser.logits else ("labels", ("i4", ()))


def encode_block(lines: TsvReader, vocabulary: Path, info: EncodingInfo, block: tuple[int, bytes]) -> Part:
    """Encode a part of a file."""
    first, raw = block
    parser = lines.parse_label
    assert isinstance(parser, LabelParser)
    tokenizer = load_tokenizer(vocabulary, info)
    report = SplitReport(str(lines.path))
    tokens, lengths, targets, records = array("i"), array("q"), [], []
    for examples in chunks(lines.parse(io.BytesIO(raw), first)):
        rows = tokenizer.tokenize_batch([example.sentence for example in examples])
        for example, (row, length) in zip(examples, rows, strict=True):
            report.lengths[length] += 1
            report.unknown_words += row.count(tokenizer.unknown)
            report.truncated += length > len(row)
            tokens.extend(row)
            lengths.append(len(row))
            targets.append(example.label)
            label = -1 if parser.logits else example.label
            if label >= 0:
                report.labels[label] += 1
            records.append(record(example.sentence, example.line, label))
    report.skipped = lines.skipped
    _, (dtype, shape) = target_column(parser)
    return Part(np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int64),
                np.array(targets, dtype=dtype).reshape(-1, *shape), np.array(records, dtype=RECORD), report)


@functools.lru_cache(maxsize=1)
def load_tokenizer(vocabulary: Path, info: EncodingInfo) -> Tokenizer:
    """The tokenizer by a file of this run's; each process reads it once."""
    return make_tokenizer(vocabulary.read_bytes().decode("utf-8"), info)


# ------------------------------------------------------------------------------------------------------------ main


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)
    logging.basicConfig(level=logging.INFO)
    folder = Path(args.data_dir)
    if Path(args.augmented_filename).name != args.augmented_filename:
        raise InputError(f"--augmented_filename={args.augmented_filename}: a file's name in --data_dir is expected.")
    names = [args.augmented_filename if args.augmented else SPLITS[0], *SPLITS[1:]]
    for name in dict.fromkeys([SPLITS[0], *names]):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; a data folder holds {', '.join(names)}.")
    label_path = folder / "label.txt"
    if args.augmented and not label_path.exists():
        raise InputError(f"{label_path}: no such file; run preprocess.py without --augmented first.")
    words = encoded_kind(config) == WORDS
    tokenizer = (config["tokenizer"], config["lowercase"]) if words else None
    with Workers(args.num_workers) as workers:
        encode(args, config, folder, names, tokenizer, label_path, workers)


def encode(args: argparse.Namespace, config: dict[str, Any], folder: Path, names: list[str],
           tokenizer: tuple[str, bool] | None, label_path: Path, workers: Workers) -> None:
    """Count, make the vocabulary, encode, report."""
    counts, labels = count_words(folder / SPLITS[0], tokenizer, args.skip_bad_lines, label_path, workers)
    if args.augmented and labels != read_labels(label_path):
        raise InputError(f"{label_path}: not the labels of {folder / SPLITS[0]}; run preprocess.py without "
                         "--augmented first.")

    # Everything is made in a folder beside its place and moved there at the end: a bad line loses nothing.
    sweep(folder, ".preprocess-*")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".preprocess-", ignore_cleanup_errors=True) as made:
        stage = Path(made)
        vocabulary, found = make_vocabulary(args, config, counts, stage) if tokenizer else read_tokenizer(args, config)
        info = EncodingInfo(**found, n_ctx=config["n_ctx"], labels=labels.names,
                            vocab_sha256=hashlib.sha256(vocabulary.encode()).hexdigest())
        vocabulary_path = stage / VOCABULARY_FILES[info.kind]
        with atomic_write(vocabulary_path) as file:
            file.write(vocabulary)
        if not args.augmented:
            write_labels(labels, stage / "label.txt")
        repeats = DuplicateFinder(stage)
        reports = []
        for name in names:
            parser, own = label_parser(folder / name, labels), info
            if args.augmented and name == args.augmented_filename:
                parser = label_parser(folder / name, labels, args.dummy_label, args.logits_order, required=True)
                own = replace(info, augmented=True, dummy_label=args.dummy_label)
            reports.append(encode_split(
                folder / name, stage / f"{name}.{info.kind}", vocabulary_path, parser, own, args.skip_bad_lines,
                repeats, workers))
        for report in reports:
            for line in report.lines(labels.names, config["n_ctx"]):
                logger.info(line)
        for line in repeats.report():
            logger.info(line)
        made_files = sorted(os.listdir(stage))
        for name in made_files:
            os.replace(stage / name, folder / name)
    logger.info("[wrote to %s] %s", folder, ", ".join(made_files))


def make_vocabulary(args: argparse.Namespace, config: dict[str, Any], counts: Counter[str],
                    stage: Path) -> tuple[str, dict[str, Any]]:
    """For the GloVe path: write embedding.npy into `stage`. Returns its text and what EncodingInfo says of it."""
    vectors = load_vectors(args.embedding_path)
    words, file_rows, borders = build_vocabulary(
        counts, [] if vectors is None else vectors.words, config["lowercase"], args.max_vocab,
        [config["pad_token"], config["unk_token"]])
    dim = config["token_emb_dim"] if vectors is None else vectors.table.shape[1]
    if dim != config["token_emb_dim"]:
        logger.warning("[%s has %d dimensions, not the config's token_emb_dim=%d: the file decides]",
                       args.embedding_path, dim, config["token_emb_dim"])
    report_coverage(counts, words[borders["own"] : borders["seen"]])
    write_table(stage / "embedding.npy", None if vectors is None else vectors.table, file_rows, dim, args.oov_scale,
                args.seed)
    logger.info("[vocabulary] %d words of %d dimensions, %d of them with a trained vector of their own",
                len(words), dim, borders["own"])
    return "".join(f"{word}\n" for word in words), {
        "kind": WORDS, "tokenizer": config["tokenizer"], "lowercase": config["lowercase"],
        "table": fingerprint(np.load(stage / "embedding.npy", mmap_mode="r")), "own_rows": borders["own"],
        "seen_rows": borders["seen"], "embedding_path": args.embedding_path}


def read_tokenizer(args: argparse.Namespace, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """For the transformer path: the tokenizer of --bert_model_name_or_path as text, and EncodingInfo of it."""
    from pretrained import loading as transformer

    path = args.bert_model_name_or_path
    tokenizer = transformer.load_tokenizer(path)
    model_config = transformer.load_config(path)
    positions = getattr(model_config, "max_position_embeddings", None)
    absolute = getattr(model_config, "position_biased_input", True)  # DeBERTa-v2's positions are relative alone
    if positions and absolute and config["n_ctx"] > positions:
        raise InputError(f"n_ctx is {config['n_ctx']}, and {path} has {positions} positions; lower n_ctx in "
                         f"{args.config} or with --n_ctx.")
    logger.info("[tokenizer] %s of %s, %d tokens", type(tokenizer).__name__, path, len(tokenizer))
    return transformer.tokenizer_text(tokenizer), {
        "kind": SUBWORDS, "bert_model_name_or_path": path, "mask_token": tokenizer.mask_token,
        "leading_special": transformer.begins_with_special(tokenizer),
        "truncation_side": tokenizer.truncation_side, "empty_id": tokenizer.eos_token_id or tokenizer.unk_token_id or 0}


def load_vectors(path: str) -> Any:
    """The vector file, or None for --embedding_path none."""
    if path == "none":
        return None
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; fetch GloVe with python etc/download_embeddings.py, name another file "
                         "with --embedding_path, or learn the vectors from the training data: --embedding_path none.")
    from text.vectors import read_vectors

    return read_vectors(path)


def report_coverage(counts: Counter[str], covered: list[str]) -> None:
    """Say how much of the training text has vectors of the file."""
    running = sum(counts.values())
    logger.info("[coverage] %d distinct words, %d (%.1f %%) with a vector of the file; of %d running words %.1f %%",
                len(counts), len(covered), 100 * len(covered) / len(counts), running,
                100 * sum(counts[word] for word in covered) / running)


if __name__ == "__main__":
    main()
