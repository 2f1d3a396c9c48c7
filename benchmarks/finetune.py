"""Fine-tuning a transformer: bucketed batches in reduced precision against fp32 padded to n_ctx, and against
transformers' own Trainer; the memory that it takes, and where its time goes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Sizes, available_data, figure, interleave, launch, training_rate
from benchmarks.stages import ROOT, SPLITS, encode
from sentence_classifier.errors import InputError
from text.lines import TsvReader

CONFIG = ROOT / "configs/config-bert-cls.json"
BATCH_SIZE = 64
# What torch's operators do, by the first of these words in their names; what is left counts as other operators.
KINDS = {
    "matrix products": ("mm", "linear", "matmul"),
    "dropout": ("bernoulli", "dropout"),
    "normalization and activation": ("layer_norm", "gelu", "softmax", "relu", "tanh"),
    "optimizer and clipping": ("adamw", "optimizer", "vector_norm", "foreach"),
    "copies and casts": ("copy", "clone", "fill", "zero", "cat"),
    "elementwise arithmetic and sums": ("mul", "add", "sub", "div", "sum", "where", "isneginf", "all"),
}
MATRIX_SIZE = 2048  # of the square matrices by which the processor's rate is told


def measure_finetuning(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second of --bert_model_name_or_path on --data_dir, each side in turn."""
    from cli.devices import choose_device, choose_precision
    from dataset import EncodedData

    sizes: Sizes = args.sizes
    name = args.bert_model_name_or_path
    source, notes, train = prepare(args, folder)
    data = folder / "data"
    steps = sizes.warm_up_steps + sizes.padded_steps
    _, peak, _ = launch(str(ROOT / "train.py"), *train, f"--max_train_steps={steps}")
    resolved = json.loads((folder / "model.pt.train.json").read_text())
    flags, config = resolved["flags"], resolved["config"]
    device = choose_device(flags["device"])
    precision = choose_precision("auto", device)
    encoded = EncodedData(data / "train.txt.fs")

    given = (name, flags, config, encoded.path)
    base, ours, theirs = "fp32, padded to n_ctx", f"{precision}, bucketed", f"transformers' Trainer, {precision}"
    sides: dict[str, Callable[[], float]] = {
        base: partial(alone, plain_rate, *given, sizes), ours: partial(alone, our_rate, *given, precision, sizes),
        theirs: partial(alone, trainer_rate, name, data, device.type, precision, config["n_ctx"], folder, sizes)}
    rates = interleave(sides, sizes.rounds, warm_up=False)
    middle = {side: statistics.median(values) for side, values in rates.items()}
    times, operations = alone(profile, device.type, *given, precision, sizes)
    notes.append(f"{Path(name).name}, {CONFIG.name}, data set {source.name}: {len(encoded):,} sentences of "
                 f"{encoded.lengths.mean():.1f} tokens, n_ctx {config['n_ctx']}, batches of {BATCH_SIZE}")
    return {"notes": notes, "device": device.type, "sentences_a_second": rates, "peak_mb": peak, "figures": [
        figure(f"fine-tuning, {ours} : {base}", middle[ours] / middle[base], ">= 20",
               f"{middle[ours]:,.0f} : {middle[base]:,.1f} sentences a second"),
        figure(f"fine-tuning, {ours} : {theirs}", middle[ours] / middle[theirs], ">= 1.25",
               f"{middle[ours]:,.0f} : {middle[theirs]:,.0f} sentences a second"),
        figure("peak memory of fine-tuning : 2,000 MB", peak / 2000, "<= 1", f"{peak:,.0f} MB"),
        *where_time_goes(times, operations, device, precision)]}


def alone(measure: Callable[..., Any], *args: Any) -> Any:
    """A measurement in a process of its own, which another one's settings do not reach."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def our_rate(name: str, flags: dict[str, Any], config: dict[str, Any], path: Path, precision: str, sizes: Sizes,
             profiler: Any = None) -> float:
    """Sentences a second as train.py trains."""
    from cli.devices import choose_device
    from dataset import EncodedData
    from training.speedups import speed_up_training
    from util import keep_freed_memory

    keep_freed_memory()

    def make_model() -> Any:
        model = new_classifier(name, config, path)
        speed_up_training(model.embedding.transformer, choose_device(flags["device"]), EncodedData(path).token_ids)
        return model

    return training_rate(make_model, flags, path, precision, 0, sizes, profiler)


def plain_rate(name: str, flags: dict[str, Any], config: dict[str, Any], path: Path, sizes: Sizes) -> float:
    """Sentences a second in fp32, padded to n_ctx, with torch's own dropout and memory as it comes."""
    return training_rate(partial(new_classifier, name, config, path), flags, path, "no", config["n_ctx"], sizes)


