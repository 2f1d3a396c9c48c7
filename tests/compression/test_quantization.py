"""int8 in PyTorch: names kept, runs resumed, kernels that compute what training saw, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make_model
from cases import make_case
from conftest import Place
from helpers import ENCODERS, ROOT, refusal, same_weights, write_config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import evaluate
import preprocess
import train
from compression.quantization import (
    CompiledGraph,
    FakeProduct,
    Int8Product,
    channel_axis,
    kind_of,
    matrix_weights,
    products,
    quantize,
    scales_of,
    weight_scale,
)
from dataset import EncodedData, pad
from model import TransformerEmbedding, build_model, load_classifier
from pretrained.loading import load_pretrained
from util import load_checkpoint

TRAINED_WAYS = ("qat", "qat_fx", "diffq")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are exported: compiling one takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The confusion picture is test_evaluate.py's."""
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *_: None)


def results(model: Path) -> dict[str, Any]:
    """What evaluation wrote of itself."""
    return json.loads(Path(f"{model}.test.json").read_text())


def predicted(data: Path, kind: str = "pred") -> list[str]:
    """The predictions of test.txt."""
    return [line.split("\t")[2] for line in (data / f"test.txt.{kind}").read_text().splitlines()]


def share(said: str) -> float:
    """The percentage of int8 weights that the log names last."""
    return float(re.findall(r"\[int8\] ([\d.]+) % of the \d+ weights", said)[-1])


# --------------------------------------------------------------------------------------------------------- products


