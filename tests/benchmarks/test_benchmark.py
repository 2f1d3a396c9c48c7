"""benchmark.py, accuracy.py and report.py, with tiny sizes: figures of speed are made, not judged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model
from conftest import Place
from helpers import ROOT, refusal, write_config

import benchmark
from benchmarks import accuracy, finetune, measure, report, scale


def result(name: str) -> dict[str, Any]:
    return json.loads(Path("results", f"{name}.json").read_text(encoding="utf-8"))


def run(*argv: Any) -> None:
    benchmark.main(["--small", *map(str, argv)])


def check_figures(name: str, printed: str, count: int) -> dict[str, Any]:
    """What every measurement leaves: provenance, ratios, a table, an empty scratch folder."""
    found = result(name)
    assert {"git_revision", "date", "command", "versions", "cores"} < set(found)
    assert len(found["figures"]) == count
    for row in found["figures"]:
        assert row["ratio"] > 0
        assert f"| {row['measured']} | {row['ratio']:.3g} | {row['aim']} |" in printed
    assert not list(Path(".bench").iterdir())
    assert str(Path.cwd()) not in json.dumps(found) + printed
    return found


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny models in the place of the real ones."""
    for name in ("gnb", "cnn"):
        monkeypatch.setitem(accuracy.CONFIGS, name, str(write_config(tmp_path / f"{name}.json", name)))


