"""Measure a trained classifier, classify new text with it, or export it to ONNX: the third stage.

Reads   MODEL_PATH (with --enable_ort ONNX_PATH) and DATA_DIR/test.txt with its encoding test.txt.ids or test.txt.fs;
        or raw text.
Writes  DATA_DIR/test.txt.pred (or test.txt.inference): sentence TAB label TAB prediction,
        and beside the model's file its .test.json (results) and .confusion.png; all of them in --output_dir if given.
        --convert_onnx writes ONNX_PATH, with --quantize_onnx also QUANTIZED_ONNX_PATH, and no results.
        --augmented labels DATA_DIR/augmented.raw: it writes augmented.raw.pred, sentence TAB logits, and no results.

    python evaluate.py --config=configs/config-glove-cnn.json --data_dir=data/snips
    echo "play some jazz" | python evaluate.py --input_path=-
    python evaluate.py --convert_onnx --quantize_onnx && python evaluate.py --enable_ort --quantize_onnx
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cli.config import check_same_config, load_config
from cli.flags import Parser, natural_int, number, one_of, positive_int, thread_count
from cli.training_flags import FLAGS
from sentence_classifier.batches import by_length
from sentence_classifier.classifier import OnnxClassifier, TextClassifier, load
from sentence_classifier.command_line import add_answer_flags, add_table_flags, answer_input
from sentence_classifier.decisions import ONE_LABEL, Decision, differing
from sentence_classifier.errors import InputError, fail_cleanly
from sentence_classifier.labels import Labels, split_labels
from sentence_classifier.tokenizers import make_tokenizer
from text.evaluation_report import (
    EvaluationReport,
    LabelSetReport,
    clip,
    draw_confusion,
    time_figures,
    write_predictions,
)
from text.labels import label_parser, write_logits_info
from text.lines import TsvReader, chunks, progress
from util import (
    RUN_ID,
    EncodingInfo,
    RunInfo,
    atomic_write,
    git_revision,
    saved_fact,
    setup_logging,
    versions,
    write_json,
)

if TYPE_CHECKING:  # it imports torch
    from dataset import EncodedData

logger = logging.getLogger(__name__)

Config = dict[str, Any] | None


def get_params(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The flags, with `int8_mode` (dqm, qat, qat_fx, diffq or None) and `command` beside them; and --config's content.

    Raises:
        InputError: flags that do not go together, or a config that cannot be used.
    """
    parser = Parser(__doc__, __file__)
    files = parser.add_argument_group("files")
    replace(FLAGS["config"], default=None, says_default="what the checkpoint was trained with").add_to(files)
    replace(FLAGS["data_dir"], default=None, says_default="where the checkpoint was trained").add_to(files)
    files.add_argument("--model_path", default="pytorch-model.pt",
                       help="The checkpoint that train.py wrote (default: %(default)s).")
    files.add_argument("--bert_output_dir",
                       help="A transformer's saved folder. It is only checked to be of the same run as the model "
                            "(default: it is not checked).")
    files.add_argument("--output_dir",
                       help="The folder for all results (default: predictions are written beside their text, the rest "
                            "beside the model's file).")
    what = parser.add_argument_group("what to do")
    what.add_argument("--enable_inference", action="store_true",
                      help="Measure on raw text, one sentence at a time, with tokenization in the measured time.")
    what.add_argument("--input_path",
                      help="Classify the lines of this file, or the rows of this table (CSV, TSV, JSON lines, "
                           "parquet), and print one JSON object a line; - is standard input.")
    what.add_argument("--augmented", action="store_true",
                      help="Label augmented.raw with logits, in fp32, for a student to learn from.")
    what.add_argument("--more_teachers", nargs="+", default=[], metavar="MODEL_PATH",
                      help="With --augmented: label with the mean of the logits of several models, the first of which "
                           "is --model_path (with --enable_ort these are ONNX files, and the first is --onnx_path).")
    what.add_argument("--num_examples", type=natural_int, default=0,
                      help="Read only so many examples from the beginning of the file (default: 0, all).")
    what.add_argument("--batch_size", type=positive_int, default=1,
                      help="How many sentences are computed together (default: %(default)s).")
    what.add_argument("--skip_bad_lines", action="store_true", help="Leave out unusable lines, and count them.")
    add_table_flags(parser.add_argument_group("tables in --input_path"))
    add_answer_flags(parser.add_argument_group("answers to a table"))
    onnx = parser.add_argument_group("ONNX")
    onnx.add_argument("--convert_onnx", action="store_true",
                      help="Export the checkpoint to ONNX, check that the export agrees with it, and end.")
    onnx.add_argument("--enable_ort", action="store_true", help="Evaluate ONNX_PATH with ONNX Runtime, on the CPU.")
    onnx.add_argument("--quantize_onnx", action="store_true",
                      help="With --convert_onnx: write an int8 file as well. With --enable_ort: evaluate that file.")
    onnx.add_argument("--onnx_path", default="pytorch-model.onnx", help="The ONNX file (default: %(default)s).")
    onnx.add_argument("--quantized_onnx_path", default="pytorch-model.onnx-quantized",
                      help="The int8 ONNX file (default: %(default)s).")
    onnx.add_argument("--quantized_onnx_mb", type=number(), metavar="MB",
                      help="How large the int8 file may be (default: as large as the fastest form is).")
    onnx.add_argument("--onnx_opset", type=int, choices=range(18, 24), default=20, metavar="18..23",
                      help="The version of the ONNX operators that the export uses (default: %(default)s).")
    int8 = parser.add_argument_group("int8 in PyTorch, on the CPU")
    int8.add_argument("--enable_dqm", action="store_true",
                      help="Quantize dynamically: any model, with activations rounded as they come.")
    int8.add_argument("--enable_qat", action="store_true",
                      help="Evaluate in int8 a model that was trained with --enable_qat.")
    int8.add_argument("--enable_qat_fx", action="store_true",
                      help="Evaluate such a model as one compiled graph, which takes a minute to make.")
    int8.add_argument("--enable_diffq", action="store_true",
                      help="Evaluate the weights with the numbers of bits that train.py --enable_diffq learned.")
    machine = parser.add_argument_group("machine")
    FLAGS["device"].add_to(machine)
    machine.add_argument("--num_threads", type=thread_count, default=0,
                         help="How many threads compute (default: 0, the library's choice).")
    args = parser.parse_args(argv)
    resolve(args)
    return args, None if args.config is None else load_config(args.config)