def made_products() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A product of each kind, and the shape of an input."""
    torch.manual_seed(0)
    made = {
        "linear": (nn.Linear(24, 10), (3, 7, 24)),
        "without bias": (nn.Linear(24, 10, bias=False), (5, 24)),
        "transposed": (Conv1D(10, 24), (3, 7, 24)),
        "width 1": (nn.Conv1d(24, 10, 1), (3, 24, 7)),
        "width 5": (nn.Conv1d(24, 10, 5, padding=4), (3, 24, 7)),
        "strided": (nn.Conv1d(24, 10, 3, stride=2, padding=1), (3, 24, 7)),
        "same": (nn.Conv1d(24, 10, 3, padding="same", bias=False), (1, 24, 7)),
        "groups": (nn.Conv1d(24, 12, 3, padding=1, groups=3), (3, 24, 7)),
    }
    for module, _ in made.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("name", [*made_products()])
def test_int8_computes_what_fake_quantization_does(name: str) -> None:
    module, shape = made_products()[name]
    x = 3 * torch.randn(shape) + 1
    plain, fake = copy.deepcopy(module), copy.deepcopy(module)
    FakeProduct.turn(fake)
    expected = fake.train()(x)
    scale, zero_point = fake.input_grid()
    entry = {"weight_scale": weight_scale(fake), "scale": scale.item(), "zero_point": int(zero_point)}
    static, dynamic = copy.deepcopy(module), copy.deepcopy(module)
    Int8Product.turn(static, entry)
    Int8Product.turn(dynamic)
    with torch.inference_mode():
        assert torch.equal(fake.eval()(x), expected)
        size = expected.abs().max().item()
        torch.testing.assert_close(static(x), expected, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(dynamic(x), expected, rtol=0, atol=0.02 * size)
        assert 0 < (plain(x) - expected).abs().max() < 0.05 * size
    assert static.state_dict() == {}


def test_the_scales_mean_what_is_said_of_them() -> None:
    for name, (module, shape) in made_products().items():
        x = torch.randn(shape) - 0.5
        fake = copy.deepcopy(module)
        FakeProduct.turn(fake)
        expected = fake.train()(x)
        scale, zero = fake.input_grid()
        weight, axis = module.weight.detach(), channel_axis(module)
        sizes = [1] * weight.ndim
        sizes[axis] = -1
        scales = weight_scale(fake).view(sizes)
        levels = (weight / scales).round()
        assert levels.abs().max() == 64 and (levels.abs().transpose(0, axis).flatten(1).amax(1) == 64).all(), name
        with torch.no_grad():
            module.weight.copy_(levels * scales)
            grid = ((x / scale).round() + zero).clamp(0, 255)
            torch.testing.assert_close(module((grid - zero) * scale), expected, rtol=1e-4, atol=1e-4)


def test_no_saturation() -> None:
    """The largest products that can be, all of one sign."""
    module = nn.Linear(512, 8, bias=False)
    nn.init.ones_(module.weight)
    Int8Product.turn(module, {"weight_scale": torch.full((8,), 1 / 64), "scale": 1 / 255, "zero_point": 0})
    with torch.inference_mode():
        torch.testing.assert_close(module(torch.ones(2, 512)), torch.full((2, 8), 512.0))
        torch.testing.assert_close(module(torch.ones(2, 512) * 9), torch.full((2, 8), 512.0))  # clipped


def test_ranges_follow_the_batches_in_training_alone() -> None:
    module, shape = made_products()["linear"]
    FakeProduct.turn(module)
    x = torch.randn(shape)
    module.train()(x)
    first = (module.low.item(), module.high.item())
    assert first == (x.min().item(), x.max().item())
    module.eval()(10 * x)
    assert (module.low.item(), module.high.item()) == first
    module.train()(10 * x)
    assert first[1] < module.high < 10 * first[1]


def test_gradients_pass_the_rounding_and_stop_where_values_are_clipped() -> None:
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    FakeProduct.turn(module)
    module.train()(torch.tensor([[-1.0, 1.0]]))
    x = torch.tensor([[0.3, 7.0]], requires_grad=True)
    module.eval()(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]


def test_what_is_no_product() -> None:
    assert kind_of(nn.Conv1d(8, 8, 3, groups=8)) is None  # depthwise
    assert kind_of(nn.Conv1d(8, 8, 3, padding_mode="circular", padding=1)) is None
    assert kind_of(nn.Conv1d(8, 8, 3, dilation=2)) is None
    assert kind_of(nn.Embedding(3, 3)) is None
    assert len(products(nn.MultiheadAttention(8, 2))) == 0  # it reads its matrices itself


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_at_least_90_percent_of_every_architecture(tmp_path: Path, name: str) -> None:
    folder = make_model(name, tmp_path / "model", ["play some jazz", "call my mother"])
    model = build_model({"enc_class": "cls", "dropout": 0.1}, 4,
                        TransformerEmbedding(load_pretrained(str(folder)), "first")).eval()
    total = sum(weight.numel() for weight in matrix_weights(model).values())
    batch = pad([np.arange(4, 12), np.arange(5, 9)])
    with torch.inference_mode():
        before = model(batch.input_ids, batch.attention_mask)
        covered = sum(module.weight.numel() for module in products(model).values())
        for module in products(model).values():
            Int8Product.turn(module)
        after = model(batch.input_ids, batch.attention_mask)
    assert covered >= 0.9 * total
    assert 0 < (after - before).norm() < 0.2 * before.norm()


# --------------------------------------------------------------------------------------------------- through the stages


@pytest.mark.parametrize("way", TRAINED_WAYS)
@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "gnb"])
def test_word_models(encoded: Place, encoder: str, way: str, caplog: pytest.LogCaptureFixture,
                     uncompiled: None) -> None:
    caplog.set_level(logging.INFO)
    write_config(encoded.config, encoder)
    train.main(encoded.train_flags("--epoch=1"))
    names = load_checkpoint(encoded.model).model.keys()
    train.main(encoded.train_flags("--epoch=6", f"--enable_{way}"))
    checkpoint = load_checkpoint(encoded.model)
    assert checkpoint.model.keys() == names
    assert checkpoint.quantization["way"] == way
    trained = json.loads(Path(f"{encoded.model}.train.json").read_text())
    check_ways(encoded.model, encoded.data, encoded.evaluate_flags(), way, trained, caplog)


@pytest.mark.parametrize("way", TRAINED_WAYS)
def test_transformers(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture, uncompiled: None) -> None:
    caplog.set_level(logging.INFO)
    name = {"qat": "SqueezeBERT", "qat_fx": "DistilBERT", "diffq": "BART"}[way]  # BART's tables have several names
    case = make_case(tmp_path / "case", name)
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=6", f"--enable_{way}"))
    check_ways(case.root / "model.pt", case.root / "data", case.evaluate_flags(), way, case.results("train"), caplog)
    # The folder is that of an fp32 model: the same names, the same weights.
    saved = load_pretrained(str(case.root / "out")).state_dict()
    own = load_classifier(load_checkpoint(case.root / "model.pt"), []).embedding.transformer.state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
    evaluate.main(case.evaluate_flags(f"--bert_output_dir={case.root / 'out'}"))


def check_ways(model: Path, data: Path, flags: list[str], way: str, trained: dict[str, Any],
               caplog: pytest.LogCaptureFixture) -> None:
    """A trained model as fp32, in its own way and as dynamic int8, from encoded and from raw text."""
    checkpoint = load_checkpoint(model)
    valid = EncodedData(data / f"valid.txt.{checkpoint.run.encoding.kind}")

    def loss(way: str | None) -> float:
        classifier: Any = load_classifier(checkpoint, [str(data)]).eval()
        if way:
            classifier = quantize(classifier, way, checkpoint, 16)
        rows = [np.asarray(valid.token_ids[a:b]) for a, b in zip(valid.offsets, valid.offsets[1:], strict=False)]
        batches = [pad(rows[start : start + 16]) for start in range(0, len(rows), 16)]
        with torch.inference_mode():
            logits = torch.cat([classifier(batch.input_ids, batch.attention_mask) for batch in batches])
        return nn.functional.cross_entropy(logits, torch.as_tensor(valid.class_ids()).long()).item()

    # Training measured the quantized model; evaluation's kernels compute the same.
    best = trained["best"]["valid_loss"]
    assert loss(way) == pytest.approx(best, abs=2e-3)
    assert loss(None) != pytest.approx(best, abs=1e-7)
    answers = {}
    for flag in ("", "--enable_dqm", f"--enable_{way}"):
        caplog.clear()
        for mode, kind in (("--batch_size=1", "pred"), ("--enable_inference", "inference")):
            evaluate.main([*flags, mode, *([flag] if flag else [])])
            answers[flag, kind] = predicted(data, kind)
        assert answers[flag, "pred"] == answers[flag, "inference"]
        changed = sum(one != other for one, other in zip(answers["", "pred"], answers[flag, "pred"], strict=True))
        assert changed <= 2, flag
        if flag:
            assert results(model)["changed"] == pytest.approx(changed / len(answers[flag, "pred"]))
            assert "of the predictions differ from those of fp32" in caplog.text
        if flag == "--enable_diffq":
            assert re.search(r"\[DiffQ\] [\d.]+ MB compressed, in fp32 [\d.]+ MB", caplog.text)
        elif flag:
            assert share(caplog.text) >= 90.0


@pytest.mark.parametrize("flags", [["--enable_qat"], ["--enable_qat_fx", "--ema_decay=0.9"],
                                   ["--enable_diffq", "--diffq_penalty=1"]])
def test_resume(encoded: Place, flags: list[str]) -> None:
    flags = encoded.train_flags("--epoch=3", "--eval_and_save_steps=4", "--embedding_trainable", *flags)
    train.main(flags)
    shutil.copy(encoded.model, encoded.root / "whole.pt")
    from training import trainer

    class Killed(Exception):
        pass

    original, calls = trainer.Trainer.evaluate_and_save, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(self.step)
        if len(calls) == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "evaluate_and_save", killed)
        with pytest.raises(Killed):
            train.main(flags)
    plain = [flag for flag in flags if not flag.startswith("--enable")]
    assert "other flags" in refusal(train.main, *plain, "--resume")
    train.main([*flags, "--resume"])
    assert same_weights(encoded.model, encoded.root / "whole.pt")
    one, other = (load_checkpoint(path).quantization for path in (encoded.model, encoded.root / "whole.pt"))
    assert flatten(one) == flatten(other)


def flatten(entry: Any) -> Any:
    """Tensors as lists, so that == compares."""
    if isinstance(entry, dict):
        return {key: flatten(value) for key, value in entry.items()}
    return entry.tolist() if isinstance(entry, Tensor) else entry


def test_the_penalty_makes_models_smaller(encoded: Place) -> None:
    sizes = []
    for penalty in (0, 1000):
        train.main(encoded.train_flags("--epoch=9", "--measure=last", "--enable_diffq", f"--diffq_penalty={penalty}"))
        sizes.append(load_checkpoint(encoded.model).quantization["size_mb"])
    assert sizes[1] < sizes[0]
    model = load_classifier(load_checkpoint(encoded.model), [str(encoded.data)])
    assert sizes[0] < sum(4 * p.numel() for p in model.parameters()) / 2**20 / 2


def test_training_goes_on_from_an_fp32_model(trained: Place) -> None:
    before = json.loads(Path(f"{trained.model}.train.json").read_text())["best"]["valid_loss"]
    shutil.copy(trained.model, trained.root / "fp32.pt")
    train.main(trained.train_flags("--enable_qat", f"--restore_path={trained.root / 'fp32.pt'}", "--epoch=1",
                                   "--lr=1e-4"))
    assert json.loads(Path(f"{trained.model}.train.json").read_text())["best"]["valid_loss"] < before + 0.05


def test_bfloat16(encoded: Place) -> None:
    train.main(encoded.train_flags("--enable_qat", "--mixed_precision=bf16"))
    evaluate.main(encoded.evaluate_flags("--enable_qat"))


def test_gradient_checkpointing_sees_a_batch_once(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "BERT")
    preprocess.main(case.flags())
    scales = []
    for more in ([], ["--gradient_checkpointing"]):
        train.main(case.train_flags("--max_train_steps=3", "--enable_qat", *more))
        scales.append(scales_of(load_checkpoint(case.root / "model.pt")))
    for name, entry in scales[0].items():
        assert entry["scale"] == pytest.approx(scales[1][name]["scale"], rel=1e-3)


@pytest.mark.parametrize("way", ["qat", "diffq"])
def test_frozen_transformers(tmp_path: Path, way: str) -> None:
    case = make_case(tmp_path / "case", "BERT")
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=1", "--bert_use_feature_based", f"--enable_{way}"))
    frozen = load_classifier(load_checkpoint(case.root / "model.pt"), []).embedding.transformer.state_dict()
    before = load_pretrained(str(case.root / "model")).state_dict()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    entry = load_checkpoint(case.root / "model.pt").quantization
    transformers = [name for name in entry["scales" if way == "qat" else "tensors"] if "transformer" in name]
    assert bool(transformers) == (way == "qat")  # nothing says how many bits a frozen weight needs
    evaluate.main(case.evaluate_flags(f"--enable_{way}"))


# ------------------------------------------------------------------------------------------------------- graph mode


@pytest.fixture
def qat(encoded: Place) -> Place:
    """A CNN trained with QAT."""
    train.main(encoded.train_flags("--enable_qat_fx", "--epoch=6"))
    return encoded


def test_compiled(qat: Place, caplog: pytest.LogCaptureFixture) -> None:
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    caplog.set_level(logging.INFO)
    evaluate.main(qat.evaluate_flags("--enable_qat"))
    expected = predicted(qat.data)
    evaluate.main(qat.evaluate_flags("--enable_qat_fx"))
    assert predicted(qat.data) == expected
    assert re.search(r"\[graph\] exported in [\d.]+ s, compiled in [\d.]+ s", caplog.text)
    assert "not compiled" not in caplog.text and share(caplog.text) >= 90.0


def test_without_a_compiler(qat: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
                            tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    torch._dynamo.reset()
    evaluate.main(qat.evaluate_flags("--enable_qat_fx"))
    assert "not compiled" in caplog.text and "No working C++ compiler" in caplog.text
    fast = predicted(qat.data)
    evaluate.main(qat.evaluate_flags("--enable_qat"))
    assert predicted(qat.data) == fast


@pytest.mark.parametrize("size", [1, 5])
def test_graphs_take_batches_of_any_shape(qat: Place, uncompiled: None, size: int) -> None:
    checkpoint = load_checkpoint(qat.model)
    eager, graph = (quantize(load_classifier(checkpoint, [str(qat.data)]).eval(), way, checkpoint, size)
                    for way in ("qat", "qat_fx"))
    assert isinstance(graph, CompiledGraph)
    for count in range(1, size + 1):
        for length in (1, 2, 3, 9, 100):
            batch = pad([(np.arange(length - length * n // 7) + n) % 20 for n in range(count)])
            with torch.inference_mode():
                together = eager(batch.input_ids, batch.attention_mask)
                torch.testing.assert_close(graph(batch.input_ids, batch.attention_mask), together, rtol=1e-4, atol=1e-4)
                own = batch.input_ids[-1:, : int(batch.attention_mask[-1].sum())]
                alone = eager(own, torch.ones_like(own, dtype=torch.bool))
            torch.testing.assert_close(alone, together[-1:], rtol=1e-3, atol=1e-3)  # padding is masked in int8, too


# --------------------------------------------------------------------------------------------------------- accuracy


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """data/sample with a CNN's config."""
    place = Place(tmp_path_factory.mktemp("sample"))
    shutil.copytree(ROOT / "data/sample", place.data, ignore=shutil.ignore_patterns("*.*.*", "*.npy"))
    write_config(place.config, token_emb_dim=64, num_filters=48, kernel_sizes=[2, 3, 4], fc_hidden_size=64)
    preprocess.main([f"--config={place.config}", f"--data_dir={place.data}", "--embedding_path=none"])
    return place


