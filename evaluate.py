"""Measure a trained classifier, classify new text with it, or export it to ONNX: the third stage.

Reads   MODEL_PATH (with --enable_ort ONNX_PATH) and DATA_DIR/test.txt with its encoding test.txt.ids or test.txt.fs;
        or raw text.
Writes  DATA_DIR/test.txt.pred (or test.txt.inference): sentence TAB label TAB prediction,
        and beside the model's file its .test.json (results) and .confusion.png.
        --convert_onnx writes ONNX_PATH, with --quantize_onnx also QUANTIZED_ONNX_PATH, and no results.
        --augmented labels DATA_DIR/augmented.raw: it writes augmented.raw.pred, sentence TAB logits, and no results.

    python evaluate.py --config=configs/config-glove-cnn.json --data_dir=data/snips
    echo "play some jazz" | python evaluate.py --input_path=-
    python evaluate.py --convert_onnx --quantize_onnx && python evaluate.py --enable_ort --quantize_onnx
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tqdm import tqdm

from cli.config import check_same_config, load_config
from cli.flags import (
    Parser,
    add_config_flag,
    add_data_dir_flag,
    add_device_flag,
    natural_int,
    number,
    one_of,
    positive_int,
    thread_count,
)
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.labels import Labels
from sentence_classifier.tokenizers import make_tokenizer
from text.labels import label_parser, write_logits_info
from text.lines import TsvReader, chunks, progress
from util import RunInfo, atomic_write

if TYPE_CHECKING:  # it imports torch
    from dataset import EncodedData

logger = logging.getLogger(__name__)


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The flags, and the config where one is given."""
    parser = Parser(__doc__, __file__)
    files = parser.add_argument_group("files")
    add_config_flag(files, None)
    add_data_dir_flag(files, None)
    files.add_argument("--model_path", default="pytorch-model.pt", help="the checkpoint (default: %(default)s)")
    files.add_argument("--bert_output_dir", help="a transformer's saved folder, checked to be of the same run")
    what = parser.add_argument_group("what to do")
    what.add_argument("--enable_inference", action="store_true",
                      help="from raw text, one sentence at a time, with tokenization in the measured time")
    what.add_argument("--input_path", help="classify the lines of this file, - for standard input; answers one JSON "
                                           "object a line on standard output")
    what.add_argument("--augmented", action="store_true",
                      help="label augmented.raw with logits, in fp32, for a student to learn from")
    what.add_argument("--more_teachers", nargs="+", default=[], metavar="MODEL_PATH",
                      help="with --augmented: label with the mean of the logits of several models, the first of which "
                           "is --model_path (with --enable_ort: ONNX files, the first --onnx_path)")
    what.add_argument("--num_examples", type=natural_int, default=0, help="only the first so many (default: 0, all)")
    what.add_argument("--batch_size", type=positive_int, default=1, help="(default: 1)")
    what.add_argument("--skip_bad_lines", action="store_true", help="pass over unusable lines and count them")
    onnx = parser.add_argument_group("ONNX")
    onnx.add_argument("--convert_onnx", action="store_true", help="export the checkpoint, check the export, and end")
    onnx.add_argument("--enable_ort", action="store_true", help="evaluate ONNX_PATH with ONNX Runtime, on the cpu")
    onnx.add_argument("--quantize_onnx", action="store_true",
                      help="with --convert_onnx: write an int8 file as well; with --enable_ort: evaluate it")
    onnx.add_argument("--onnx_path", default="pytorch-model.onnx", help="(default: %(default)s)")
    onnx.add_argument("--quantized_onnx_path", default="pytorch-model.onnx-quantized", help="(default: %(default)s)")
    onnx.add_argument("--quantized_onnx_mb", type=number(), metavar="MB",
                      help="how large the int8 file may be (default: as large as the fastest form is)")
    onnx.add_argument("--onnx_opset", type=int, choices=range(18, 24), default=20, metavar="18..23",
                      help="version of the ONNX operators (default: 20)")
    int8 = parser.add_argument_group("int8, on the CPU")
    int8.add_argument("--enable_dqm", action="store_true", help="dynamic: any model, activations rounded as they come")
    int8.add_argument("--enable_qat", action="store_true", help="a model that was trained with --enable_qat")
    int8.add_argument("--enable_qat_fx", action="store_true",
                      help="such a model as one compiled graph, which takes a minute to make")
    int8.add_argument("--enable_diffq", action="store_true", help="the weights that --enable_diffq learned the bits of")
    machine = parser.add_argument_group("machine")
    add_device_flag(machine)
    machine.add_argument("--num_threads", type=thread_count, default=0, help="(default: 0, the library's choice)")
    args = parser.parse_args(argv)
    if args.quantize_onnx and not (args.convert_onnx or args.enable_ort):
        raise InputError("--quantize_onnx goes with --convert_onnx or with --enable_ort.")
    if args.enable_ort and args.device not in (None, "cpu"):
        raise InputError(f"--enable_ort runs on the cpu, not on --device={args.device}.")
    way = int8_way(args)
    for flag, given in (("enable_inference", args.enable_inference), ("input_path", args.input_path),
                        ("convert_onnx", args.convert_onnx), ("quantize_onnx", args.quantize_onnx),
                        (f"enable_{way}", way)):
        if args.augmented and given:
            raise InputError(f"--augmented labels encoded text in fp32; leave --{flag} out.")
    if args.more_teachers and not args.augmented:
        raise InputError("--more_teachers goes with --augmented.")
    return args, None if args.config is None else load_config(args.config)


