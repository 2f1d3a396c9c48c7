"""What several test files share: tiny data, tiny configs, and stages run as a user runs them."""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENCODERS = ("gnb", "cnn", "densenet-cnn", "densenet-dsa")
DIM = 8  # of the tiny word vectors

INTENTS = {
    "PlayMusic": ("play {} by {}", "put on some {}", "I want to hear {} now please"),
    "GetWeather": ("will it rain in {}", "weather in {} on {}", "how cold is it in {} this {} night"),
    "book a table": ("book a table at {} for {}", "reserve {}", "a table for two near {} on {} , please"),
    "none of these": ("tell me about {}", "{}", "who is {} 's neighbour and why does nobody know {} here"),
}
FILLERS = ("jazz", "Paris", "tokyo", "rock", "monday", "queen", "l'été", "naïve", "7", "Mozart", "seven", "東京",
           "blue")
# The words of the vector file. The last five stand in no sentence.
COVERED = ("play", "on", "in", "will", "rain", "weather", "book", "reserve", "tell", "who", "is", "jazz", "Paris",
           "seven", "monday", "rock", "a", "for", "the", "of", "and", "cat", "Dog", "new york")


def run_benchmark(*argv: Any) -> None:
    """Run benchmark.py with tiny sizes."""
    import benchmark
    from benchmarks.harness import Sizes

    small = Sizes(rounds=1, warm_up_steps=1, bucketed_steps=2, padded_steps=1, tables=(3000, 1000), words=300,
                  dimension=20, lines=(300, 1500), subword_lines=200, epochs=1, vocabulary=100,
                  train_flags="--epoch=1 --max_train_steps=3", settings=2, layers=1, sentences=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "Sizes", lambda: small)
        benchmark.main([*map(str, argv)])


def make_config(encoder: str = "cnn", /, **changes: Any) -> dict[str, Any]:
    """A tiny config of an encoder."""
    densenet = {"densenet_first_num_filters": 6, "densenet_num_filters": 4, "densenet_last_num_filters": 7}
    cnn = {"num_filters": 5, "kernel_sizes": [2, 3, 4, 5, 6]}
    more = {
        "gnb": {},
        "cnn": {**cnn, "fc_hidden_size": 9},
        "densenet-cnn": {**densenet, **cnn, "densenet_kernels": [[1, 1], [3, 5], [3, 9]]},
        "densenet-dsa": {**densenet, "densenet_kernels": [[1, 1], [3, 5], [3, 9]], "dsa_num_attentions": 3,
                         "dsa_dim": 5, "dsa_r": 2, "fc_hidden_size": 9},
    }[encoder]
    return {"emb_class": "glove", "enc_class": encoder, "n_ctx": 100, "lowercase": True, "token_emb_dim": DIM,
            "pad_token": "<pad>", "pad_token_id": 0, "unk_token": "<unk>", "unk_token_id": 1, "dropout": 0.2,
            **more, **changes}


def write_config(path: Path, encoder: str = "cnn", /, **changes: Any) -> Path:
    """Write a tiny config and return its path."""
    path.write_text(json.dumps(make_config(encoder, **changes)), encoding="utf-8")
    return path


