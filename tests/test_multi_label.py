"""Several labels a sentence, or none: through all stages, with every encoder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, make_case, onnx_flags
from conftest import Place
from helpers import ENCODERS, make_vectors, refusal, same_weights, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import fastformers
import import_data
import preprocess
import train
from evaluate import TorchClassifier
from sentence_classifier import load
from sentence_classifier.decisions import Decision
from text.evaluation_report import LabelSetReport
from training.losses import balanced_label_weights, choose_thresholds, divergence, make_criterion
from training.trainer import Trainer

PHRASES = {"music": ["play some jazz", "put on a song"], "weather": ["will it rain", "is it cold outside"],
           "table": ["book a table for two", "reserve a table"]}
IDLE = ["thank you", "well then", "hello there"]


def make_lines(count: int, seed: int, separator: str = "|") -> list[str]:
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        labels = [name for name in PHRASES if draw.random() < 0.4]
        parts = [draw.choice(PHRASES[name]) for name in labels] + [draw.choice(IDLE)]
        draw.shuffle(parts)
        lines.append(f"{' and '.join(parts)}\t{separator.join(labels)}\n")
    return lines


def make_place(root: Path, encoder: str = "cnn", **config: Any) -> Place:
    place = Place(root)
    place.data.mkdir(parents=True)
    for name, count in (("train.txt", 300), ("valid.txt", 80), ("test.txt", 80)):
        (place.data / name).write_text("".join(make_lines(count, count + len(name))), encoding="utf-8")
    make_vectors(place.vectors)
    write_config(place.config, encoder, multi_label=True, **config)
    return place


def results(place: Place) -> dict[str, Any]:
    return json.loads(Path(f"{place.model}.test.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_through_all_stages(tmp_path: Path, encoder: str, caplog: pytest.LogCaptureFixture,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level("INFO")
    place = make_place(tmp_path / "place", encoder)
    preprocess.main(place.preprocess_flags())
    assert "sentences have no label" in caplog.text
    train.main(place.train_flags("--epoch=12", "--measure=accuracy", "--embedding_trainable"))
    assert "valid micro F1" in caplog.text
    evaluate.main(place.evaluate_flags())
    found = results(place)
    assert found["micro_f1"] > 0.9 and 0.7 < found["accuracy"] <= 1 and set(found["per_class"]) == set(PHRASES)
    assert "[micro F1] : " in caplog.text and "micro avg" in capsys.readouterr().out
    rows = [line.split("\t") for line in (place.data / "test.txt.pred").read_text().splitlines()]
    right = [set(label.split("|")) == set(answer.split("|")) for _, label, answer in rows]
    assert sum(right) / len(right) == pytest.approx(found["accuracy"])
    flags = onnx_flags(place.root)
    evaluate.main([*flags, "--convert_onnx", *(["--quantize_onnx"] if encoder != "gnb" else [])])
    own = TorchClassifier(place.model, "cpu")
    for path in ("model.onnx", "int8.onnx")[: 1 if encoder == "gnb" else 2]:
        other = load(place.root / path)
        assert other.decision == own.decision and len(own.decision.thresholds) == 3
        sentences = [sentence for sentence, *_ in rows]
        same = [one.labels == another.labels for one, another in zip(own.predict(sentences), other.predict(sentences),
                                                                      strict=True)]
        assert np.mean(same) > (0.999 if path == "model.onnx" else 0.9)
        evaluate.main([*flags, "--enable_ort", "--enable_inference", *(["--quantize_onnx"] if "int8" in path else [])])
    prediction = load(place.root / "model.onnx").predict("thank you")
    assert prediction.labels == () and prediction.label in PHRASES and max(prediction.probabilities.values()) < 0.5


@pytest.fixture(scope="module")
def place_once(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A trained CNN. Not to be changed."""
    place = make_place(tmp_path_factory.mktemp("several") / "place")
    preprocess.main(place.preprocess_flags())
    train.main(place.train_flags("--epoch=6"))
    return place


@pytest.fixture
def place(place_once: Place, tmp_path: Path) -> Place:
    """A trained CNN of the test's own."""
    return place_once.copy(tmp_path / "place")


@pytest.mark.parametrize("mode", ["dqm", "qat", "diffq"])
def test_ways_of_int8(place: Place, mode: str) -> None:
    if mode != "dqm":
        train.main(place.train_flags("--epoch=6", f"--enable_{mode}"))
    evaluate.main(place.evaluate_flags(f"--enable_{mode}"))
    found = results(place)
    assert found["micro_f1"] > 0.8 and 0 <= found["changed"] < 0.2 and 0.8 < found["fp32_accuracy"] <= 1


