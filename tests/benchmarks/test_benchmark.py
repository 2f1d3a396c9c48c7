"""benchmark.py and its verbs but accuracy, with tiny sizes: figures of speed are made, not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model
from conftest import Place
from helpers import ROOT, make_config, refusal, write_config
from helpers import run_benchmark as run

import benchmark
from benchmarks import gpu, harness, recipes, scale, speed, tables, vectors
from model import WordEmbedding, build_model
from text.lines import TsvReader


def result(name: str) -> dict[str, Any]:
    return json.loads(Path("results", f"{name}.json").read_text(encoding="utf-8"))


def check_figures(name: str, printed: str, count: int) -> dict[str, Any]:
    """What every measurement leaves: provenance, ratios, a table, an empty scratch folder."""
    found = result(name)
    assert {"git_revision", "date", "command", "versions", "cores"} < set(found)
    assert len(found["figures"]) == count
    for row in found["figures"]:
        assert row["ratio"] > 0
        assert f"| {row['measured']} | {tables.number(row['ratio'])} | {row['beside']} |" in printed
    assert not list(Path(".bench").iterdir())
    assert str(Path.cwd()) not in json.dumps(found) + printed
    return found


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny models in the place of the real ones."""
    for name in ("gnb", "cnn"):
        monkeypatch.setitem(recipes.CONFIGS, name, str(write_config(tmp_path / f"{name}.json", name)))


