"""Structured pruning: importance, removal, and pruned models through the stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from architectures import ARCHITECTURES, HEADS, HIDDEN, INNER, LAYERS, make_model
from cases import Case, make_case
from conftest import Place
from helpers import ROOT, refusal, same_weights, snapshot

import evaluate
import fastformers
import preprocess
import train
from compression import onnx_export as export
from compression.onnx_graph import int8_share
from compression.pruning import Importance, check_targets, measure_importance, prune
from compression.quantization import quantize
from dataset import EncodedData
from model import Classifier, load_classifier
from pretrained.layout import NUM_HEADS, layer_parts, num_heads
from pretrained.loading import build_from_config, load_pretrained
from sentence_classifier.errors import InputError
from util import load_checkpoint

PRUNABLE = ["BERT", "SpanBERT", "TinyBERT", "MiniLM", "DistilBERT", "mDistilBERT", "RoBERTa", "XLM-RoBERTa", "ELECTRA",
            "BORT", "Megatron-BERT"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert_once(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A trained tiny BERT. Not to be changed."""
    case = make_case(tmp_path_factory.mktemp("pruning") / "case", "BERT")
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=4"))
    return case


@pytest.fixture
def bert(bert_once: Case, tmp_path: Path) -> Case:
    """A trained tiny BERT of the test's own."""
    shutil.copytree(bert_once.root, tmp_path / "case")
    return Case(tmp_path / "case")


def load(case: Case, name: str = "model.pt") -> Classifier:
    return load_classifier(load_checkpoint(case.root / name), []).eval()


def answer(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """A classifier's logits or a transformer's last hidden states."""
    ids = torch.arange(4, 16).view(2, 6) if ids is None else ids
    with torch.inference_mode():
        found = model(ids, torch.ones_like(ids, dtype=torch.bool))
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def masked(model: Any, places: dict[Any, torch.Tensor]) -> list[Any]:
    """Multiply the inputs of linear layers by masks; returns the hooks."""
    return [linear.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
            for linear, mask in places.items()]


# ------------------------------------------------------------------------------------------------------- importance


def test_importance_is_the_derivative_by_a_mask(bert_once: Case) -> None:
    """Compared with finite differences of each example's loss, for some heads and units."""
    model = load(bert_once).double()
    data = EncodedData(bert_once.root / "data/valid.txt.fs")
    importance = measure_importance(model, data, 8, CPU)
    assert importance.heads.shape == (LAYERS, HEADS) and importance.units.shape == (LAYERS, INNER)
    size, step = HIDDEN // HEADS, 1e-4

    def losses(linear: Any, mask: torch.Tensor) -> torch.Tensor:
        hooks = masked(model, {linear: mask})
        found = [torch.nn.functional.cross_entropy(answer(model, torch.as_tensor(np.array(row))[None].long()),
                                                   torch.tensor([int(target)]))
                 for row, target in zip(data.rows(range(len(data))), data.targets, strict=True)]
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    def derivative(linear: Any, places: slice) -> float:
        up, down = torch.ones(linear.in_features).double(), torch.ones(linear.in_features).double()
        up[places], down[places] = 1 + step, 1 - step
        return ((losses(linear, up) - losses(linear, down)) / (2 * step)).abs().sum().item()

    parts = layer_parts(model.embedding.transformer)
    for layer, head in ((0, 1), (2, 3)):
        expected = derivative(parts[layer].output, slice(head * size, (head + 1) * size))
        assert importance.heads[layer, head].item() == pytest.approx(expected, rel=1e-4)
    expected = derivative(parts[1].outer, slice(7, 8))
    assert importance.units[1, 7].item() == pytest.approx(expected, rel=1e-4)


def test_neither_batches_nor_padding_matter(bert_once: Case) -> None:
    model, data = load(bert_once), EncodedData(bert_once.root / "data/valid.txt.fs")
    assert len(set(data.lengths)) > 5
    alone, together = (measure_importance(model, data, size, CPU) for size in (1, 60))
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(scores.norm(dim=1), torch.ones(LAYERS)) for scores in alone.normalized())