def test_a_resumed_run_is_the_same(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place.copy(tmp_path / "other")
    train.main(place.train_flags("--epoch=3"))
    own, seen = Trainer.evaluate_and_save, []

    def dies_at_the_second(self: Trainer, *arguments: Any, **options: Any) -> None:
        own(self, *arguments, **options)
        seen.append(self)
        if len(seen) == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "evaluate_and_save", dies_at_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        train.main(other.train_flags("--epoch=3"))
    monkeypatch.undo()
    train.main(other.train_flags("--epoch=3", "--resume"))
    assert same_weights(place.model, other.model)
    one, two = (TorchClassifier(path, "cpu").decision for path in (place.model, other.model))
    assert one == two


def test_the_flag_does_as_the_config(place: Place) -> None:
    write_config(place.config)
    assert "empty" in refusal(preprocess.main, *place.preprocess_flags())
    preprocess.main(place.preprocess_flags("--multi_label"))
    train.main(place.train_flags("--epoch=1"))
    evaluate.main(place.evaluate_flags(f"--config={place.config}"))
    assert results(place)["config"]["multi_label"] is True


def test_another_separator(place: Place) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        path = place.data / name
        path.write_text(path.read_text().replace("|", " ; "))
    preprocess.main(place.preprocess_flags("--label_separator=;"))
    train.main(place.train_flags("--epoch=6"))
    evaluate.main(place.evaluate_flags())
    assert set(results(place)["per_class"]) == set(PHRASES)
    answers = [line.split("\t")[2] for line in (place.data / "test.txt.pred").read_text().splitlines()]
    assert any(";" in answer for answer in answers) and not any("|" in answer for answer in answers)


def test_unknown_labels_count_as_errors(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    path = place.data / "test.txt"
    path.write_text("play some jazz\tmusic|opera\nwill it rain\tweather\n")
    preprocess.main(place.preprocess_flags())
    assert "1 sentences have a label that train.txt lacks ('opera')" in caplog.text
    evaluate.main(place.evaluate_flags())
    found = results(place)
    assert found["examples"] == 2 and found["accuracy"] <= 0.5 and found["per_class"]["opera"]["support"] == 1


def test_one_label_data_are_refused(place: Place) -> None:
    write_config(place.config)
    (place.data / "train.txt").write_text("play\tmusic\nrain\tweather\n" * 20)
    (place.data / "valid.txt").write_text("play\tmusic\nrain\tweather\n")
    (place.data / "test.txt").write_text("play\tmusic\nrain\tweather\n")
    preprocess.main(place.preprocess_flags())
    write_config(place.config, multi_label=True)
    assert "encoded with one label a sentence" in refusal(train.main, *place.train_flags())


def test_lines_and_tables(place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Path("in.txt").write_text("play some jazz and will it rain\nthank you\n")
    evaluate.main(place.evaluate_flags("--input_path=in.txt"))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert set(found[0]["labels"]) == {"music", "weather"} and found[1]["labels"] == [] and "label" not in found[0]
    Path("in.jsonl").write_text('{"text": "play some jazz and will it rain", "intents": ["weather", "music"]}\n'
                                '{"text": "thank you", "intents": []}\n')
    evaluate.main(place.evaluate_flags("--input_path=in.jsonl", "--output_path=out.csv", "--label_column=intents"))
    header, one, two = Path("out.csv").read_text().splitlines()
    assert header == "text,intents,labels,label,probability" and "music|weather" in one
    assert "[Accuracy] : 1.0000,     2/    2" in caplog.text


def test_teaching_by_logits(place: Place) -> None:
    sentences = [line.split("\t")[0] for line in make_lines(120, 9)]
    (place.data / "augmented.raw").write_text("".join(f"{sentence}\tdummy\n" for sentence in sentences))
    preprocess.main(place.preprocess_flags("--augmented"))
    evaluate.main(place.evaluate_flags("--augmented", "--batch_size=16"))
    (place.data / "augmented.raw.pred").rename(place.data / "augmented.txt")
    preprocess.main(place.preprocess_flags("--augmented", "--augmented_filename=augmented.txt"))
    for criterion in ("MSELoss", "CrossEntropyLoss", "KLDivLoss"):
        train.main(place.train_flags("--augmented", f"--criterion={criterion}", "--epoch=8"))
        evaluate.main(place.evaluate_flags())
        assert results(place)["micro_f1"] > 0.8, criterion


def test_a_transformer_is_trained_and_distilled(tmp_path: Path) -> None:
    case: Case = make_case(tmp_path / "case", "BERT", "cls")
    for name, count in (("train.txt", 300), ("valid.txt", 80), ("test.txt", 80)):
        (case.root / "data" / name).write_text("".join(make_lines(count, count)), encoding="utf-8")
    config = json.loads((case.root / "config.json").read_text())
    (case.root / "config.json").write_text(json.dumps({**config, "multi_label": True}))
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=12", "--measure=accuracy", "--rdrop=1", "--class_weights=balanced"))
    evaluate.main(case.evaluate_flags())
    assert case.results("test")["micro_f1"] > 0.8
    evaluate.main([*onnx_flags(case.root), "--convert_onnx", "--quantize_onnx"])
    (case.root / "teacher").mkdir()
    teacher = (case.root / "model.pt").rename(case.root / "teacher/model.pt")
    fastformers.main(case.train_flags("--do_distill", f"--teacher_model_path={teacher}", "--epoch=6"))
    evaluate.main(case.evaluate_flags())
    assert case.results("test")["micro_f1"] > 0.7
    assert "meta pseudo labels are one a sentence" in refusal(
        fastformers.main, *case.train_flags("--do_distill", f"--teacher_model_path={teacher}", "--epoch=1",
                                            f"--mpl_data_path={case.root / 'data/test.txt'}"))


def test_lists_and_separators_are_imported(tmp_path: Path) -> None:
    records = []
    for line in make_lines(200, 3):
        sentence, labels = line.removesuffix("\n").split("\t")
        records.append({"text": sentence, "intents": labels.split("|") if labels else []})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    table = tmp_path / "in.csv"
    table.write_text("text,labels\n" + "".join(f"{record['text']},{' ; '.join(record['intents'])}\n"
                                               for record in records))
    import_data.main([f"--input={path}", "--multi_label", f"--output_dir={tmp_path / 'a'}"])
    import_data.main([f"--input={table}", "--multi_label", "--label_separator=;", f"--output_dir={tmp_path / 'b'}"])
    for name in ("train.txt", "valid.txt", "test.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sum(len((tmp_path / "a" / name).read_text().splitlines()) for name in ("train.txt", "valid.txt",
                                                                                   "test.txt")) == 200
    assert "if sentences may have several, pass --multi_label" in refusal(
        import_data.main, f"--input={tmp_path / 'in.jsonl'}", f"--output_dir={tmp_path / 'c'}")


# ------------------------------------------------------------------------------------------------------------ parts


def test_losses() -> None:
    torch.manual_seed(0)
    logits, sets = torch.randn(5, 4), torch.rand(5, 4) < 0.4
    plain = make_criterion("CrossEntropyLoss", multi_label=True)
    wanted = torch.nn.BCEWithLogitsLoss(reduction="none")(logits, sets.float()).mean(1)
    torch.testing.assert_close(plain(logits, sets), wanted)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weighed = make_criterion("CrossEntropyLoss", weights, multi_label=True)
    wanted = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=weights)(logits, sets.float()).mean(1)
    torch.testing.assert_close(weighed(logits, sets), wanted)
    teacher = torch.randn(5, 4)
    divergent = make_criterion("KLDivLoss", temperature=2.0, multi_label=True)
    torch.testing.assert_close(divergent(teacher, teacher), torch.zeros(5), atol=1e-6, rtol=0)
    assert (divergent(logits, teacher) > 0).all()
    p, q = (torch.distributions.Bernoulli(logits=x) for x in (logits, teacher))
    both = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(divergence(logits, teacher, True), both.mean(1))
    assert balanced_label_weights(np.array([[1, 0], [0, 0], [1, 0], [0, 1]] * 20, dtype=bool)).tolist() == [1.0, 3.0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32))