def int8_way(args: argparse.Namespace) -> str | None:
    """The way of quantization in PyTorch that the flags ask for: dqm, qat, qat_fx or diffq, or None.

    Two of them, one beside ONNX, or one on a GPU end the stage with exit status 2.
    """
    flag = one_of(args, "enable_ort", "convert_onnx", "enable_dqm", "enable_qat", "enable_qat_fx", "enable_diffq")
    if flag in (None, "enable_ort", "convert_onnx"):
        return None
    if args.device not in (None, "cpu"):
        raise InputError(f"--{flag} runs on the CPU; leave --device={args.device} out.")
    args.device = "cpu"
    return flag.removeprefix("enable_")


# ------------------------------------------------------------------------------------------------------- prediction


class Predictor(Protocol):
    """A loaded model with what it needs to read text: TorchPredictor, or inference.OnnxClassifier."""

    labels: Labels
    tokenizer: Any

    def logits(self, rows: Sequence[Any]) -> np.ndarray:
        """Logits [B, C] float32 of a batch of token id rows."""

    def probabilities(self, rows: Sequence[Any]) -> np.ndarray:
        """Class probabilities [B, C] of a batch of token id rows."""


@dataclass
class TorchPredictor:
    """The model of a checkpoint."""

    model: Any
    tokenizer: Any
    labels: Labels
    device: Any

    def logits(self, rows: Sequence[Any]) -> np.ndarray:
        """Logits [B, C] float32 of a batch of token id rows."""
        return self._logits(rows).cpu().numpy()

    def probabilities(self, rows: Sequence[Any]) -> np.ndarray:
        """Class probabilities [B, C] of a batch of token id rows."""
        return self._logits(rows).softmax(-1).cpu().numpy()

    def _logits(self, rows: Sequence[Any]) -> Any:
        import torch

        from dataset import pad

        with torch.inference_mode():
            batch = pad(rows).to(self.device)
            return self.model(batch.input_ids, batch.attention_mask)


