"""A tiny model of an architecture with data, configs and flags, as the tests of transformers share it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, make_model
from helpers import ROOT, make_config

import preprocess
import train


@dataclass
class Case:
    """A folder with `model`, `data` and a config of one architecture and encoder."""

    root: Path

    def flags(self, *more: Any) -> list[str]:
        """What preprocess.py and train.py share."""
        return [f"--config={self.root / 'config.json'}", f"--data_dir={self.root / 'data'}",
                f"--bert_model_name_or_path={self.root / 'model'}", *map(str, more)]

    def train_flags(self, *more: Any) -> list[str]:
        """Flags for train.py: on the CPU and in fp32."""
        return self.flags("--device=cpu", "--mixed_precision=no", "--batch_size=16", "--lr=2e-3", "--warmup_ratio=0.1",
                          f"--save_path={self.root / 'model.pt'}", f"--bert_output_dir={self.root / 'out'}",
                          f"--log_dir={self.root / 'runs'}", f"--log_path={self.root / 'train.log'}", *more)

    def evaluate_flags(self, *more: Any) -> list[str]:
        """Flags for evaluate.py."""
        return [f"--model_path={self.root / 'model.pt'}", "--device=cpu", *map(str, more)]

    def results(self, stage: str) -> dict[str, Any]:
        """A stage's results file."""
        return json.loads((self.root / f"model.pt.{stage}.json").read_text())


def sample(size: int, name: str) -> list[str]:
    """About `size` lines of data/sample, evenly spread, of four of its intents."""
    lines = (ROOT / "data/sample" / name).read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if line.split("\t")[1] in ("make_call", "play_music", "set_alarm", "translate")]
    return chosen[:: max(1, len(chosen) // size)][:size]


def make_case(root: Path, name: str, encoder: str = "cls") -> Case:
    """The tiny model of an architecture with a piece of data/sample."""
    (root / "data").mkdir(parents=True)
    for file, size in (("train.txt", 240), ("valid.txt", 60), ("test.txt", 60)):
        (root / "data" / file).write_text("\n".join(sample(size, file)) + "\n", encoding="utf-8")
    make_model(name, root / "model", [line.split("\t")[0] for line in sample(1000, "train.txt")])
    words = make_config("gnb" if encoder == "cls" else encoder)
    own = ("lowercase", "token", "pad", "unk")
    config = {key: value for key, value in words.items() if key.split("_")[0] not in own}
    config |= {key: 32 for key in ("num_filters", "fc_hidden_size") if key in config}
    config |= {"emb_class": ARCHITECTURES[name].emb_class, "enc_class": encoder, "n_ctx": 40, "dropout": 0.1}
    (root / "config.json").write_text(json.dumps(config))
    return Case(root)


def train_case(root: Path, name: str, encoder: str, epochs: int = 12) -> Case:
    """A trained tiny model of an architecture."""
    case = make_case(root, name, encoder)
    preprocess.main(case.flags())
    train.main(case.train_flags(f"--epoch={epochs}"))
    return case


def onnx_flags(root: Path, *more: Any) -> list[str]:
    """Flags for evaluate.py: a checkpoint and the files that it becomes."""
    return [f"--model_path={root / 'model.pt'}", f"--data_dir={root / 'data'}", f"--onnx_path={root / 'model.onnx'}",
            f"--quantized_onnx_path={root / 'int8.onnx'}", "--num_threads=1", *map(str, more)]