def test_thresholds_are_the_best(seed: int) -> None:
    random = np.random.default_rng(seed)
    probabilities = torch.from_numpy(random.random((60, 3)).round(2)).float()
    goals = torch.from_numpy(random.random((60, 3)) < probabilities.numpy() ** 2)

    def f1(chosen: torch.Tensor, goals: torch.Tensor) -> float:
        return float(2 * (chosen & goals).sum() / max(1, int(chosen.sum() + goals.sum())))

    for label, threshold in enumerate(choose_thresholds(probabilities, goals)):
        if goals[:, label].sum() < 5:
            continue
        best = max(f1(probabilities[:, label] >= one - 0.005, goals[:, label]) for one in np.arange(0, 1.01, 0.01))
        assert f1(probabilities[:, label] >= threshold, goals[:, label]) == pytest.approx(best, abs=1e-6)


def test_a_report_of_label_sets() -> None:
    targets = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=bool)
    answers = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=bool)
    report = LabelSetReport.of_sets(targets, answers, ("a", "b", "c"), [[], [], [], ["d"]])
    assert (report.correct, report.count) == (2, 4) and report.names == ("a", "b", "c", "d")
    assert report.matrix.tolist() == [[2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert report.micro == (3 / 4, 3 / 5, 6 / 9) and report.macro_f1 == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)
    assert any("b -> c" in line for line in report.lines())


def test_decisions() -> None:
    probabilities = np.array([[0.6, 0.4, 0.2]], dtype=np.float32)
    assert Decision().decide(probabilities).tolist() == [0]
    assert Decision(True).decide(probabilities).tolist() == [[True, False, False]]
    assert Decision(True, (0.7, 0.3, 0.2)).decide(probabilities).tolist() == [[False, True, True]]
    logits = np.array([[0.0, 800.0, -800.0]], dtype=np.float32)
    assert Decision(True).probabilities(logits)[0].tolist() == pytest.approx([0.5, 1, 0])