def load_torch(args: argparse.Namespace, config: dict[str, Any] | None,
               way: str | None = None) -> tuple[TorchPredictor, RunInfo]:
    """The model of MODEL_PATH, checked against the config where one is given, and its run.

    Args:
        way: of quantization, see `int8_way`; None: the model in fp32.
    """
    import torch

    from cli.devices import choose_device
    from model import load_classifier
    from util import load_checkpoint

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    checkpoint = load_checkpoint(args.model_path)
    check_same_model(args.model_path, config, checkpoint.run, args)
    device = choose_device("cpu" if args.convert_onnx else args.device)
    model: Any = load_classifier(checkpoint, [args.data_dir, checkpoint.run.flags["data_dir"]]).to(device).eval()
    if way:
        from compression.quantization import quantize

        model = quantize(model, way, checkpoint, args.batch_size)
    tokenizer = make_tokenizer(checkpoint.run.vocabulary, checkpoint.run.encoding)
    return TorchPredictor(model, tokenizer, checkpoint.run.labels, device), checkpoint.run


def load_onnx(args: argparse.Namespace, config: dict[str, Any] | None) -> tuple[Predictor, RunInfo]:
    """The model of ONNX_PATH or QUANTIZED_ONNX_PATH, checked likewise, and what it says of itself."""
    from sentence_classifier.classifier import load

    classifier = load(model_file(args), args.num_threads)
    run = RunInfo.from_json(classifier.metadata["run"], vocabulary=classifier.vocabulary)
    check_same_model(model_file(args), config, run, args)
    return classifier, run


def model_file(args: argparse.Namespace) -> str:
    """The file that is evaluated."""
    if not args.enable_ort:
        return args.model_path
    return args.quantized_onnx_path if args.quantize_onnx else args.onnx_path


def check_same_model(path: str, config: dict[str, Any] | None, run: RunInfo,
                     args: argparse.Namespace) -> None:
    """Refuse a config of another model than the file's, and a --bert_output_dir that another run wrote.

    The file itself holds all the weights.
    """
    if config is not None:
        check_same_config(config, args.config, run.config, path)
    if args.bert_output_dir:
        from util import RUN_ID, saved_fact

        found = saved_fact(args.bert_output_dir, RUN_ID)
        if found != run.run_id:
            raise InputError(f"{args.bert_output_dir}: {f'of run {found}' if found else 'not written by train.py'}, "
                             f"and {path} is of run {run.run_id}; give the folder of the same run, or none.")


def evaluate_encoded(predictor: Predictor, data: Any, batch_size: int, count: int) -> tuple[np.ndarray, list[float]]:
    """Classify the first `count` encoded examples.

    Returns:
        Probabilities [N, C] in the file's order, and the seconds of each batch divided by its sentences.
    """
    order = np.arange(count)
    if batch_size > 1:  # like lengths together; the answers go back to their places
        order = np.argsort(-data.lengths[:count], kind="stable")
    probabilities = np.zeros((count, len(predictor.labels)), dtype=np.float32)
    seconds: list[float] = []
    for start in tqdm(range(0, count, batch_size), unit="batch", disable=None):
        places = order[start : start + batch_size]
        begin = time.perf_counter()
        probabilities[places] = predictor.probabilities(data.rows(places))
        seconds += [(time.perf_counter() - begin) / len(places)] * len(places)
    return probabilities, seconds


def evaluate_raw(predictor: Predictor, sentences: list[str]) -> tuple[np.ndarray, list[float]]:
    """Classify sentences one at a time. Returns as evaluate_encoded."""
    rows, seconds = [], []
    for sentence in tqdm(sentences, unit="sentence", disable=None):
        begin = time.perf_counter()
        rows.append(predictor.probabilities([predictor.tokenizer(sentence)])[0])
        seconds.append(time.perf_counter() - begin)
    return np.stack(rows), seconds