def test_a_useless_head_and_unit_rank_last(bert_once: Case) -> None:
    model, data = load(bert_once), EncodedData(bert_once.root / "data/valid.txt.fs")
    size = HIDDEN // HEADS
    with torch.no_grad():
        for layer, parts in enumerate(layer_parts(model.embedding.transformer)):
            parts.value.weight[layer * size : (layer + 1) * size] = 0.0
            parts.value.bias[layer * size : (layer + 1) * size] = 0.0
            parts.outer.weight[:, 10 + layer] *= 1e-6
    importance = measure_importance(model, data, 32, CPU)
    assert importance.heads.argmin(1).tolist() == [*range(LAYERS)]
    assert importance.units.argmin(1).tolist() == [10 + layer for layer in range(LAYERS)]
    before = answer(model)
    prune(model.embedding.transformer, importance, HEADS - 1, INNER - 1)
    assert torch.allclose(answer(model), before, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- removal


def random_importance(layers: int, heads: int, units: int) -> Importance:
    generator = torch.Generator().manual_seed(3)
    return Importance(torch.rand(layers, heads, generator=generator), torch.rand(layers, units, generator=generator))


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_every_architecture(tmp_path: Path, name: str) -> None:
    """To remove is to mask, also after a reload; the parameters are as many as computed; or a sentence says why not."""
    model = load_pretrained(str(make_model(name, tmp_path / "model", ["play some jazz"]))).eval()
    if name not in PRUNABLE:
        with pytest.raises(InputError, match="those that can be pruned are BERT, DistilBERT"):
            check_targets(model, 1, 1)
        return
    layers, hidden, size = model.config.num_hidden_layers, model.config.hidden_size, model.config.hidden_size // HEADS
    importance = random_importance(layers, HEADS, INNER)
    masks = {}
    for layer, parts in enumerate(layer_parts(model)):
        heads, units = importance.heads[layer], importance.units[layer]
        masks[parts.output] = (heads > heads.sort().values[0]).float().repeat_interleave(size)
        masks[parts.outer] = (units > units.sort().values[INNER - 21]).float()
    hooks = masked(model, masks)
    expected, count = answer(model), sum(one.numel() for one in model.parameters())
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(answer(model), expected, atol=1e-3)

    prune(model, importance, HEADS - 1, 20)
    assert torch.allclose(answer(model), expected, atol=1e-5)
    removed = layers * (size * (4 * hidden + 3) + (INNER - 20) * (2 * hidden + 1))
    assert sum(one.numel() for one in model.parameters()) == count - removed
    model.save_pretrained(tmp_path / "pruned")
    for again in (load_pretrained(str(tmp_path / "pruned")).eval(), build_from_config(model.config.to_dict()).eval()):
        again.load_state_dict(model.state_dict())
        assert torch.equal(answer(again), answer(model))
    assert torch.equal(answer(load_pretrained(str(tmp_path / "pruned")).eval()), answer(model))
    saved = json.loads((tmp_path / "pruned/config.json").read_text())
    assert saved[NUM_HEADS] == HEADS - 1 and 20 in (saved.get("intermediate_size"), saved.get("hidden_dim"))


def test_five_heads_of_twelve_and_again_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head size stays what it was, also in a model that is pruned twice."""
    monkeypatch.setitem(ARCHITECTURES["BERT"].settings, "num_attention_heads", 12)
    monkeypatch.setitem(ARCHITECTURES["BERT"].settings, "hidden_size", 48)
    model = load_pretrained(str(make_model("BERT", tmp_path / "model", ["play some jazz"]))).eval()
    for before, after in ((12, 5), (5, 2)):
        prune(model, random_importance(LAYERS, before, INNER), after, INNER)
        assert {tuple(parts.query.weight.shape) for parts in layer_parts(model)} == {(4 * after, 48)}
        model.save_pretrained(tmp_path / "pruned")
        again = load_pretrained(str(tmp_path / "pruned")).eval()
        assert torch.equal(answer(again), answer(model))
        model = again


def test_without_this_toolkit(tmp_path: Path) -> None:
    """A folder without some feed-forward units is an ordinary one; one without some heads is refused, not misread."""
    from transformers import AutoModel

    for heads in (HEADS, HEADS - 1):
        model = load_pretrained(str(make_model("BERT", tmp_path / "model", ["play some jazz"]))).eval()
        prune(model, random_importance(LAYERS, HEADS, INNER), heads, 20)
        model.save_pretrained(tmp_path / "pruned")
        if heads == HEADS:
            assert torch.equal(answer(AutoModel.from_pretrained(tmp_path / "pruned").eval()), answer(model))
        else:
            with pytest.raises(RuntimeError, match="mismatch"):
                AutoModel.from_pretrained(tmp_path / "pruned")


def test_what_there_is_already_stays(bert_once: Case) -> None:
    model = load(bert_once)
    before, config = answer(model), model.embedding.transformer.config.to_dict()
    prune(model.embedding.transformer, random_importance(LAYERS, HEADS, INNER), HEADS, INNER)
    assert torch.equal(answer(model), before) and model.embedding.transformer.config.to_dict() == config


@pytest.mark.parametrize(("heads", "units", "said"), [
    (HEADS + 1, 1, f"target_num_heads={HEADS + 1}: the model has {HEADS} attention heads"),
    (1, INNER + 1, f"target_ffn_dim={INNER + 1}: the model has {INNER} feed-forward units")])
def test_more_than_there_is(bert_once: Case, heads: int, units: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_targets(load(bert_once).embedding.transformer, heads, units)


@pytest.mark.parametrize("count", [-1, 99, "six"])
def test_a_config_that_says_what_cannot_be(bert: Case, count: Any) -> None:
    config = json.loads((bert.root / "out/config.json").read_text())
    (bert.root / "out/config.json").write_text(json.dumps({**config, NUM_HEADS: count}))
    with pytest.raises(InputError, match=NUM_HEADS):
        load_pretrained(str(bert.root / "out"))


# ------------------------------------------------------------------------------------------------------- the stages


def prune_flags(case: Case, *more: Any) -> list[str]:
    """fastformers.py --do_prune to three heads and 20 units."""
    return case.train_flags("--do_prune", f"--model_path={case.root / 'model.pt'}", "--target_num_heads=3",
                            "--target_ffn_dim=20", f"--save_path_pruned={case.root / 'pruned.pt'}",
                            f"--bert_output_dir_pruned={case.root / 'pruned'}", *more)


@pytest.fixture(scope="module")
def pruned_once(bert_once: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same with pruned.pt and pruned/. Not to be changed."""
    case = Case(tmp_path_factory.mktemp("pruned") / "case")
    shutil.copytree(bert_once.root, case.root)
    fastformers.main(prune_flags(case))
    return case


@pytest.fixture
def pruned(pruned_once: Case, tmp_path: Path) -> Case:
    """A pruned tiny BERT of the test's own."""
    shutil.copytree(pruned_once.root, tmp_path / "case")
    return Case(tmp_path / "case")


def test_what_pruning_leaves(pruned_once: Case) -> None:
    root = pruned_once.root
    figures = json.loads((root / "pruned.pt.prune.json").read_text())
    before, after = figures["before"], figures["pruned"]
    assert before["parameters"] - after["parameters"] == LAYERS * (8 * (4 * HIDDEN + 3) + 28 * (2 * HIDDEN + 1))
    assert after["mb"] == (root / "pruned.pt").stat().st_size / 1e6 < before["mb"] == (root / "model.pt").stat(
        ).st_size / 1e6
    assert (root / "pruned/model.safetensors").stat().st_size < (root / "out/model.safetensors").stat().st_size
    assert before["accuracy"] == pruned_once.results("train")["best"]["valid_accuracy"]
    assert np.shape(figures["importance_of_heads"]) == (LAYERS, HEADS)
    assert (root / "pruned.pt.importance.png").read_bytes().startswith(b"\x89PNG")
    # What a test of importance says is what was done: of the trained model, the same heads and units.
    data, expected = EncodedData(root / "data/valid.txt.fs"), load(pruned_once)
    prune(expected.embedding.transformer, measure_importance(expected, data, 16, CPU), 3, 20)
    assert torch.allclose(answer(load(pruned_once, "pruned.pt")), answer(expected), atol=1e-6)
    # The pair: the folder holds the same transformer, and carries the same run.
    model = load(pruned_once, "pruned.pt").embedding.transformer
    assert torch.equal(answer(load_pretrained(str(root / "pruned")).eval()), answer(model))
    evaluate.main([f"--model_path={root / 'pruned.pt'}", f"--bert_output_dir={root / 'pruned'}", "--device=cpu"])
    results = json.loads((root / "pruned.pt.test.json").read_text())
    assert results["run_id"] == figures["run_id"] != figures["pruned_run_id"]
    assert "of run" in refusal(evaluate.main, f"--model_path={root / 'pruned.pt'}", f"--bert_output_dir={root / 'out'}")


def test_onnx_and_int8(pruned_once: Case) -> None:
    """Attention is packed, and the last layer computed at one position, as in a whole model."""
    model, data = load(pruned_once, "pruned.pt"), EncodedData(pruned_once.root / "data/test.txt.fs")
    rows = data.rows(range(len(data)))
    graph = export.simplify(export.export_graph(model), 64)
    fused = export.fuse(graph)
    assert export.check(fused, model, rows) < 1e-4
    attentions = [node for node in fused.graph.node if node.op_type == "Attention"]
    assert [onnx.helper.get_node_attr_value(node, "num_heads") for node in attentions] == [HEADS - 1] * LAYERS
    int8 = export.fuse(export.quantize(graph, export.Setting((), 7), rows[:20]), int8=True)
    assert (int8_share(int8) or 0) > 0.9
    expected, found = (np.concatenate(export.run_graph(one, [rows])) for one in (fused, int8))
    assert (expected.argmax(1) == found.argmax(1)).mean() > 0.9

    expected = answer(model).numpy()
    quantize(model, "dqm", load_checkpoint(pruned_once.root / "pruned.pt"), 2)
    assert np.abs(answer(model).numpy() - expected).max() < 0.1 * np.abs(expected).max()


def test_a_pruned_folder_is_fine_tuned_like_any_other(pruned: Case) -> None:
    flags = [f"--bert_model_name_or_path={pruned.root / 'pruned'}", f"--save_path={pruned.root / 'tuned.pt'}",
             f"--bert_output_dir={pruned.root / 'tuned'}"]
    preprocess.main(pruned.flags(*flags[:1]))
    train.main(pruned.train_flags("--epoch=1", "--bert_remove_layers=0", *flags))  # the last of equal flags counts
    model = load(pruned, "tuned.pt").embedding.transformer
    assert len(layer_parts(model)) == LAYERS - 1 and num_heads(model.config) == 3
    assert torch.equal(answer(load_pretrained(str(pruned.root / "tuned")).eval()), answer(model))
    history = json.loads((pruned.root / "tuned.pt.train.json").read_text())["history"]
    assert history[0]["train_loss"] < pruned.results("train")["history"][0]["train_loss"]


def test_distillation_takes_a_pruned_folder(pruned: Case) -> None:
    """As the student, which learns hidden states and attentions of the whole model, and as the teacher."""
    common = ["--do_distill", "--max_train_steps=1", "--state_loss_ratio=1", "--att_loss_ratio=1"]
    fastformers.main(pruned.train_flags(*common, "--lr=0", f"--bert_model_name_or_path={pruned.root / 'pruned'}",
                                        f"--restore_path={pruned.root / 'pruned.pt'}",  # with the head that it had
                                        f"--teacher_model_path={pruned.root / 'model.pt'}",
                                        f"--save_path={pruned.root / 'student.pt'}"))
    assert torch.equal(answer(load(pruned, "student.pt")), answer(load(pruned, "pruned.pt")))
    fastformers.main(pruned.train_flags(*common, f"--teacher_model_path={pruned.root / 'pruned.pt'}",
                                        "--student_init_layers=0,2", f"--save_path={pruned.root / 'student.pt'}"))
    transformer = load(pruned, "student.pt").embedding.transformer
    assert num_heads(transformer.config) == HEADS - 1 and len(layer_parts(transformer)) == 2


def test_recovery(bert: Case) -> None:
    """It trains what is left, keeps the best, and its files are a pair; what was pruned to fewer stays as it was."""
    flags = prune_flags(bert, "--target_num_heads=1", "--target_ffn_dim=4", "--recover_epoch=2")
    before = snapshot(bert.root)
    fastformers.main(flags)
    figures = json.loads((bert.root / "pruned.pt.prune.json").read_text())
    assert figures["recovered"]["loss"] < figures["pruned"]["loss"]
    assert figures["recovered"]["mb"] < figures["before"]["mb"]
    assert len(json.loads((bert.root / "pruned.pt.train.json").read_text())["history"]) == 2
    assert load(bert, "pruned.pt").embedding.transformer.config.intermediate_size == 4
    evaluate.main([f"--model_path={bert.root / 'pruned.pt'}", f"--bert_output_dir={bert.root / 'pruned'}"])
    after = snapshot(bert.root)
    assert all(after[name] == before[name] for name in before if not name.endswith((".log", ".fs")))
    shutil.copy(bert.root / "pruned.pt", bert.root / "whole.pt")
    fastformers.main([*flags, "--resume"])  # nothing is left to do
    assert same_weights(bert.root / "pruned.pt", bert.root / "whole.pt")


@pytest.mark.parametrize(("more", "said"), [
    ("--target_num_heads=5", "the model has 4 attention heads"),
    ("--target_ffn_dim=2048", "the model has 48 feed-forward units"),
    ("--restore_path=x.pt", "no meaning for --do_prune"),
    ("--model_path=nowhere.pt", "nowhere.pt: no such checkpoint"),
    ("--save_path_pruned={}/model.pt", "that is --model_path"),
    ("--bert_output_dir_pruned={}/data", "holds no model"),
    (f"--config={ROOT}/configs/config-roberta-cnn.json", "not the config of"),
])
def test_clear_answers(pruned: Case, more: str, said: str) -> None:
    before = snapshot(pruned.root)
    assert said in refusal(fastformers.main, *prune_flags(pruned, more.format(pruned.root)))
    after = snapshot(pruned.root)
    assert {**after, "train.log": None} == {**before, "train.log": None}


def test_data_that_differ(pruned: Case) -> None:
    before = {name: (pruned.root / name).read_bytes() for name in ("pruned.pt", "pruned/model.safetensors")}
    preprocess.main(pruned.flags("--n_ctx=30"))
    assert "encoded with another n_ctx" in refusal(fastformers.main, *prune_flags(pruned))
    lines = (pruned.root / "data/valid.txt").read_text()
    (pruned.root / "data/valid.txt").write_text(lines + "one more\tplay_music\n")
    assert "has changed since it was encoded" in refusal(fastformers.main, *prune_flags(pruned))
    assert all((pruned.root / name).read_bytes() == content for name, content in before.items())


def test_a_model_of_words(trained: Place) -> None:
    before = snapshot(trained.root)
    said = refusal(fastformers.main, *trained.train_flags("--do_prune", f"--model_path={trained.model}"))
    assert "a model of word vectors" in said and snapshot(trained.root) == before


def test_where_the_tokenizer_is(bert: Case) -> None:
    """In the folder of the same run, else where that run had it from."""
    fastformers.main(prune_flags(bert, "--bert_output_dir=nowhere"))
    preprocess.main(bert.flags(f"--bert_model_name_or_path={bert.root / 'pruned'}"))
    ARCHITECTURES["BERT"].make_tokenizer(["other words"]).save_pretrained(bert.root / "out")
    assert "its tokenizer is not that of" in refusal(fastformers.main, *prune_flags(bert))


def test_a_gaussian_stays_what_it_was(tmp_path: Path) -> None:
    """Begun again as a training run, which fits Gaussians to the data, the pruned model keeps those it had."""
    case = make_case(tmp_path / "case", "DistilBERT", "gnb")
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=1"))
    fastformers.main(prune_flags(case, f"--target_num_heads={HEADS}", f"--target_ffn_dim={INNER}"))
    assert torch.equal(answer(load(case, "pruned.pt")), answer(load(case)))