@pytest.mark.parametrize("flags", [[], ["--enable_qat"]])
def test_at_most_half_a_point_is_lost(sample: Place, flags: list[str]) -> None:
    train.main(sample.train_flags("--batch_size=64", "--lr=4e-3", "--epoch=4", "--embedding_trainable", *flags))
    accuracies = {}
    for way in ("", "--enable_dqm", *flags):
        evaluate.main(sample.evaluate_flags("--batch_size=1", *([way] if way else [])))
        accuracies[way] = results(sample.model)["accuracy"]
    assert accuracies[""] > 0.75, accuracies
    assert all(accuracy >= accuracies[""] - 0.005 for accuracy in accuracies.values()), accuracies


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(("flags", "said"), [
    (["--enable_qat", "--enable_diffq"], "--enable_qat and --enable_diffq: choose one of them"),
    (["--enable_qat", "--enable_qat_fx"], "choose one of them"),
    (["--enable_qat", "--compile"], "do not go together"),
    (["--enable_diffq", "--diffq_penalty=-1"], "diffq_penalty"),
    (["--enable_diffq", "--gradient_checkpointing"], "draws noise"),
])
def test_training_that_makes_no_sense(encoded: Place, flags: list[str], said: str) -> None:
    assert said in refusal(train.main, *encoded.train_flags(*flags))