def test_speed(raw: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.devices.bf16_is_fast", lambda device: True)
    before = sorted(path.name for path in raw.data.iterdir())
    run("speed", f"--config={raw.config}", f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}")
    found = check_figures("speed", capsys.readouterr().out, 3)
    assert set(found["sentences_a_second"]) == {"fp32, padded to n_ctx", "fp32, bucketed", "bf16, bucketed",
                                                "table of 3000", "table of 1000"}
    assert sorted(path.name for path in raw.data.iterdir()) == before
    assert not Path("pytorch-model.pt").exists()


def test_speed_pads_and_trains_the_same_sentences(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The padded side computes n_ctx positions for every sentence, the other its batch's longest."""
    from dataset import EncodedData, load_table
    from model import Classifier, WordEmbedding, build_model

    data = EncodedData(encoded.data / "train.txt.ids")
    seen: list[tuple[int, ...]] = []
    forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda *given: seen.append(given[1].shape) or forward(*given))
    import train

    args, config = train.get_params(encoded.train_flags())
    table = load_table(encoded.data / "embedding.npy", data.encoding.table)
    def make() -> Classifier:
        return build_model(config, len(data.labels), WordEmbedding(table, data.encoding.seen_rows))

    sizes = harness.Sizes(warm_up_steps=1, bucketed_steps=0, padded_steps=3)
    setup = speed.Setup(vars(args), {**config, "n_ctx": 100}, data.path, sizes)
    for padded in (False, True):
        seen.clear()
        assert setup.rate(make, "no", padded) > 0
        assert len(seen) == 1 + (3 if padded else -(-len(data) // 8))
        lengths = {length for _, length in seen}
        assert lengths == {100} if padded else max(lengths) == max(data.lengths) and len(lengths) > 1


def test_finetune(raw: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model("BERT", tmp_path / "tiny", ["play some jazz", "will it rain in tokyo"])
    run("finetune", f"--bert_model_name_or_path={folder}", f"--data_dir={raw.data}")
    found = check_figures("finetune", capsys.readouterr().out, 3)
    assert found["peak_mb"] > 10 and len(found["sentences_a_second"]) == 3


def test_augment(raw: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run("augment", f"--data_dir={raw.data}")
    found = check_figures("augment", capsys.readouterr().out, 3)
    assert set(found["runs"]) == {"n_iter 5", "one process", "parallel"}
    assert all(one["sentences"] == 46 and one["lines"] > 46 and one["peak_mb"] > 10
               for (one,) in found["runs"].values())


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_inference(raw: Place, configs: None, capsys: pytest.CaptureFixture[str], again: bool) -> None:
    flags = ("--inference_models", "cnn", f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}",
             "--checkpoints=kept", "--num_threads=1")
    run("inference", *flags)
    found = result("inference")
    assert {point["form"] for point in found["points"]} == {"plain ONNX", "PyTorch", "PyTorch dynamic int8", "ONNX",
                                                            "ONNX int8"}
    assert all(point["median_ms"] > 0 and 0 <= point["accuracy"] <= 1 for point in found["points"])
    assert set(found["cold_seconds"]["cnn"]) == {"PyTorch", "ONNX", "ONNX int8"}
    assert "\n| ONNX, cold start | 0." in capsys.readouterr().out
    assert Path("results/inference.png").read_bytes().startswith(b"\x89PNG")
    if again:
        trained = Path("kept/cnn.pt").stat().st_mtime_ns
        run("inference", *flags)
        assert Path("kept/cnn.pt").stat().st_mtime_ns == trained


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_every_way_of_int8(raw: Place, configs: None, capsys: pytest.CaptureFixture[str]) -> None:
    run("int8", "--inference_models", "cnn", f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}",
        "--checkpoints=kept", "--num_threads=1")
    assert "| QAT, ONNX int8 |" in capsys.readouterr().out
    found = result("int8")
    ways = found["ways"]["cnn"]
    assert set(ways) == {"PyTorch", "dynamic int8", "ONNX", "ONNX int8", "QAT", "QAT, compiled graph",
                         "QAT, ONNX int8", "DiffQ"}
    assert all(got["changed"] is not None for way, got in ways.items()
               if way[:2] in ("dy", "QA", "Di") and "ONNX" not in way)
    assert set(found["threads"]) == {"cnn, ONNX", "cnn, ONNX int8"}
    assert sorted(path.name for path in Path("kept").glob("*.pt")) == ["cnn-diffq.pt", "cnn-qat.pt", "cnn.pt"]


def test_no_data_is_no_measurement(raw: Place) -> None:
    for verb in ("speed", "scale", "finetune", "inference"):
        assert ("data/nowhere/train.txt: no such file; fetch data sets with python etc/download_datasets.py"
                in refusal(benchmark.main, verb, "--data_dir=data/nowhere"))


def test_gpu_where_there_is_none() -> None:
    assert "a CUDA device, and there is none" in refusal(benchmark.main, "gpu")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_answers_of_a_device_are_compared(precision: str) -> None:
    """With the CPU in a GPU's place."""
    model = build_model(make_config("cnn"), 3, WordEmbedding(torch.randn(9, 12), 9))
    got = gpu.answer(model, [[2, 3], [4], [5, 6, 7]], torch.device("cpu"), precision, compiled=False)
    assert got["agreeing"] > 0.5 and (got["distance"] > 0) == (precision == "bf16") and got["median_ms"] > 0


def test_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    run("vectors")
    found = check_figures("vectors", capsys.readouterr().out, 3)
    assert len(found["seconds"]["numpy"]) == 1 and 10 < found["peak_mb"][0] < 1000


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_scale(raw: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
    commands, launch = [], harness.launch

    def launched(*command: str, threads: int | None = None) -> tuple[float, float, str]:
        commands.append((command, threads))
        if real:
            return launch(*command, threads=threads)
        for word in command:
            if word.startswith("--save_path="):
                Path(f"{word.removeprefix('--save_path=')}.train.json").write_text('{"seconds": 0.5}')
        return 2.0, 50.0, ""

    monkeypatch.setattr(harness, "launch", launched)
    folder = make_model("BERT", Path("tiny"), ["play some jazz", "will it rain in tokyo"]) if real else raw.root
    run("scale", f"--config={raw.config}", f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}",
        f"--bert_model_name_or_path={folder}")
    found = check_figures("scale", capsys.readouterr().out, 4)
    assert set(found["preprocess_lines_a_second"]) == {"word vectors", "transformer"}
    (torchrun,) = [(command, threads) for command, threads in commands if "torch.distributed.run" in command]
    assert torchrun[1] == 1 and {"--nproc_per_node=2", "--batch_size=64"} < set(torchrun[0])
    if not real:
        assert found["preprocess_lines_a_second"]["transformer"] == {"1": [100.0], "2": [100.0]}
        assert list(found["train_sentences_a_second"].values()) == [[92.0], [92.0]]  # 46 sentences in half a second


def test_generated_vectors_and_corpora_are_what_they_say(tmp_path: Path) -> None:
    from text.vectors import read_vectors

    vectors.generate_vectors(tmp_path / "v.txt", 50, 6)
    assert read_vectors(tmp_path / "v.txt", cache=False).table.shape == (50, 6)
    scale.generate_corpus(tmp_path / "c.txt", 400, 30)
    examples = list(TsvReader(tmp_path / "c.txt"))
    assert len(examples) == 400
    assert {word for example in examples for word in example.sentence.split()} <= {f"word{n}" for n in range(30)}


def test_launch_measures_the_child_alone() -> None:
    held = bytearray(b"x" * 200_000_000)  # must not count
    seconds, peak, output = harness.launch("-c", "print(sum(bytearray(b'x' * 50_000_000)) > 0)")
    assert output == "True\n" and seconds > 0 and 90 < peak + len(held) * 0 < 190


def test_bad_input_is_refused_in_a_sentence(raw: Place, configs: None) -> None:
    assert "did you mean 'speed'" in refusal(benchmark.main, "sped")
    assert "did you mean '--models'" in refusal(benchmark.main, "--modls", "gnb")
    assert "holds no results yet" in refusal(benchmark.main, "table")
    assert "no such file" in refusal(benchmark.main, "accuracy", "--data_sets", "nowhere")
    Path("results").mkdir()
    Path("results/accuracy.json").write_text("[1]")
    assert "not as benchmark.py wrote it" in refusal(benchmark.main, "table")
    assert Path("results/accuracy.json").read_text() == "[1]"
    Path("results/accuracy.json").unlink()
    for verb, content in (("speed", '{"figures": ['), ("speed", "[1]"), ("speed", "{}"),
                          ("chain", '{"figures": [], "notes": [], "cores": 2, "git_revision": "r"}')):
        (path := Path(f"results/{verb}.json")).write_text(content)
        assert f"{verb}.json: not as benchmark.py wrote it" in refusal(benchmark.main, "table")
        path.unlink()


def test_help_loads_neither_torch_nor_sklearn() -> None:
    code = ("import benchmark, sys\ntry: benchmark.main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'sklearn', 'fasttext', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