def resolve(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and set `int8_mode` and `device` by the others."""
    runtime = one_of(args, "enable_ort", "convert_onnx", "enable_dqm", "enable_qat", "enable_qat_fx", "enable_diffq")
    if runtime not in (None, "convert_onnx") and args.device not in (None, "cpu"):
        raise InputError(f"--{runtime} runs on the CPU; leave --device={args.device} out.")
    if args.quantize_onnx and not (args.convert_onnx or args.enable_ort):
        raise InputError("--quantize_onnx goes with --convert_onnx or with --enable_ort.")
    if args.more_teachers and not args.augmented:
        raise InputError("--more_teachers goes with --augmented.")
    in_onnx = runtime in ("enable_ort", "convert_onnx")
    args.int8_mode = runtime.removeprefix("enable_") if runtime and not in_onnx else None
    args.device = "cpu" if runtime else args.device
    for flag, given in (("enable_inference", args.enable_inference), ("input_path", args.input_path is not None),
                        ("convert_onnx", args.convert_onnx), ("quantize_onnx", args.quantize_onnx),
                        (f"enable_{args.int8_mode}", args.int8_mode)):
        if args.augmented and given:
            raise InputError(f"--augmented labels encoded text in fp32; leave --{flag} out.")


# ------------------------------------------------------------------------------------------------------------ models


class TorchClassifier(TextClassifier):
    """A checkpoint that train.py wrote: answers text by `predict`, as an exported model does.

    Args:
        device: None: cuda where there is one, else the CPU.
        data_dir: where frozen word vectors are looked for first, before the folder of training.
        int8_mode: how to quantize the model, see compression.quantization; None: it stays in fp32.
        batch_size: of int8_mode qat_fx, the size of the largest batch to come.

    Attributes:
        model: token ids [B, T] and mask [B, T] to logits [B, C]; see model.Classifier.
        checkpoint: the rest of the file's content.

    Raises:
        InputError: no such file, a damaged one, or one whose word vectors are not there.
    """

    def __init__(self, path: str | Path, device: str | None = None, data_dir: str | None = None,
                 int8_mode: str | None = None, batch_size: int = 1) -> None:
        from cli.devices import choose_device, use_device
        from compression.quantization import quantize
        from model import load_classifier
        from util import load_checkpoint

        self.checkpoint = load_checkpoint(path)
        run = self.checkpoint.run
        super().__init__(run.labels, make_tokenizer(run.vocabulary, run.encoding), run.decision)
        self.device = choose_device(device)
        use_device(self.device)
        self.model: Any = load_classifier(self.checkpoint, [data_dir, run.flags["data_dir"]]).to(self.device).eval()
        if int8_mode:
            self.model = quantize(self.model, int8_mode, self.checkpoint, batch_size)

    def logits(self, rows: Sequence[Any]) -> np.ndarray:
        """Logits [B, C] float32 of a batch of token id rows."""
        import torch

        from dataset import pad

        with torch.inference_mode():
            batch = pad(rows).to(self.device)
            return self.model(batch.input_ids, batch.attention_mask).cpu().numpy()


def load_model(args: argparse.Namespace, config: Config, **changes: Any) -> tuple[TextClassifier, RunInfo]:
    """The model that the flags, but for changes, name, and its run, checked against --config and --bert_output_dir."""
    args = argparse.Namespace(**{**vars(args), **changes})
    path = model_file(args)
    classifier: OnnxClassifier | TorchClassifier
    if args.enable_ort:
        classifier = load(path, args.num_threads)
        run = RunInfo.from_json(classifier.metadata["run"], vocabulary=classifier.vocabulary)
    else:
        import torch

        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        classifier = TorchClassifier(path, args.device, args.data_dir, args.int8_mode, args.batch_size)
        run = classifier.checkpoint.run
    if config is not None:
        check_same_config(config, args.config, run.config, path)
    if args.bert_output_dir:  # the model's file itself holds all the weights
        found = saved_fact(args.bert_output_dir, RUN_ID)
        if found != run.run_id:
            raise InputError(f"{args.bert_output_dir}: {f'of run {found}' if found else 'not written by train.py'}, "
                             f"and {path} is of run {run.run_id}; give the folder of the same run, or none.")
    return classifier, run


def model_file(args: argparse.Namespace) -> str:
    """The file that is evaluated."""
    if not args.enable_ort:
        return args.model_path
    return args.quantized_onnx_path if args.quantize_onnx else args.onnx_path


def place_of(args: argparse.Namespace, beside: str | Path, ending: str) -> Path:
    """Where a results file goes: beside another one, or into --output_dir under the same name.

    Raises:
        InputError: nothing can be written there; this is to be known before the work is done.
    """
    folder = Path(beside).parent if args.output_dir is None else Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); name another folder with --output_dir."
                         ) from None
    return folder / f"{Path(beside).name}.{ending}"


# ----------------------------------------------------------------------------------------------------------- convert


def convert(args: argparse.Namespace, config: Config) -> None:
    """Write ONNX_PATH and, with --quantize_onnx, QUANTIZED_ONNX_PATH."""
    from compression import onnx_export

    classifier, run = load_model(args, config)
    assert isinstance(classifier, TorchClassifier)
    folder = Path(args.data_dir or run.flags["data_dir"])
    onnx_export.convert(classifier.model, classifier.checkpoint, folder, args.onnx_path,
                        args.quantized_onnx_path if args.quantize_onnx else None, args.onnx_opset, args.num_threads,
                        args.quantized_onnx_mb)


# ------------------------------------------------------------------------------------------------------------ answer


def answer(args: argparse.Namespace, config: Config) -> None:
    """Answer each line of --input_path with a JSON object, or its rows in a copy of the table."""
    classifier, run = load_model(args, config)
    answer_input(classifier, args, args.num_examples)


# ----------------------------------------------------------------------------------------------------------- measure


def measure(args: argparse.Namespace, config: Config) -> None:
    """Classify test.txt, log how well and how fast, and write predictions, results and the confusion matrix."""
    classifier, run = load_model(args, config)
    source = Path(args.data_dir or run.flags["data_dir"]) / "test.txt"
    predictions_path = place_of(args, source, "inference" if args.enable_inference else "pred")
    results_path, picture_path = (place_of(args, model_file(args), end) for end in ("test.json", "confusion.png"))

    if args.enable_inference:
        sentences, written, targets = read_examples(source, run.encoding, args.skip_bad_lines, args.num_examples)
        batch_size, lengths = 1, np.ones(len(sentences))
    else:
        from dataset import EncodedData, check_same_data

        data = EncodedData(source.with_name(f"{source.name}.{run.encoding.kind}"))
        check_same_data(data, run, model_file(args))
        sentences, written, targets = read_examples(source, run.encoding, data.encoding.skip_bad_lines,
                                                    args.num_examples)
        if not np.array_equal(data.class_ids()[: args.num_examples or None], targets):
            raise InputError(f"{data.path}: its sentences are not those of {source}; run preprocess.py again.")
        batch_size, lengths = args.batch_size, data.lengths[: len(sentences)]

    def read(places: np.ndarray) -> list[Any]:
        if args.enable_inference:
            return [classifier.tokenizer(sentences[place]) for place in places]
        return data.rows(places)

    predictions, seconds = classify(classifier, read, lengths, batch_size)
    timing = time_figures(seconds, batch_size)
    compared: dict[str, float] = {}
    if args.int8_mode:
        fp32 = load_model(args, config, int8_mode=None)[0]
        expected, _ = classify(fp32, read, lengths, 1 if args.enable_inference else 64)
        compared = compare_with_fp32(predictions, expected, targets, classifier.decision)

    names, separator = classifier.labels.names, run.encoding.label_separator
    if separator is not None:
        known = set(names)
        report: EvaluationReport = LabelSetReport.of_sets(targets, predictions, names, [
            [name for name in split_labels(label, separator) if name not in known] for label in written])
        predicted = [separator.join(names[i] for i in np.flatnonzero(row)) for row in predictions]
    else:
        report = EvaluationReport.of(targets, predictions, names, written)
        predicted = [names[i] for i in predictions]
    if report.unknown:
        logger.warning("[%s] %d of %d sentences have a label that train.txt lacks (%s); they count as errors", source,
                       report.unknown.total(), report.count, clip(
                           ", ".join(f"{name} {count}" for name, count in report.unknown.most_common()), 200))
    write_predictions(predictions_path, sentences, written, predicted)
    flags = {key: value for key, value in vars(args).items() if key != "command"}
    write_json({**report.to_json(), **compared, "timing": timing, "flags": flags, "run_id": run.run_id,
                "config": run.config, "git_revision": git_revision(), "versions": versions(),
                "date": time.strftime("%Y-%m-%d %H:%M:%S"), "command": args.command}, results_path)
    draw_confusion(report, picture_path)
    print("\n".join(report.lines()), flush=True)
    if separator is not None:
        logger.info("[micro F1] : %.4f", report.micro[2])
    logger.info("[macro F1] : %.4f", report.macro_f1)
    logger.info(f"[Accuracy] : {report.accuracy:.4f}, {report.correct:5d}/{report.count:5d}")
    if args.enable_inference:
        logger.info("[Elapsed Time(total_duration_time, average)] : %sms, %sms",
                    timing["total_ms"] - timing["warm_up_ms"], timing["mean_ms"])
    else:
        logger.info("[Elapsed Time] : %dms, %sms on average", timing["total_ms"], timing["mean_ms"])


def read_examples(path: Path, encoding: EncodingInfo, skip_bad_lines: bool,
                  limit: int) -> tuple[list[str], list[str], np.ndarray]:
    """Sentences, labels as written, and targets of a TSV file.

    Targets are class ids [N], UNKNOWN_LABEL for a label that train.txt lacks; or with several labels a sentence, which
    of train.txt's it has [N, C] bool.
    """
    parser = label_parser(path, Labels(encoding.labels), unknown_allowed=True, separator=encoding.label_separator)
    lines = TsvReader(path, skip_bad_lines, parse_label=lambda label: (label, parser(label)),
                      empty_labels=encoding.multi_label)
    examples = list(islice(lines, limit or None))
    targets = np.array([example.label[1] for example in examples])
    if encoding.multi_label:
        targets = (targets if parser.logits else targets[:, :-1]) > 0
    elif parser.logits:
        targets = targets.argmax(1)
    return [example.sentence for example in examples], [example.label[0] for example in examples], targets


def classify(classifier: TextClassifier, read: Callable[[np.ndarray], list[Any]], lengths: np.ndarray,
             batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Classify examples of these lengths [N]: one by one in the file's order, or in batches of like length.

    `read` makes token id rows of places in the file, and its time counts.

    Returns:
        Predictions [N], or with several labels [N, C] bool, and the seconds [N] of each batch divided by its sentences.
    """
    decision, count = classifier.decision, len(classifier.labels)
    predictions = (np.zeros((len(lengths), count), dtype=bool) if decision.multi_label
                   else np.zeros(len(lengths), dtype=np.int64))
    seconds: list[float] = []
    batches = list(by_length(lengths if batch_size > 1 else np.ones(len(lengths)), batch_size))
    for places in tqdm(batches, unit="batch", disable=None):
        begin = time.perf_counter()
        probabilities = classifier.probabilities(read(places))
        seconds += [(time.perf_counter() - begin) / len(places)] * len(places)
        predictions[places] = decision.decide(probabilities)
    return predictions, np.array(seconds)


def compare_with_fp32(predictions: np.ndarray, fp32_predictions: np.ndarray, targets: np.ndarray,
                      decision: Decision = ONE_LABEL) -> dict[str, float]:
    """Log how the answers of int8 differ from those of fp32, and return the figures."""
    changed, score = float(differing(predictions, fp32_predictions).mean()), decision.score(fp32_predictions, targets)
    lost = score - decision.score(predictions, targets)
    logger.log(logging.WARNING if lost > 0.005 else logging.INFO, "[int8] %.2f %% of the predictions differ from "
               "those of fp32, whose %s is %.4f (%.2f points lost)", 100 * changed, decision.measure, score, 100 * lost)
    return {"changed": changed, "fp32_accuracy": score}


# ------------------------------------------------------------------------------------------------------------- label


def label(args: argparse.Namespace, config: Config) -> None:
    """Write augmented.raw.pred: the mean of the teachers' logits for each sentence of augmented.raw."""
    from dataset import EncodedData, check_same_data

    classifier, run = load_model(args, config)
    data = EncodedData(Path(args.data_dir or run.flags["data_dir"]) / f"augmented.raw.{run.encoding.kind}")
    target = place_of(args, data.source, "pred")
    paths = [model_file(args), *args.more_teachers]
    teachers: dict[str, tuple[str, TextClassifier]] = {}  # by their run
    for path in paths:
        teacher, found = (classifier, run) if not teachers else load_model(
            args, config, model_path=path, onnx_path=path, bert_output_dir=None)
        check_same_data(data, found, path)
        if isinstance(teacher, OnnxClassifier) and teacher.metadata.get("int8"):
            raise InputError(f"{path}: an int8 file; a teacher's logits are those of fp32, of the file that "
                             "--convert_onnx writes without --quantize_onnx, or of --model_path.")
        if found.run_id in teachers:
            raise InputError(f"--more_teachers: {path} and {teachers[found.run_id][0]} are of the same run.")
        teachers[found.run_id] = (path, teacher)

    def mean_logits(rows: list[np.ndarray]) -> np.ndarray:
        total = reduce(np.add, (teacher.logits(rows) for _, teacher in teachers.values()))  # sum() would lose -0.0
        return total / len(teachers)

    runs = list(teachers)
    said = {"run_ids": runs, "model_paths": paths} if args.more_teachers else {"run_id": runs[0],
                                                                               "model_path": paths[0]}
    begin = time.perf_counter()
    label_text(data, target, classifier.labels, mean_logits, args.batch_size, args.num_examples, said)
    logger.info("[wrote %s] logits of run %s, in %.1f s", target, ", ".join(runs), time.perf_counter() - begin)


def label_text(data: EncodedData, target: Path, labels: Labels, logits: Callable[[list[np.ndarray]], np.ndarray],
               batch_size: int, limit: int, teacher: dict[str, Any]) -> None:
    """Write sentence TAB logits for the text that `data` encodes to `target`, and beside it which logits these are.

    Memory does not grow with the file: some thousand lines at a time are put into batches of like length, and their
    answers into the order of the lines. Each number is the shortest that single precision reads back as the same.

    Args:
        labels: the teacher's.
        logits: token id rows to logits [B, C] float32.
        limit: only the first so many sentences; 0: all.
        teacher: what is said of it beside the file.

    Raises:
        InputError: a logit is not finite.
    """
    lines = TsvReader(data.source, data.encoding.skip_bad_lines,
                      parse_label=label_parser(data.source, labels, data.encoding.dummy_label,
                                               separator=data.encoding.label_separator),
                      empty_labels=data.multi_label)
    begin = 0
    with atomic_write(target) as file:
        for examples in chunks(islice(progress(lines), limit or None), 8192, 1 << 22):
            answers = np.empty((len(examples), len(labels)), dtype=np.float32)
            for places in by_length(data.lengths[begin : begin + len(examples)], batch_size):
                answers[places] = logits(data.rows(begin + places))
            for example, row in zip(examples, answers, strict=True):
                if not np.isfinite(row).all():
                    raise InputError(f"{data.source}:{example.line}: the teacher's logits for this sentence are not "
                                     "finite; train the teacher again, with a lower --lr.")
                file.write(f"{example.sentence}\t{' '.join(map(str, row))}\n")
            begin += len(examples)
    write_logits_info(target, list(labels.names), teacher=teacher,
                      source={"file": data.source.name, "sha256": data.encoding.source_sha256})


# -------------------------------------------------------------------------------------------------------------- main


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the stage: one of its four jobs."""
    args, config = get_params(argv)
    setup_logging()
    if args.convert_onnx:
        convert(args, config)
    elif args.input_path is not None:
        answer(args, config)
    elif args.augmented:
        label(args, config)
    else:
        measure(args, config)


if __name__ == "__main__":
    main()