def new_classifier(name: str, config: dict[str, Any], path: Path) -> Any:
    """An untrained classifier of the encoded data at `path` on a pretrained transformer."""
    from dataset import EncodedData
    from pretrained.loading import load_pretrained

    return make_classifier(load_pretrained(name), config, EncodedData(path))


def profile(device: str, name: str, flags: dict[str, Any], config: dict[str, Any], path: Path, precision: str,
            sizes: Sizes) -> tuple[dict[str, float], int]:
    """Seconds by kind of operator of some steps as train.py takes them, and the operations of their matrix products."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as make_profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    profiler = make_profiler(activities=activities, with_flops=True)
    our_rate(name, flags, config, path, precision, replace(sizes, bucketed_steps=sizes.padded_steps), profiler)
    times: dict[str, float] = dict.fromkeys([*KINDS, "other operators"], 0.0)
    operations = 0
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        times[kind] += (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6
        operations += event.flops if kind == "matrix products" else 0
    return times, operations


def where_time_goes(times: dict[str, float], operations: int, device: Any, precision: str) -> list[dict[str, Any]]:
    """The shares that kinds of operators have of their time, and the rate of their matrix products beside that of large
    matrices.

    Args:
        times, operations: as profile answers.
    """
    whole = sum(times.values())
    mine, most = operations / times["matrix products"], matrix_rate(device, precision)
    shares = sorted(times.items(), key=lambda item: -item[1])
    return [*(figure(f"fine-tuning, {precision}, time of its operators: {kind}", seconds / whole, "",
                     f"{seconds:.2f} of {whole:.2f} s") for kind, seconds in shares),
            figure(f"its matrix products' rate : that of {MATRIX_SIZE} x {MATRIX_SIZE} matrices", mine / most, "",
                   f"{mine / 1e9:,.0f} : {most / 1e9:,.0f} billion operations a second"),
            figure("matrix products at that rate : all operators' time", operations / most / whole, "",
                   f"{operations / most:.2f} of {whole:.2f} s")]


def kind_of(operator: str) -> str:
    """Which of KINDS an operator of torch is, by its name."""
    name = operator.lower().removeprefix("aten::")
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other operators")


def matrix_rate(device: Any, precision: str, rounds: int = 20) -> float:
    """Additions and multiplications a second of square matrices, the fastest of some products."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX_SIZE ** 3 / min(seconds)


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, list[str], list[str]]:
    """Encode --data_dir for --bert_model_name_or_path in FOLDER/data.

    Returns:
        The data set, what is to be said of it, and train.py's flags, by which it leaves FOLDER/model.pt.
    """
    source, notes = available_data(args)
    data, pretrained = folder / "data", f"--bert_model_name_or_path={args.bert_model_name_or_path}"
    encode(source, data, str(CONFIG), pretrained)
    return source, notes, [f"--config={CONFIG}", f"--data_dir={data}", pretrained, "--lr=1e-4",
                           f"--batch_size={BATCH_SIZE}", f"--save_path={folder / 'model.pt'}",
                           f"--bert_output_dir={folder / 'bert'}", f"--log_dir={folder / 'runs'}",
                           f"--log_path={folder / 'train.log'}"]


def make_classifier(transformer: Any, config: dict[str, Any], data: Any) -> Any:
    """An untrained classifier of encoded data on a transformer."""
    from model import TransformerEmbedding, build_model
    from pretrained.checks import classification_token

    classify_by = classification_token(transformer, data.encoding.leading_special)
    return build_model(config, len(data.labels), TransformerEmbedding(transformer, classify_by))


def trainer_rate(name: str, data: Path, device: str, precision: str, n_ctx: int, folder: Path, sizes: Sizes) -> float:
    """Sentences a second of transformers' Trainer with the best that it offers off the shelf.

    Batches of like length padded to their longest, reduced precision, fused AdamW, no evaluation, no files.
    """
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    examples = list(TsvReader(data / SPLITS[0]))
    labels = sorted({example.label for example in examples})
    tokenizer = AutoTokenizer.from_pretrained(name)
    encoded = tokenizer([example.sentence for example in examples], truncation=True, max_length=n_ctx)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels.index(example.label)}
            for ids, example in zip(encoded["input_ids"], examples, strict=True)]
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels), dtype="float32")
    steps = sizes.bucketed_steps or -(-len(rows) // BATCH_SIZE)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    settings = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH_SIZE, learning_rate=1e-4,
        max_steps=sizes.warm_up_steps + steps, bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=device == "cpu",
        optim="adamw_torch_fused", train_sampling_strategy="group_by_length", report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no")
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer),
                      callbacks=[Clock()])
    trainer.train()
    if len(times) != sizes.warm_up_steps + steps:
        raise InputError("transformers' Trainer did not train all of its steps.")
    # The last batch of an epoch is smaller; over whole epochs the sentences are those of the file.
    sentences = len(rows) if not sizes.bucketed_steps else steps * BATCH_SIZE
    return sentences / (times[-1] - times[sizes.warm_up_steps - 1])
