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
import zlib
from array import array
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cli.config import encoded_kind, parse_with_config
from cli.flags import EMBEDDING_PATH, Parser, natural_int, positive_int
from cli.training_flags import FLAGS
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.labels import SEPARATOR, Labels
from sentence_classifier.tokenizers import SUBWORDS, VOCABULARY_FILES, WORDS, Tokenizer, make_tokenizer, word_tokenizer
from text.arrays import ENCODED_FORMAT, ArrayWriter, fingerprint
from text.checks import file_fault, label_warnings, low_coverage, split_warnings, swapped_columns, unspaced_text
from text.labels import (
    NO_LABEL,
    NO_LABELS,
    UNKNOWN_LABEL,
    LabelParser,
    TrainingLabels,
    label_parser,
    read_labels,
    write_labels,
)
from text.lines import TsvReader, chunks
from text.report import DuplicateFinder, SplitReport, hash_sentence
from text.vocabulary import build_vocabulary, write_table
from text.workers import Workers
from util import EncodingInfo, atomic_write, exclusive, sha256, sweep

logger = logging.getLogger(__name__)

SPLITS = ("train.txt", "valid.txt", "test.txt")
LABELS = "label.txt"


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags and the config."""
    parser = Parser(__doc__, __file__)
    files = parser.add_argument_group("files")
    FLAGS["config"].add_to(files)
    FLAGS["data_dir"].add_to(files)
    files.add_argument("--embedding_path", default=EMBEDDING_PATH,
                       help="The file of word vectors has a word and its numbers on each line. With none, training "
                            "learns all vectors from the data (default: %(default)s).")
    FLAGS["bert_model_name_or_path"].add_to(files)
    files.add_argument("--augmented", action="store_true",
                       help="Encode --augmented_filename in place of train.txt. label.txt is then read, not written.")
    files.add_argument("--augmented_filename", default="augmented.raw",
                       help="This file in --data_dir holds the augmented text (default: %(default)s).")
    files.add_argument("--dummy_label", default="dummy",
                       help="This word stands for a missing label in the augmented text (default: %(default)s).")
    files.add_argument("--logits_order", metavar="FILE",
                       help="The file names the labels in the order of the augmented text's logits, one a line. It is "
                            "needed only where evaluate.py --augmented has left no record of that order (default: "
                            "none).")
    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--n_ctx", type=positive_int,
                          help="Longer sentences are cut off after so many tokens (default: the config's n_ctx).")
    encoding.add_argument("--max_vocab", type=natural_int, default=0,
                          help="The vocabulary holds at most so many words: those of train.txt by frequency, then "
                               "those of the vector file in its order; 0 means all (default: %(default)s).")
    FLAGS["oov_scale"].add_to(encoding)
    encoding.add_argument("--skip_bad_lines", action="store_true",
                          help="Pass over unusable lines and count them, in place of ending at the first.")
    encoding.add_argument("--num_workers", type=positive_int, default=1,
                          help="So many processes work, and write the same files whatever their number; one is enough "
                               "for some million lines (default: %(default)s).")
    encoding.add_argument("--multi_label", action="store_true",
                          help="A sentence may have several labels, or none: an empty field (default: the config's "
                               "multi_label).")
    encoding.add_argument("--label_separator", default=SEPARATOR,
                          help="This stands between several labels of a sentence (default: %(default)s).")
    encoding.add_argument("--seed", type=natural_int, default=42,
                          help="The seed decides about the random vectors (default: %(default)s).")
    args, config = parse_with_config(parser, argv)
    if args.n_ctx:
        config["n_ctx"] = args.n_ctx
    if args.multi_label:
        config["multi_label"] = True
    return args, config


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)
    logging.basicConfig(level=logging.INFO)
    folder = Path(args.data_dir)
    names = find_files(folder, args.augmented_filename if args.augmented else None)
    words = encoded_kind(config) == WORDS
    separator = args.label_separator if config.get("multi_label") else None
    sweep(folder, ".preprocess-*")
    # Everything is made in a folder beside its place and moved there at the end: a bad line loses nothing.
    with (exclusive("--data_dir", str(folder)), Workers(args.num_workers) as workers,
          tempfile.TemporaryDirectory(dir=folder, prefix=".preprocess-", ignore_cleanup_errors=True) as made):
        stage = Path(made)
        lines = TsvReader(folder / SPLITS[0], args.skip_bad_lines, empty_labels=separator is not None,
                          parse_label=TrainingLabels(folder / SPLITS[0], folder / LABELS, separator))
        counts, labels = read_training_text(
            lines, (config["tokenizer"], config["lowercase"]) if words else None, workers)
        if not args.augmented:
            write_labels(labels, stage / LABELS)
        elif labels != read_labels(folder / LABELS):
            raise InputError(f"{folder / LABELS}: not the labels of {lines.path}; run preprocess.py without "
                             "--augmented first.")

        vocabulary, found = make_vocabulary(args, config, counts, stage) if words else read_tokenizer(args, config)
        info = EncodingInfo(**found, n_ctx=config["n_ctx"], labels=labels.names, multi_label=separator is not None,
                            label_separator=separator,
                            vocab_sha256=hashlib.sha256(vocabulary.encode()).hexdigest())
        with atomic_write(stage / VOCABULARY_FILES[info.kind]) as file:
            file.write(vocabulary)

        duplicates = DuplicateFinder(stage)
        reports = []
        for name in names:
            path, own = folder / name, info
            if name in SPLITS:
                parser = label_parser(path, labels, unknown_allowed=name != SPLITS[0], separator=separator)
            else:
                parser = label_parser(path, labels, args.dummy_label, args.logits_order, required=True,
                                      separator=separator)
                own = replace(info, augmented=True, dummy_label=args.dummy_label)
            lines = TsvReader(path, args.skip_bad_lines, parse_label=parser, empty_labels=separator is not None)
            reports.append(tokenize_split(lines, stage, own, duplicates, workers))

        for line in [*(line for report in reports for line in report.lines(info.labels, info.n_ctx)),
                     *duplicates.report()]:
            logger.info(line)
        for name, report in zip(names, reports, strict=True):
            for warning in split_warnings(folder / name, report, info.labels):
                logger.warning(warning)
        made_files = sorted(os.listdir(stage))
        for name in made_files:
            os.replace(stage / name, folder / name)
    logger.info("[wrote to %s] %s", folder, ", ".join(made_files))


def find_files(folder: Path, augmented: str | None) -> list[str]:
    """The names of the files to encode, of which `augmented` takes train.txt's place.

    Raises:
        InputError: a file that is needed is missing.
    """
    names = [augmented or SPLITS[0], *SPLITS[1:]]
    if augmented and Path(augmented).name != augmented:
        raise InputError(f"--augmented_filename={augmented}: a file's name in --data_dir is expected.")
    for name in dict.fromkeys([SPLITS[0], *names]):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; a data folder holds {', '.join(names)}.")
    if augmented and not (folder / LABELS).exists():
        raise InputError(f"{folder / LABELS}: no such file; run preprocess.py without --augmented first.")
    return names


def read_training_text(lines: TsvReader, tokenizer: tuple[str, bool] | None,
                       workers: Workers) -> tuple[Counter[str], Labels]:
    """Count the words of train.txt, collect its labels, and warn of what is surely not meant.

    Args:
        lines: of train.txt, with a TrainingLabels.
        tokenizer: see word_tokenizer; None counts no words.

    Returns:
        How often each word occurs; the labels in order of first appearance, or those of label.txt where train.txt holds
        a teacher's logits.
    """
    words: Counter[str] = Counter()
    names: dict[str, None] = {}
    sentences = 0
    next(iter(lines))  # the first usable line decides what labels are
    for counts, labels, count in workers.map(partial(count_block, lines, tokenizer), lines.blocks()):
        words.update(counts)
        names.update(dict.fromkeys(labels))
        sentences += count
    if (follow := lines.parse_label.follow) is not None:
        return words, Labels(tuple(follow.ids))
    if len(names) < (2 if lines.parse_label.separator is None else 1):
        raise InputError(f"{lines.path}: " + (file_fault(lines.path) or f"all lines have the one label "
                                              f"{next(iter(names))!r}; a classifier needs two."))
    texts = (example.sentence for example in TsvReader(lines.path, lines.skip_bad_lines,
                                                       empty_labels=lines.empty_labels))
    swapped = swapped_columns(len(names), sentences, texts)
    for warning in filter(None, [swapped] if swapped else [unspaced_text(words, sentences), *label_warnings(names)]):
        logger.warning(warning)
    return words, Labels(tuple(names))


def count_block(lines: TsvReader, tokenizer: tuple[str, bool] | None,
                block: tuple[int, bytes]) -> tuple[Counter[str], list[str], int]:
    """The words of a part of train.txt, its labels in order of first appearance, and the number of sentences."""
    first, raw = block
    words, sentences = Counter[str](), 0
    split = word_tokenizer(*tokenizer) if tokenizer else lambda sentence: []
    for example in lines.parse(io.BytesIO(raw), first):
        words.update(split(example.sentence))
        sentences += 1
    return words, list(lines.parse_label.names), sentences


def make_vocabulary(args: argparse.Namespace, config: dict[str, Any], counts: Counter[str],
                    stage: Path) -> tuple[str, dict[str, Any]]:
    """For the GloVe path: write embedding.npy into `stage`. Returns vocab.txt's text and EncodingInfo's part of it."""
    from text.vectors import read_vectors

    path = args.embedding_path
    if path != "none" and not os.path.exists(path):
        raise InputError(f"{path}: no such file; fetch GloVe with python etc/download_embeddings.py, name another file "
                         "with --embedding_path, or learn the vectors from the training data: --embedding_path none.")
    vectors = None if path == "none" else read_vectors(path)
    words, file_rows, borders = build_vocabulary(
        counts, [] if vectors is None else vectors.words, config["lowercase"], args.max_vocab,
        [config["pad_token"], config["unk_token"]])
    dim = config["token_emb_dim"] if vectors is None else vectors.table.shape[1]
    if dim != config["token_emb_dim"]:
        logger.warning("[%s has %d dimensions, not the config's token_emb_dim=%d: the file decides]",
                       path, dim, config["token_emb_dim"])
    covered = words[borders["own"] : borders["seen"]]
    running = sum(counts.values())
    share = sum(counts[word] for word in covered) / running
    logger.info("[coverage] %d distinct words, %d (%.1f %%) with a vector of the file; of %d running words %.1f %%",
                len(counts), len(covered), 100 * len(covered) / len(counts), running, 100 * share)
    if vectors is not None and (warning := low_coverage(share, path, vectors.words)):
        logger.warning(warning)
    write_table(stage / "embedding.npy", None if vectors is None else vectors.table, file_rows, dim, args.oov_scale,
                args.seed)
    logger.info("[vocabulary] %d words of %d dimensions, %d of them with a trained vector of their own",
                len(words), dim, borders["own"])
    table = np.load(stage / "embedding.npy", mmap_mode="r")
    return "".join(f"{word}\n" for word in words), {
        "kind": WORDS, "tokenizer": config["tokenizer"], "lowercase": config["lowercase"],
        "table": fingerprint(table, borders["own"]), "own_rows": borders["own"], "seen_rows": borders["seen"],
        "embedding_path": path}


def read_tokenizer(args: argparse.Namespace, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """For the transformer path: the tokenizer of --bert_model_name_or_path as text, and EncodingInfo's part of it."""
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


Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, SplitReport]


