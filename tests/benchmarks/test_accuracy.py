"""accuracy.py and baselines.py, with tiny models or none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
from architectures import make_model
from conftest import Place
from helpers import ROOT, refusal, write_config
from helpers import run_benchmark as run

import augment_data
import benchmark
import fastformers
import train
from benchmarks import accuracy, baselines, harness, recipes
from text.lines import TsvReader


def result(name: str) -> dict[str, Any]:
    return json.loads(Path("results", f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny models in the place of the real ones."""
    for name in ("gnb", "cnn"):
        monkeypatch.setitem(recipes.CONFIGS, name, str(write_config(tmp_path / f"{name}.json", name)))


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

    def train_and_test(args: Any, data: Path, flags: list[str], key: dict[str, Any]) -> dict[str, Any]:
        name, seed = key["model"], key["seed"]
        if len(done) == 2 and seed == 3:
            raise KeyboardInterrupt
        done.append((name, seed))
        return {"accuracy": 0.9 + seed / 1000, "valid_accuracy": 0.9, "train_seconds": 1.0, "ms": 1.0}

    def encode(source: Path, folder: Path, config: str, *flags: str) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    monkeypatch.setattr(accuracy, "train_and_test", train_and_test)
    monkeypatch.setattr(harness, "encode", encode)
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
    assert len(trained[3:]) == 6 and len(result("accuracy")["rows"]) == 7  # the old rows are replaced


def test_a_new_recipe_keeps_the_old_rows_and_shows_the_new(encoded: Place, configs: None, trained: list[Any],
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("accuracy", "--data_sets", encoded.data, "--models", "gnb")
    run(*argv, "--seeds", 2)
    monkeypatch.setitem(recipes.RECIPES, ("data", "gnb"), ("--lr=0.1", [7, 8]))
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
    monkeypatch.setitem(recipes.CONFIGS, "cnn-taught", recipes.CONFIGS["cnn"])
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
    make_model("BERT", bert, [example.sentence for example in TsvReader(source / "train.txt")])
    monkeypatch.setitem(recipes.CONFIGS, "cnn-taught", recipes.CONFIGS["cnn"])
    flags = "--n_iter=2 --analyzer=hanta"
    one = {"teachers": [(recipes.TEACHER, 1)], "augment_flags": flags}
    two = {"teachers": [(recipes.TEACHER, 1), ("minilm-cnn", 1)], "augment_flags": flags}
    for model in recipes.TAUGHT:
        monkeypatch.setitem(recipes.TAUGHT, model, two if model == "minilm-cls-taught" else one)
    for model in ("minilm-3-augmented", "minilm-3-pruned"):
        flags = recipes.RECIPES["sst2", model][0].replace("0,2,4", "0").replace("heads=6", "heads=1")
        monkeypatch.setitem(recipes.RECIPES, ("sst2", model), (flags.replace("dim=512", "dim=8"), [1]))
    students = ("cnn-taught", "minilm-3-augmented", "minilm-3-pruned")
    models = ("minilm-cls", "minilm-cnn", "minilm-cls-taught", *students)
    for model in models:
        if model != "cnn-taught":
            monkeypatch.setitem(recipes.CONFIGS, model, str(ROOT / recipes.CONFIGS[model]))
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
    found = result("chain")
    assert "| a sentence | minilm-cls | cnn-taught | minilm-3-augmented | minilm-3-pruned |" in capsys.readouterr().out
    sizes = {(point["model"], point["form"]): point["mb"] for point in found["points"]}
    assert sizes["minilm-3-pruned", "ONNX"] < sizes["minilm-3-augmented", "ONNX"] < sizes["minilm-cls", "ONNX"]
    assert Path("results/chain.png").read_bytes().startswith(b"\x89PNG")


def test_the_code_hash_is_of_definitions_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(helpers, "ROOT", tmp_path)

    def hashed(*texts: str) -> str:
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.py").write_text(text)
        return helpers.code_hash(tuple(f"{number}.py" for number in range(len(texts))))

    f, g = "def f():\n    return 1\n", "def g():\n    return 2\n"
    first = hashed(f, g)
    dressed = '"""A module."""\nimport os\ndef f():\n    "Says."\n    from a import b\n    return 1'
    assert hashed(dressed, f"# why\n\n{g}") == first
    assert hashed(f"from elsewhere import h\n{g}", f) == hashed("", f + g) == first  # moved
    assert len({first, hashed(f, g.replace("2", "3")), hashed(f)}) == 3


def test_recipes_are_whole(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    for (data_set, model), (flags, seeds) in recipes.RECIPES.items():
        assert data_set in recipes.DATA_SETS and (ROOT / recipes.CONFIGS[model]).is_file() and seeds
        script = fastformers if {"--do_distill", "--do_prune"} & set(flags.split()) else train
        named = re.sub(r"\{(.*?)\}", str(tmp_path / "model"), flags)
        assert set(re.findall(r"\{(.*?)\}", flags)) <= {*recipes.CONFIGS, "augmented"}
        script.get_params([f"--config={ROOT / recipes.CONFIGS[model]}", *named.split()])
    for teaching in recipes.TAUGHT.values():
        assert {model for model, _ in teaching["teachers"]} <= set(recipes.CONFIGS)
        augment_data.get_params(["--input=a", "--output=b", *teaching["augment_flags"].split()])


def test_a_kept_run_of_another_recipe_is_moved_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    accuracy.keep_run(folder, "a", force=False)
    (folder / "model.pt.state").touch()
    for force in (False, True):
        accuracy.keep_run(folder, "a", force)
        assert (folder / "model.pt.state").exists()  # cut off: goes on
    accuracy.keep_run(folder, "b", force=False)
    assert (tmp_path / "run.previous/model.pt.state").exists() and not (folder / "model.pt.state").exists()
    (folder / "model.pt.train.json").touch()
    accuracy.keep_run(folder, "b", force=False)
    assert (folder / "model.pt.train.json").exists()
    accuracy.keep_run(folder, "b", force=True)
    assert (tmp_path / "run.previous.2/model.pt.train.json").exists()


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_learn_and_their_settings_are_chosen_on_valid(name: str, tmp_path: Path) -> None:
    if name == "fastText":
        pytest.importorskip("fasttext")
    for split, count in (("train", 600), ("valid", 100), ("test", 100)):
        lines = (ROOT / "data/sample" / f"{split}.txt").read_text(encoding="utf-8").splitlines(True)[:count]
        (tmp_path / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    fit, settings = baselines.BASELINES[name]
    weak = {"C": 1e-6} if "C" in settings[0] else {"epoch": 1, "lr": 1e-4, "dim": 50}
    good = {"C": 1.0} if "C" in settings[0] else {"epoch": 50, "lr": 0.5, "dim": 50}
    row = baselines.tune(fit, [weak, good], tmp_path)
    assert row["setting"] == good and row["accuracy"] > 0.5 and row["examples"] == 100
    again = baselines.tune(fit, [good], tmp_path)
    assert again["correct"] == row["correct"]


def test_a_setting_that_diverges_is_passed_over(raw: Place) -> None:
    def fit(setting: dict[str, Any], train: baselines.Examples, folder: Path) -> Any:
        if setting["lr"] > 1:
            raise RuntimeError("Encountered NaN.")
        return lambda sentence: "PlayMusic"

    assert baselines.tune(fit, [{"lr": 2}, {"lr": 1}], raw.data)["setting"] == {"lr": 1}


