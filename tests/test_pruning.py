"""Structured pruning: importance, removal, and pruned models through the stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HEADS, HIDDEN, INNER, LAYERS, make_model
from test_transformer import Case, make_case

import preprocess
import train
from dataset import EncodedData
from model import Classifier, load_classifier
from pruning import Importance, check_targets, measure_importance, num_parameters, prune
from text import InputError
from transformer import NUM_HEADS, build_from_config, layer_parts, load_pretrained
from util import load_checkpoint

PRUNABLE = ["BERT", "SpanBERT", "TinyBERT", "MiniLM", "DistilBERT", "mDistilBERT", "RoBERTa", "XLM-RoBERTa", "ELECTRA",
            "BORT", "Megatron-BERT"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A trained tiny BERT. Not to be changed."""
    case = make_case(tmp_path_factory.mktemp("pruning") / "case", "BERT")
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=4"))
    return case


@pytest.fixture
def bert(trained_once: Case, tmp_path: Path) -> Case:
    """A trained tiny BERT of the test's own."""
    shutil.copytree(trained_once.root, tmp_path / "case")
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


def test_importance_is_the_derivative_by_a_mask(trained_once: Case) -> None:
    """Compared with finite differences of each example's loss, for some heads and units."""
    model = load(trained_once).double()
    data = EncodedData(trained_once.root / "data/valid.txt.fs")
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


def test_neither_batches_nor_padding_matter(trained_once: Case) -> None:
    model, data = load(trained_once), EncodedData(trained_once.root / "data/valid.txt.fs")
    assert len(set(data.lengths)) > 5
    alone, together = (measure_importance(model, data, size, CPU) for size in (1, 60))
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(scores.norm(dim=1), torch.ones(LAYERS)) for scores in alone.normalized())


def test_a_useless_head_and_unit_rank_last(trained_once: Case) -> None:
    model, data = load(trained_once), EncodedData(trained_once.root / "data/valid.txt.fs")
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
    expected, count = answer(model), num_parameters(model)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(answer(model), expected, atol=1e-3)

    prune(model, importance, HEADS - 1, 20)
    assert torch.allclose(answer(model), expected, atol=1e-5)
    removed = layers * (size * (4 * hidden + 3) + (INNER - 20) * (2 * hidden + 1))
    assert num_parameters(model) == count - removed
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


def test_what_there_is_already_stays(trained_once: Case) -> None:
    model = load(trained_once)
    before, config = answer(model), model.embedding.transformer.config.to_dict()
    prune(model.embedding.transformer, random_importance(LAYERS, HEADS, INNER), HEADS, INNER)
    assert torch.equal(answer(model), before) and model.embedding.transformer.config.to_dict() == config


@pytest.mark.parametrize(("heads", "units", "said"), [
    (HEADS + 1, 1, f"target_num_heads={HEADS + 1}: the model has {HEADS} attention heads"),
    (1, INNER + 1, f"target_ffn_dim={INNER + 1}: the model has {INNER} feed-forward units")])
def test_more_than_there_is(trained_once: Case, heads: int, units: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_targets(load(trained_once).embedding.transformer, heads, units)


@pytest.mark.parametrize("count", [-1, 99, "six"])
def test_a_config_that_says_what_cannot_be(bert: Case, count: Any) -> None:
    config = json.loads((bert.root / "out/config.json").read_text())
    (bert.root / "out/config.json").write_text(json.dumps({**config, NUM_HEADS: count}))
    with pytest.raises(InputError, match=NUM_HEADS):
        load_pretrained(str(bert.root / "out"))