def tokenize_split(lines: TsvReader, stage: Path, info: EncodingInfo, duplicates: DuplicateFinder,
                   workers: Workers) -> SplitReport:
    """Encode one file to flat arrays in `stage`, where the vocabulary's file stands; see dataset.py.

    Args:
        lines: of the file, with a LabelParser.
    """
    path = Path(lines.path)
    report = SplitReport(path.name)
    duplicates.add_split(path.name)
    first = next(iter(lines))  # the first usable line decides what labels are
    parser: LabelParser = lines.parse_label
    if first.line == 1 and not parser.logits and parser.separator is None and first.label != NO_LABEL:
        report.first_line = first.sentence, "".join(parser.unknown) or info.labels[first.label]
    name, column = target_column(parser)
    end = np.zeros(1, dtype=np.int64)
    with ArrayWriter(stage / f"{path.name}.{info.kind}",
                     {"token_ids": ("i4", ()), "offsets": ("i8", ()), name: column}) as writer:
        writer.append("offsets", end)
        blocks = workers.map(partial(tokenize_block, lines, stage, info), lines.blocks())
        for token_ids, lengths, targets, hashes, numbers, figures in blocks:
            writer.append("token_ids", token_ids)
            writer.append("offsets", end + np.cumsum(lengths))
            writer.append(name, targets)
            end += lengths.sum()
            if targets.ndim == 2:  # label sets that differ have other numbers
                targets = np.array([zlib.crc32(row.tobytes()) >> 1 for row in targets])
            duplicates.add(hashes, numbers, -1 if parser.logits else targets)
            report.add(figures)
        writer.metadata["format"] = ENCODED_FORMAT
        made = replace(info, augmented=False, source_sha256=sha256(path), skip_bad_lines=lines.skip_bad_lines,
                       sentences=report.sentences, skipped=report.skipped)
        writer.metadata["encoding"] = json.dumps(made.to_json())
    return report