def test_speed(raw: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("util.bf16_is_fast", lambda device: True)
    before = sorted(path.name for path in raw.data.iterdir())
    run("speed", f"--config={raw.config}", f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}")
    found = check_figures("speed", capsys.readouterr().out, 3)
    assert set(found["sentences_a_second"]) == {"fp32, padded to n_ctx", "fp32, bucketed", "bf16, bucketed",
                                                "table of 3000", "table of 1000"}
    assert [row["aim"] for row in found["figures"]] == [">= 6", ">= 8", ">= 0.9"]
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

    sizes = measure.Sizes(warm_up_steps=1, bucketed_steps=0, padded_steps=3)
    for pad_to in (0, 100):
        seen.clear()
        assert measure.training_rate(make, vars(args), data.path, "no", pad_to, sizes) > 0
        assert len(seen) == 1 + (3 if pad_to else -(-len(data) // 8))
        lengths = {length for _, length in seen}
        assert lengths == {100} if pad_to else max(lengths) == max(data.lengths) and len(lengths) > 1


def test_finetune(raw: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model("BERT", tmp_path / "tiny", ["play some jazz", "will it rain in tokyo"])
    run("finetune", f"--bert_model_name_or_path={folder}", f"--data_dir={raw.data}")
    found = check_figures("finetune", capsys.readouterr().out, 3 + len(finetune.KINDS) + 1 + 2)
    assert found["peak_mb"] > 10 and len(found["sentences_a_second"]) == 3
    shares = [row["ratio"] for row in found["figures"][3:-2]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    rate, rest = (row["ratio"] for row in found["figures"][-2:])
    products = next(row["ratio"] for row in found["figures"] if row["measured"].endswith("matrix products"))
    assert 0 < rate < 2 and rest == pytest.approx(rate * products)


@pytest.mark.parametrize(("operator", "kind"), [
    ("addmm", "matrix products"), ("bmm", "matrix products"), ("bernoulli_", "dropout"),
    ("native_layer_norm_backward", "normalization and activation"), ("gelu", "normalization and activation"),
    ("_fused_adamw_", "optimizer and clipping"), ("linalg_vector_norm", "optimizer and clipping"),
    ("copy_", "copies and casts"), ("mul", "elementwise arithmetic and sums"), ("index_select", "other operators"),
    ("_scaled_dot_product_flash_attention_for_cpu", "other operators")])
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert finetune.kind_of(f"aten::{operator}") == kind


def test_augment(raw: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run("augment", f"--data_dir={raw.data}")
    found = check_figures("augment", capsys.readouterr().out, 4)
    assert [row["aim"] for row in found["figures"]] == [">= 1", "", "", "<= 1.1"]
    assert all(one["sentences"] == 46 and one["lines"] > 46 and one["peak_mb"] > 10 for one in found["runs"])
    assert {(one["n_iter"], one["parallel"]) for one in found["runs"]} == {
        (5, False), (20, False), (20, True)}


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
    assert [row["aim"] for row in found["figures"] if row["aim"]] == [">= 4", "<= 1"]
    assert "| cnn, ONNX, cold start : 1 s |" in capsys.readouterr().out
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
    found = check_figures("int8", capsys.readouterr().out, 8 + 4)
    ways = found["ways"]["cnn"]
    assert set(ways) == {"PyTorch", "dynamic int8", "ONNX", "ONNX int8", "QAT", "QAT, compiled graph",
                         "QAT, ONNX int8", "DiffQ"}
    assert all("changed" in got for way, got in ways.items() if way[:2] in ("dy", "QA", "Di") and "ONNX" not in way)
    assert set(found["threads"]) == {"cnn, ONNX", "cnn, ONNX int8"}
    assert sorted(path.name for path in Path("kept").glob("*.pt")) == ["cnn-diffq.pt", "cnn-qat.pt", "cnn.pt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_where_there_is_none() -> None:
    assert "a CUDA device, and there is none" in refusal(benchmark.main, "gpu")


def test_the_sample_stands_in_for_a_default_data_set_alone(raw: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw.root)
    assert measure.available(benchmark.get_params([])) == (ROOT / "data/sample", "none", [
        "snips is not here: measured on data/sample", "glove.6B.300d.txt is not here: no pretrained vectors"])
    for verb in ("speed", "augment"):
        assert "data/nowhere/train.txt: no such file" in refusal(benchmark.main, verb, "--data_dir=data/nowhere")
    assert measure.available(benchmark.get_params(["--embedding_path=nothing.txt"]))[1] == "nothing.txt"
    args = benchmark.get_params([f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}"])
    assert measure.available(args) == (raw.data, str(raw.vectors), [])


def test_vectors_and_memory(raw: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run("vectors")
    vectors = check_figures("vectors", capsys.readouterr().out, 4)
    assert len(vectors["seconds"]["numpy"]) == 1 and 10 < vectors["peak_mb"][0] < 1000
    run("memory", f"--config={raw.config}")
    memory = check_figures("memory", capsys.readouterr().out, 2)
    assert all(10 < peak < 1000 for peak in memory["peak_mb"])


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_scale(raw: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, real: bool) -> None:
    commands = []

    def launched(*command: str, threads: int | None = None) -> tuple[float, float, str]:
        commands.append((command, threads))
        if real:
            return measure.launch(*command, threads=threads)
        for word in command:
            if word.startswith("--log_path="):
                Path(word.removeprefix("--log_path=")).write_text("[trained 3 steps in 0.5 s]\n")
        return 2.0, 50.0, ""

    monkeypatch.setattr(scale, "launch", launched)
    folder = make_model("BERT", Path("tiny"), ["play some jazz", "will it rain in tokyo"]) if real else raw.root
    run("scale", f"--config={raw.config}", f"--data_dir={raw.data}", f"--embedding_path={raw.vectors}",
        f"--bert_model_name_or_path={folder}")
    found = check_figures("scale", capsys.readouterr().out, 5)
    assert found["lines"] == [300, 900] and set(found["preprocess_lines_a_second"]) == {"word vectors", "transformer"}
    (torchrun,) = [(command, threads) for command, threads in commands if "torch.distributed.run" in command]
    assert torchrun[1] == 1 and {"--nproc_per_node=2", "--batch_size=64"} < set(torchrun[0])
    if not real:
        assert found["preprocess_lines_a_second"]["transformer"] == {"1": [100.0], "2": [100.0]}
        assert list(found["train_sentences_a_second"].values()) == [[92.0], [92.0]]  # 46 sentences in half a second


def test_generated_vectors_and_corpora_are_what_they_say(tmp_path: Path) -> None:
    from text.vectors import read_vectors

    benchmark.generate_vectors(tmp_path / "v.txt", 50, 6)
    assert read_vectors(tmp_path / "v.txt", cache=False).table.shape == (50, 6)
    scale.generate_corpus(tmp_path / "c.txt", 400, 30)
    examples = list(accuracy.TsvReader(tmp_path / "c.txt"))
    assert len(examples) == 400
    assert {word for example in examples for word in example.sentence.split()} <= {f"word{n}" for n in range(30)}


def test_launch_measures_the_child_alone() -> None:
    held = bytearray(b"x" * 200_000_000)  # must not count
    seconds, peak, output = measure.launch("-c", "print(sum(bytearray(b'x' * 50_000_000)) > 0)")
    assert output == "True\n" and seconds > 0 and 90 < peak + len(held) * 0 < 190


def test_accuracy_runs_the_stages_and_the_baselines(raw: Place, configs: None,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fasttext")
    argv = ("accuracy", "--data_sets", raw.data, "--models", "gnb", "--seeds", 4, "--embedding_path", raw.vectors)
    before = sorted(path.name for path in raw.data.iterdir())
    run(*argv)
    rows = result("accuracy")["rows"]
    printed = capsys.readouterr().out
    assert [(row["model"], row["seed"]) for row in rows] == [("gnb", 4), ("TF-IDF + linear SVM", 0), ("fastText", 0)]
    for row in rows:
        assert row["data_set"] == "data" and row["accuracy"] == row["correct"] / 21
        assert row["ms"] > 0 and row["train_seconds"] > 0 and 0 <= row["valid_accuracy"] <= 1
        assert f"| {row['model']} | {100 * row['accuracy']:.2f} |\n" in printed
    assert rows[0]["embedding"] == {"file": "vectors.txt", "words": 24}
    assert rows[0]["raw_accuracy"] == rows[0]["accuracy"]
    assert rows[1]["settings_tried"] == 2 and rows[1]["setting"]["C"] in (0.1, 0.3, 1.0)
    assert "subset of 24 words" in printed
    assert Path("results/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert str(Path.cwd()) not in json.dumps(rows) + printed
    assert sorted(path.name for path in raw.data.iterdir()) == before and not Path("pytorch-model.pt").exists()
    run(*argv)  # all is finished
    assert result("accuracy")["rows"] == rows


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stages replaced by a list of what was trained."""
    done: list[tuple[str, int]] = []

    def train_and_test(data: Path, config: str, flags: list[str], key: dict[str, Any], kept: Path | None,
                       force: bool = False) -> dict[str, Any]:
        seed = key["seed"]
        if len(done) == 2 and seed == 3:
            raise KeyboardInterrupt
        done.append((Path(config).stem, seed))
        return {"accuracy": 0.9 + seed / 1000, "valid_accuracy": 0.9, "train_seconds": 1.0, "ms": 1.0}

    def encode(source: Path, folder: Path, config: str, *flags: str) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    monkeypatch.setattr(accuracy, "train_and_test", train_and_test)
    monkeypatch.setattr(accuracy, "encode", encode)
    monkeypatch.setattr(accuracy, "BASELINES", {"TF-IDF + linear SVM": accuracy.BASELINES["TF-IDF + linear SVM"]})
    return done


def test_accuracy_resumes(encoded: Place, configs: None, trained: list[tuple[str, int]],
                          monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("accuracy", "--data_sets", encoded.data, "--models", "gnb", "cnn", "--seeds", 1, 2, 3)
    with pytest.raises(SystemExit):
        run(*argv)
    assert trained == [("gnb", 1), ("gnb", 2)] and len(result("accuracy")["rows"]) == 2
    assert not list(Path(".bench").iterdir())
    trained.append(("", 0))
    run(*argv)
    assert trained[3:] == [("gnb", 3), ("cnn", 1), ("cnn", 2), ("cnn", 3)]
    assert "| gnb | 90.20 (90.10, 90.20, 90.30) |\n" in capsys.readouterr().out

    del trained[3:]
    run(*argv)
    assert trained[3:] == []
    run(*argv, "--force")
    assert len(trained[3:]) == 6 and len(result("accuracy")["rows"]) == 7
    del trained[3:]
    monkeypatch.setattr(accuracy, "code_hash", lambda *files: "another")  # the old rows are replaced
    run(*argv[:4], "gnb", "--seeds", 1)
    assert trained[3:] == [("gnb", 1)] and len(result("accuracy")["rows"]) == 7


def test_a_new_recipe_keeps_the_old_rows_and_shows_the_new(encoded: Place, configs: None, trained: list[Any],
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("accuracy", "--data_sets", encoded.data, "--models", "gnb")
    run(*argv, "--seeds", 2)
    monkeypatch.setitem(accuracy.RECIPES, ("data", "gnb"), ("--lr=0.1", [7, 8]))
    capsys.readouterr()
    run(*argv)
    assert trained == [("gnb", 2), ("gnb", 7), ("gnb", 8)]
    rows = result("accuracy")["rows"]
    assert len(rows) == 4 and rows[-1]["flags"][0] == "--lr=0.1"
    printed = capsys.readouterr().out
    assert "(90.70, 90.80)" in printed
    benchmark.main(["table"])
    assert capsys.readouterr().out == printed


def test_a_student_needs_its_teacher(encoded: Place, configs: None, trained: list[Any],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy.CONFIGS, "cnn-taught", accuracy.CONFIGS["cnn"])
    argv = ("accuracy", "--models", "cnn-taught", "--embedding_path=none", "--data_sets")
    assert "no recipe for it on data; the data set's folder has to be called" in refusal(benchmark.main, *argv,
                                                                                         encoded.data)
    named = encoded.data.rename(encoded.data.parent / "sst2")
    assert "--models minilm-cls --seeds 1 --checkpoints=FOLDER first" in refusal(benchmark.main, *argv, named)
    assert trained == []


@pytest.mark.matrix
def test_students(raw: Place, configs: None, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher, the text that it labels, students of both kinds, a pruned one; then what each answers in."""
    source, bert = raw.data.rename(raw.data.parent / "sst2"), raw.data.parent / "bert"
    make_model("BERT", bert, [example.sentence for example in accuracy.TsvReader(source / "train.txt")])
    monkeypatch.setitem(accuracy.CONFIGS, "cnn-taught", accuracy.CONFIGS["cnn"])
    flags = "--n_iter=2 --analyzer=hanta"
    monkeypatch.setattr(accuracy, "BY_ONE", (((accuracy.TEACHER, 1),), flags))
    two = ((accuracy.TEACHER, 1), ("minilm-cnn", 1))
    monkeypatch.setitem(accuracy.TEACHING, "minilm-cls-taught", (two, flags))
    for model in ("minilm-3-augmented", "minilm-3-pruned"):
        flags = accuracy.RECIPES["sst2", model][0].replace("0,2,4", "0").replace("heads=6", "heads=1")
        monkeypatch.setitem(accuracy.RECIPES, ("sst2", model), (flags.replace("dim=512", "dim=8"), [1]))
    students = ("cnn-taught", "minilm-3-augmented", "minilm-3-pruned")
    models = ("minilm-cls", "minilm-cnn", "minilm-cls-taught", *students)
    for model in models:
        if model != "cnn-taught":
            monkeypatch.setitem(accuracy.CONFIGS, model, str(ROOT / accuracy.CONFIGS[model]))
    argv = ("accuracy", "--data_sets", source, "--seeds", 1, "--checkpoints=kept", f"--embedding_path={raw.vectors}",
            f"--bert_model_name_or_path={bert}", "--models", *models)
    run(*argv)
    rows = {row["model"]: row for row in result("accuracy")["rows"]}
    assert set(models) < set(rows)
    assert "--model_path={minilm-3-augmented}" in rows["minilm-3-pruned"]["flags"]
    labelled = [path.read_text().splitlines() for path in Path("kept").glob("sst2-augmented-*/augmented.txt")]
    assert len(labelled) == 2 and labelled[0] != labelled[1]  # by one teacher, and by two
    assert all(len(lines) > 46 and len(lines[0].split("\t")[1].split()) > 1 for lines in labelled)
    assert json.loads(Path("kept/sst2-cnn-taught-1/model.pt.train.json").read_text())["flags"]["augmented"]

    capsys.readouterr()
    run("chain", f"--data_dir={source}", "--checkpoints=kept", f"--embedding_path={raw.vectors}",
        f"--bert_model_name_or_path={bert}", "--num_threads=1")
    found = check_figures("chain", capsys.readouterr().out, 3 * (1 + len(students)) + 1)
    sizes = {(point["model"], point["form"]): point["mb"] for point in found["points"]}
    assert sizes["minilm-3-pruned", "ONNX"] < sizes["minilm-3-augmented", "ONNX"] < sizes["minilm-cls", "ONNX"]
    assert Path("results/chain.png").read_bytes().startswith(b"\x89PNG")


def test_folds_hold_each_training_sentence_out_once(raw: Place, tmp_path: Path) -> None:
    whole = (raw.data / "train.txt").read_text().splitlines()
    tested = []
    for fold in range(3):
        folder = accuracy.hold_out(raw.data, tmp_path / str(fold), fold, 3)
        train, test = ((folder / name).read_text().splitlines() for name in ("train.txt", "test.txt"))
        assert sorted(train + test) == sorted(whole) and test
        tested += test
        assert (folder / "valid.txt").read_bytes() == (raw.data / "valid.txt").read_bytes()
    assert sorted(tested) == sorted(whole)


def test_folds(encoded: Place, configs: None, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(accuracy, "encoded_facts", lambda folder: {"vectors": 3})
    run("accuracy", "--data_sets", encoded.data, "--models", "gnb", "--folds", 2)
    assert trained == [("gnb", 1), ("gnb", 2)]
    assert "| gnb | 90.15 (90.10, 90.20) |\n" in capsys.readouterr().out
    assert {row["data_set"] for row in result("accuracy")["rows"]} == {"data, held out"}


def test_the_code_hash_is_of_code_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    hashes = []
    for text in ('def f():\n    "Says."\n    return 1', '# why\ndef f():\n\n    return 1', "def f():\n    return 2"):
        (tmp_path / "a.py").write_text(text)
        hashes.append(accuracy.code_hash(("a.py",)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_kept_run_of_other_code_is_moved_aside(tmp_path: Path) -> None:
    folder, key = tmp_path / "run", {"recipe": "a", "code": "b", "seed": 1}
    assert not accuracy.go_on(folder, key, force=False)
    (folder / "model.pt.state").touch()
    assert accuracy.go_on(folder, key, force=False) and accuracy.go_on(folder, key, force=True)  # cut off: goes on
    assert not accuracy.go_on(folder, {**key, "code": "c"}, force=False)
    assert (tmp_path / "run.before-1/model.pt.state").exists() and not (folder / "model.pt.state").exists()
    (folder / "model.pt.train.json").touch()
    assert accuracy.go_on(folder, {**key, "code": "c"}, force=False)
    assert not accuracy.go_on(folder, {**key, "code": "c"}, force=True)
    assert (tmp_path / "run.before-2/model.pt.train.json").exists()


def test_one_fold_leaves_nothing_to_train_on(raw: Place) -> None:
    assert "give 2 or more" in refusal(benchmark.main, "accuracy", "--data_sets", raw.data, "--models", "gnb",
                                       "--folds", 1)


@pytest.mark.parametrize("name", accuracy.BASELINES)
def test_baselines_learn_and_their_settings_are_chosen_on_valid(name: str, tmp_path: Path) -> None:
    if name == "fastText":
        pytest.importorskip("fasttext")
    for split, count in (("train", 600), ("valid", 100), ("test", 100)):
        lines = (ROOT / "data/sample" / f"{split}.txt").read_text(encoding="utf-8").splitlines(True)[:count]
        (tmp_path / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    fit, settings = accuracy.BASELINES[name]
    weak = {"C": 1e-6} if "C" in settings[0] else {"epoch": 1, "lr": 1e-4, "dim": 50}
    good = {"C": 1.0} if "C" in settings[0] else {"epoch": 50, "lr": 0.5, "dim": 50}
    row = accuracy.tune(fit, [weak, good], tmp_path)
    assert row["setting"] == good and row["accuracy"] > 0.5 and row["examples"] == 100
    again = accuracy.tune(fit, [good], tmp_path)
    assert again["correct"] == row["correct"]


def test_a_setting_that_diverges_is_passed_over(raw: Place) -> None:
    def fit(setting: dict[str, Any], train: accuracy.Examples, folder: Path) -> Any:
        if setting["lr"] > 1:
            raise RuntimeError("Encountered NaN.")
        return lambda sentence: "PlayMusic"

    assert accuracy.tune(fit, [{"lr": 2}, {"lr": 1}], raw.data)["setting"] == {"lr": 1}


def test_caption_names_a_whole_vector_file_plainly() -> None:
    row = {"cores": 2, "git_revision": "r"}
    assert "subset" not in report.caption([{**row, "embedding": {"file": "glove.txt", "words": 400_000}}])
    assert "No pretrained" in report.caption([{**row, "embedding": {"file": "none", "words": 0}}])


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