def test_no_matrices_to_quantize(encoded: Place) -> None:
    write_config(encoded.config, "gnb")
    for way in TRAINED_WAYS:
        assert "no matrices to quantize" in refusal(train.main, *encoded.train_flags(f"--enable_{way}"))
    assert not encoded.model.exists()
    train.main(encoded.train_flags("--epoch=1"))
    for way in ("dqm", *TRAINED_WAYS):
        assert "no matrices to quantize" in refusal(evaluate.main, *encoded.evaluate_flags(f"--enable_{way}"))


def test_a_way_that_the_model_was_not_trained_in(trained: Place) -> None:
    flags = trained.evaluate_flags()
    for way in ("qat", "qat_fx"):
        assert "not trained with --enable_qat or --enable_qat_fx." in refusal(evaluate.main, *flags, f"--enable_{way}")
    assert "not trained with --enable_diffq." in refusal(evaluate.main, *flags, "--enable_diffq")
    assert "choose one of them" in refusal(evaluate.main, *flags, "--enable_dqm", "--enable_qat")
    assert "runs on the CPU" in refusal(evaluate.main, *flags, "--device=cuda", "--enable_dqm")
    train.main(trained.train_flags("--enable_qat", "--epoch=1"))
    assert "but with --enable_qat" in refusal(evaluate.main, *flags, "--enable_diffq")
    train.main(trained.train_flags("--enable_diffq", "--epoch=1"))
    assert "but with --enable_diffq" in refusal(evaluate.main, *flags, "--enable_qat")


def test_diffq_is_imported_where_it_is_asked_for(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "diffq"]:
        monkeypatch.delitem(sys.modules, name)
    train.main(encoded.train_flags("--enable_diffq", "--epoch=1"))
    for name in [name for name in sys.modules if name.split(".")[0] == "diffq"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffq", None)  # as if it were not installed
    assert "CC BY-NC 4.0" in refusal(train.main, *encoded.train_flags("--enable_diffq"))
    train.main(encoded.train_flags("--enable_qat", "--epoch=1"))
    train.main(encoded.train_flags("--epoch=1"))


def test_diffq_models_are_evaluated_without_the_package(encoded: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(encoded.train_flags("--enable_diffq"))
    monkeypatch.setitem(sys.modules, "diffq", None)
    for size in (1, 7):
        evaluate.main(encoded.evaluate_flags("--enable_diffq", f"--batch_size={size}"))