def make_lines(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences with their intents, each intent in turn."""
    draw = random.Random(seed)
    names = list(INTENTS)
    made = []
    for number in range(count):
        label = names[number % len(names)]
        template = draw.choice(INTENTS[label])
        made.append((template.format(*draw.choices(FILLERS, k=2)), label))
    return made


def make_data(folder: Path, sizes: tuple[int, int, int] = (46, 16, 21)) -> Path:
    """Write train.txt, valid.txt and test.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(zip(("train.txt", "valid.txt", "test.txt"), sizes, strict=True)):
        write_lines(folder / name, make_lines(size, seed))
    return folder


def write_lines(path: Path, lines: list[tuple[str, str]]) -> None:
    """Write sentence TAB label lines."""
    path.write_text("".join(f"{sentence}\t{label}\n" for sentence, label in lines), encoding="utf-8")


def make_vectors(path: Path) -> Path:
    """Write a tiny vector file in GloVe's layout."""
    numbers = np.random.default_rng(5).normal(size=(len(COVERED), DIM)).round(4)
    path.write_text("".join(f"{word} {' '.join(map(str, row))}\n"
                            for word, row in zip(COVERED, numbers.tolist(), strict=True)), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every name in a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def restore(folder: Path, files: dict[str, bytes | None]) -> None:
    """Make the files of a flat folder what they were."""
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


def refusal(main: Callable[..., None], *argv: Any) -> str:
    """Run a stage that must end with exit status 2 and one sentence, and return the sentence."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        main([str(flag) for flag in argv])
    assert end.value.code == 2
    errors = [line for line in said.getvalue().split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said.getvalue(), said.getvalue()
    return errors[0].removeprefix("error: ")


def answer(main: Callable[..., None], *argv: Any) -> str | None:
    """Run a stage that may refuse its input: the sentence, or None where it went well."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            main([str(flag) for flag in argv])
    except SystemExit:
        pass
    else:
        return None
    return refusal(main, *argv)


def script(name: str, *argv: Any, **options: Any) -> subprocess.Popen[str]:
    """Start a stage in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, str(ROOT / name), *map(str, argv)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def weights(path: str | Path) -> dict[str, Any]:
    """The tensors of a checkpoint."""
    from util import load_checkpoint

    return load_checkpoint(path).model


def same_weights(one: str | Path, other: str | Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    import torch

    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@contextlib.contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on localhost that answers GET and HEAD by `answer`; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def naive(content: bytes, labelled: bool = True) -> list[tuple[int, str, str] | int]:
    """Each line as (line, sentence, label), or its number where it is bad. Written to be obvious, not fast."""
    pieces = content.split(b"\n")
    if pieces[-1] == b"":
        pieces.pop()
    found: list[tuple[int, str, str] | int] = []
    for number, piece in enumerate(pieces, 1):
        try:
            text = piece.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            found.append(number)
            continue
        fields = text.split("\t")
        for invisible in "\u200b\u2060\ufeff":
            fields[1:] = [field.replace(invisible, "") for field in fields[1:]]
        good = len(fields) == (2 if labelled else 1) and "\0" not in text and all(field.strip() for field in fields)
        label = unicodedata.normalize("NFC", fields[-1].strip()) if labelled else ""
        found.append((number, fields[0].strip(), label) if good else number)
    return found


class Fixed(argparse.Namespace):
    """Flags that nobody changes."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError(f"--{name} is changed")

    def __delattr__(self, name: str) -> None:
        raise AssertionError(f"--{name} is removed")


def fix_flags(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage's flags be such that who changes them fails."""
    get_params = stage.get_params

    def get_fixed(argv: list[str] | None = None) -> tuple[Fixed, Any]:
        args, config = get_params(argv)
        fixed = Fixed()
        vars(fixed).update(vars(args))
        return fixed, config

    monkeypatch.setattr(stage, "get_params", get_fixed)


class Malicious:
    """Unpickling it makes the file `executed`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def malicious_zip(path: Path) -> None:
    """Write what looks like a checkpoint and would run code."""
    import torch

    from util import CHECKPOINT_FORMAT

    content = {"format": CHECKPOINT_FORMAT, "run": make_run_info().to_json(), "metrics": {}, "model": Malicious()}
    torch.save(content, path)


def make_run_info(**changes: Any) -> Any:
    """What a checkpoint says of a run that never was."""
    from util import EncodingInfo, RunInfo

    encoding = EncodingInfo(kind="ids", n_ctx=100, tokenizer="whitespace", lowercase=True, labels=("no", "yes"),
                            vocab_sha256="0")
    return RunInfo(**{"run_id": "a", "identity": "a", "config": {}, "flags": {}, "encoding": encoding, "vocabulary": "",
                      "embedding": {}, "versions": {}, "git_revision": "", "date": "", "command": "", **changes})


# The code that decides a run's weights; another version of it makes kept figures stale.
DECISIVE = ("preprocess.py", "train.py", "cli/training_flags.py", "training/run.py", "training/speedups.py",
            "training/trainer.py", "training/losses.py", "model.py", "dataset.py", "text/lines.py", "text/vectors.py",
            "text/vocabulary.py", "pretrained/loading.py", "pretrained/layout.py", "pretrained/masking.py",
            "pretrained/surgery.py")


def code_hash(files: tuple[str, ...] = DECISIVE) -> str:
    """A checksum of what some files define, but for comments, docstrings, layout, imports and which file defines it."""
    definitions = []
    for name in files:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            for field in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(node, field, None), list):
                    setattr(node, field, [one for one in block if not isinstance(one, ast.Import | ast.ImportFrom)])
        definitions += [ast.dump(node) for node in tree.body]
    return hashlib.sha256("\n".join(sorted(definitions)).encode()).hexdigest()[:12]