def classify_lines(predictor: Predictor, args: argparse.Namespace) -> None:
    """Answer each line of --input_path with a JSON object, in batches."""
    lines = TsvReader(args.input_path, args.skip_bad_lines, labelled=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON's, whatever the locale has
    for sentences in _batches(lines, args.batch_size, args.num_examples):
        probabilities = predictor.probabilities([predictor.tokenizer(sentence) for sentence in sentences])
        for sentence, row in zip(sentences, probabilities, strict=True):
            named = {name: round(float(p), 6) for name, p in zip(predictor.labels.names, row, strict=True)}
            best = predictor.labels.names[int(row.argmax())]
            print(json.dumps({"sentence": sentence, "label": best, "probability": named[best],
                              "probabilities": named}, ensure_ascii=False))
        sys.stdout.flush()
    if lines.skipped:
        logger.warning("[%s] %d bad lines were skipped", args.input_path, lines.skipped)


def _batches(lines: TsvReader, size: int, limit: int) -> Iterator[list[str]]:
    batch: list[str] = []
    try:
        for example in islice(lines, limit or None):
            batch.append(example.sentence)
            if len(batch) == size:
                yield batch
                batch = []
    except InputError:  # a bad line; those before it get their answers
        if batch:
            yield batch
        raise
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------- results


def read_examples(path: Path, labels: Labels, skip_bad_lines: bool, limit: int) -> tuple[list[str], list[str], Any]:
    """Sentences, labels as written, and class ids of a TSV file."""
    parser = label_parser(path, labels)
    sentences, written, targets = [], [], []

    def parse(label: str) -> Any:
        target = parser(label)
        return label, int(np.argmax(target)) if parser.logits else target

    for example in TsvReader(path, skip_bad_lines, parse_label=parse):
        sentences.append(example.sentence)
        written.append(example.label[0])
        targets.append(example.label[1])
        if len(sentences) == limit:
            break
    return sentences, written, np.array(targets)


def compare(predictions: np.ndarray, whole: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Log how int8's answers differ from those of fp32, `whole`, and return the figures."""
    changed, accuracy = float((predictions != whole).mean()), float((whole == targets).mean())
    lost = accuracy - float((predictions == targets).mean())
    logger.log(logging.WARNING if lost > 0.005 else logging.INFO, "[int8] %.2f %% of the predictions differ from "
               "those of fp32, whose accuracy is %.4f (%.2f points lost)", 100 * changed, accuracy, 100 * lost)
    return {"changed": changed, "fp32_accuracy": accuracy}


def write_predictions(path: Path, sentences: list[str], written: list[str], predicted: list[str]) -> None:
    """Write sentence TAB label TAB prediction."""
    with atomic_write(path) as file:
        for row in zip(sentences, written, predicted, strict=True):
            file.write("\t".join(row) + "\n")


def report(targets: np.ndarray, predictions: np.ndarray, labels: Labels, picture: str) -> dict[str, Any]:
    """Print the per-class report and the confusion matrix, draw it, and return the figures."""
    from sklearn.metrics import classification_report, confusion_matrix

    ids = list(range(len(labels)))
    matrix = confusion_matrix(targets, predictions, labels=ids)
    common = {"labels": ids, "target_names": labels.names, "zero_division": 0.0}
    print(classification_report(targets, predictions, digits=4, **common))
    print("confusion matrix (rows: the label, columns: the prediction)")
    width = max(5, len(str(matrix.max())) + 1)
    for name, row in zip(labels.names, matrix, strict=True):
        print("".join(f"{cell:>{width}}" for cell in row), name)
    draw_confusion(matrix, labels, picture)
    figures = classification_report(targets, predictions, output_dict=True, **common)
    return {"macro_f1": figures["macro avg"]["f1-score"], "confusion_matrix": matrix.tolist(),
            "per_class": {name: figures[name] for name in labels.names}}


def draw_confusion(matrix: np.ndarray, labels: Labels, path: str) -> None:
    """Draw the confusion matrix, shaded by the share of each label's sentences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(24.0, 3.0 + 0.6 * len(labels))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels.names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(labels)), labels.names, parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(f"accuracy {np.trace(matrix) / max(1, matrix.sum()):.4f}")
    if len(labels) <= 40:
        for row, column in np.ndindex(*matrix.shape):
            if matrix[row, column]:
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center",
                          color="white" if share[row, column] > 0.5 else "black")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's sentences")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def time_figures(seconds: list[float], batch_size: int) -> dict[str, float]:
    """Milliseconds a sentence without the first batch, which warms up."""
    rest = 1000 * np.array(seconds[batch_size:] or seconds)
    return {"total_ms": 1000 * float(np.sum(seconds)), "mean_ms": float(rest.mean()),
            "median_ms": float(np.median(rest)), "p95_ms": float(np.percentile(rest, 95))}


# ----------------------------------------------------------------------------------------------------------- label


def label_text(data: EncodedData, labels: Labels, logits: Callable[[list[np.ndarray]], np.ndarray], batch_size: int,
               limit: int, teacher: dict[str, Any]) -> Path:
    """Write `SOURCE.pred` beside the text SOURCE that `data` encodes: sentence TAB logits, and its record.

    Memory does not grow with the file: some thousand lines at a time are put into batches of like length, and their
    answers into the order of the lines. Each number is the shortest that single precision reads back as the same.

    Args:
        labels: the teacher's.
        logits: token id rows to logits [B, C] float32.
        limit: only the first so many sentences; 0: all.
        teacher: who it is, for the record.

    Raises:
        InputError: a logit is not finite.
    """
    target = data.source.with_name(f"{data.source.name}.pred")
    lines = TsvReader(data.source, data.encoding.skip_bad_lines,
                  parse_label=label_parser(data.source, labels, data.encoding.dummy_label))
    begin = 0
    with atomic_write(target) as file:
        for examples in chunks(islice(progress(lines), limit or None), 8192, 1 << 22):
            lengths = data.lengths[begin : begin + len(examples)]
            order = np.argsort(-lengths, kind="stable")
            answers = np.empty((len(examples), len(labels)), dtype=np.float32)
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                answers[places] = logits(data.rows(begin + places))
            for example, row in zip(examples, answers, strict=True):
                if not np.isfinite(row).all():
                    raise InputError(f"{data.source}:{example.line}: the teacher's logits for this sentence are not "
                                     "finite; train the teacher again, with a lower --lr.")
                file.write(f"{example.sentence}\t{' '.join(map(str, row))}\n")
            begin += len(examples)
    write_logits_info(target, list(labels.names), teacher=teacher,
                 source={"file": data.source.name, "sha256": data.encoding.source_sha256})
    return target


# ------------------------------------------------------------------------------------------------------------- main


def convert_onnx(args: argparse.Namespace, config: dict[str, Any] | None) -> None:
    """Write ONNX_PATH and, with --quantize_onnx, QUANTIZED_ONNX_PATH."""
    from compression.onnx_export import convert
    from util import load_checkpoint

    predictor, run = load_torch(args, config)
    checkpoint = load_checkpoint(args.model_path)
    folder = Path(args.data_dir or run.flags["data_dir"])
    int8_path = args.quantized_onnx_path if args.quantize_onnx else None
    convert(predictor.model, checkpoint, folder, args.onnx_path, int8_path, args.onnx_opset, args.num_threads,
            args.quantized_onnx_mb)


def label_augmented(predictor: Predictor, run: RunInfo, args: argparse.Namespace,
                    config: dict[str, Any] | None, folder: Path) -> None:
    """Write augmented.raw.pred."""
    from dataset import EncodedData, check_same_data

    def check(teacher: Predictor, found: RunInfo, path: str) -> None:
        check_same_data(data, found, path)
        if getattr(teacher, "metadata", {}).get("int8"):
            raise InputError(f"{path}: an int8 file; a teacher's logits are those of fp32, of the file that "
                             "--convert_onnx writes without --quantize_onnx, or of --model_path.")

    data = EncodedData(folder / f"augmented.raw.{run.encoding.kind}")
    check(predictor, run, model_file(args))
    teachers = {run.run_id: (model_file(args), predictor)}
    for path in args.more_teachers:
        own = argparse.Namespace(**{**vars(args), "model_path": path, "onnx_path": path, "bert_output_dir": None})
        other, found = load_onnx(own, config) if args.enable_ort else load_torch(own, config)
        check(other, found, path)
        if found.run_id in teachers:
            raise InputError(f"--more_teachers: {path} and {teachers[found.run_id][0]} are of the same run.")
        teachers[found.run_id] = (path, other)

    def mean_logits(rows: list[np.ndarray]) -> np.ndarray:
        total = reduce(np.add, (teacher.logits(rows) for _, teacher in teachers.values()))  # sum() would lose -0.0
        return total / len(teachers)

    runs, paths = list(teachers), [path for path, _ in teachers.values()]
    said = ({"run_ids": runs, "model_paths": paths} if args.more_teachers
            else {"run_id": runs[0], "model_path": paths[0]})
    begin = time.perf_counter()
    target = label_text(data, predictor.labels, mean_logits, args.batch_size, args.num_examples, said)
    logger.info("[wrote %s] logits of run %s, in %.1f s", target, ", ".join(runs), time.perf_counter() - begin)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage."""
    args, config = get_params(argv)

    from util import git_revision, setup_logging, versions, write_json

    setup_logging()
    if args.convert_onnx:
        convert_onnx(args, config)
        return
    way = int8_way(args)
    predictor, run = load_onnx(args, config) if args.enable_ort else load_torch(args, config, way)
    folder = Path(args.data_dir or run.flags["data_dir"])
    if args.input_path is not None:
        classify_lines(predictor, args)
        return
    if args.augmented:
        label_augmented(predictor, run, args, config, folder)
        return

    path, source = model_file(args), folder / "test.txt"
    if args.enable_inference:
        sentences, written, targets = read_examples(source, predictor.labels, args.skip_bad_lines, args.num_examples)
        probabilities, seconds = evaluate_raw(predictor, sentences)
    else:
        from dataset import EncodedData, check_same_data

        data = EncodedData(folder / f"test.txt.{run.encoding.kind}")
        check_same_data(data, run, path)
        sentences, written, targets = read_examples(source, predictor.labels, data.encoding.skip_bad_lines,
                                                    args.num_examples)
        probabilities, seconds = evaluate_encoded(predictor, data, args.batch_size, len(sentences))
    predictions = probabilities.argmax(1)
    correct = int((predictions == targets).sum())
    compared = {}
    if way:
        plain, _ = load_torch(args, config)
        whole = evaluate_raw(plain, sentences)[0] if args.enable_inference else evaluate_encoded(
            plain, data, 64, len(sentences))[0]
        compared = compare(predictions, whole.argmax(1), targets)
    timing = time_figures(seconds, 1 if args.enable_inference else args.batch_size)

    figures = report(targets, predictions, predictor.labels, f"{path}.confusion.png")
    logger.info("[macro F1] : %.4f", figures["macro_f1"])
    logger.info(f"[Accuracy] : {correct / len(targets):.4f}, {correct:5d}/{len(targets):5d}")
    if args.enable_inference:
        logger.info("[Elapsed Time(total_duration_time, average)] : %sms, %sms", timing["total_ms"], timing["mean_ms"])
    else:
        logger.info("[Elapsed Time] : %dms, %sms on average", timing["total_ms"], timing["mean_ms"])
    target = source.with_name(f"{source.name}.{'inference' if args.enable_inference else 'pred'}")
    write_predictions(target, sentences, written, [predictor.labels.names[i] for i in predictions])
    flags = {key: value for key, value in vars(args).items() if key != "command"}
    write_json({"accuracy": correct / len(targets), "correct": correct, "examples": len(targets), **figures,
                **compared, "timing": timing, "flags": flags, "run_id": run.run_id,
                "config": run.config, "git_revision": git_revision(), "versions": versions(),
                "date": time.strftime("%Y-%m-%d %H:%M:%S"), "command": args.command},
               f"{path}.test.json")


if __name__ == "__main__":
    main()