def target_column(parser: LabelParser) -> tuple[str, tuple[str, tuple[int, ...]]]:
    """The name, dtype and shape of a target: logits, label sets or class ids."""
    if parser.logits:
        return "logits", ("f4", (len(parser.ids),))
    return ("labels", ("i4", ())) if parser.separator is None else ("label_sets", ("u1", (len(parser.ids) + 1,)))


def tokenize_block(lines: TsvReader, stage: Path, info: EncodingInfo, block: tuple[int, bytes]) -> Part:
    """Encode a part of a file.

    Returns:
        token_ids [T] int32, of all N sentences one after another; lengths [N] int64; targets, [N] int32 class ids,
        [N, C] float32 logits or [N, C + 1] uint8 label sets, see LabelParser; hashes [N] uint64, see hash_sentence; the
        lines' numbers [N] int64; the figures.
    """
    first, raw = block
    parser: LabelParser = lines.parse_label
    tokenizer = load_tokenizer(stage, info)
    report = SplitReport(str(lines.path))
    tokens, lengths, targets, hashes, numbers = array("i"), [], [], [], []
    for examples in chunks(lines.parse(io.BytesIO(raw), first)):
        rows = tokenizer.tokenize_batch([example.sentence for example in examples])
        for (line, sentence, target), (row, length) in zip(examples, rows, strict=True):
            report.lengths[length] += 1
            report.unknown_words += row.count(tokenizer.unknown)
            report.truncated += length > len(row)
            report.quoted += sentence[0] == sentence[-1] == '"' and len(sentence) > 1
            tokens.extend(row)
            lengths.append(len(row))
            targets.append(target)
            hashes.append(hash_sentence(sentence))
            numbers.append(line)
    _, (dtype, shape) = target_column(parser)
    made = np.array(targets, dtype).reshape(-1, *shape)
    report.skipped, report.unknown_names = lines.skipped, list(parser.unknown)
    if made.ndim == 1:
        counts = Counter(targets)
        report.unknown_labels = counts[UNKNOWN_LABEL]
        report.labels = Counter({target: count for target, count in counts.items() if target >= 0})
    elif not parser.logits:
        report.labels = Counter(dict(enumerate(made[:, :-1].sum(0, dtype=np.int64).tolist())))
        report.unknown_labels = int(np.isin(made[:, -1], (0, NO_LABELS), invert=True).sum())
        report.without_label = int((made.sum(1) == 0).sum())
    return (np.array(tokens, np.int32), np.array(lengths, np.int64), made, np.array(hashes, np.uint64),
            np.array(numbers, np.int64), report)


@functools.lru_cache(maxsize=1)
def load_tokenizer(stage: Path, info: EncodingInfo) -> Tokenizer:
    """The tokenizer by the vocabulary's file of this run; each process reads it once."""
    return make_tokenizer((stage / VOCABULARY_FILES[info.kind]).read_bytes().decode("utf-8"), info)


if __name__ == "__main__":
    main()
