"""Layers that are left out, and low-rank adapters: trained, merged on save, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, make_model
from cases import Case, make_case
from helpers import ROOT, refusal, same_weights

import evaluate
import preprocess
import train
from model import load_classifier
from pretrained.layout import layer_lists
from pretrained.loading import load_pretrained
from pretrained.surgery import add_lora, merged_weights, remove_layers
from sentence_classifier.errors import InputError
from training.trainer import Trainer
from util import load_checkpoint


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny BERT's encoded data."""
    case = make_case(tmp_path_factory.mktemp("lora") / "case", "BERT")
    preprocess.main(case.flags())
    return case


def test_only_adapters_and_head_learn_and_are_merged(encoded: Case) -> None:
    """The checkpoint is an ordinary model: other matrices in the layers, the same embeddings, biases and norms."""
    train.main(encoded.train_flags("--lora_r=8", "--epoch=15", "--lr=1e-2"))
    evaluate.main(encoded.evaluate_flags(f"--bert_output_dir={encoded.root / 'out'}"))
    figures = encoded.results("test")
    majority = max(label["support"] for label in figures["per_class"].values()) / figures["examples"]
    assert figures["accuracy"] >= 2 * majority
    before = load_pretrained(str(encoded.root / "model")).state_dict()
    after = load_pretrained(str(encoded.root / "out")).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("encoder.layer.") and before[name].ndim == 2}
    best = encoded.results("train")["best"]["valid_loss"]
    history = encoded.results("train")["history"]
    assert best < history[0]["valid_loss"] / 2


def test_resume_ends_with_the_same_weights(encoded: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = encoded.train_flags("--lora_r=2", "--epoch=2", "--eval_and_save_steps=4")
    train.main(flags)
    shutil.copy(encoded.root / "model.pt", encoded.root / "whole.pt")
    evaluations = []
    original = Trainer.evaluate_and_save

    def dies_at_the_third(self: Trainer, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        evaluations.append(1)
        if len(evaluations) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "evaluate_and_save", dies_at_the_third)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train.main(flags)
    monkeypatch.undo()
    train.main([*flags, "--resume"])
    assert same_weights(encoded.root / "model.pt", encoded.root / "whole.pt")
    assert "lora_r 2 then, 3 now" in refusal(train.main, *flags, "--lora_r=3", "--resume")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "SqueezeBERT"])
def test_every_architecture_merges_to_what_it_computed(tmp_path: Path, name: str) -> None:
    model = load_pretrained(str(make_model(name, tmp_path, ["play some jazz", "wake me up at six"] * 20))).eval()
    names = model.state_dict().keys()
    ids = torch.tensor([[1, 2, 3, 4]])
    plain = model(ids).last_hidden_state
    add_lora(model, 2)
    assert torch.allclose(model(ids).last_hidden_state, plain, atol=1e-5)  # B begins at zero
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted = model(ids).last_hidden_state
    assert not torch.allclose(adapted, plain, atol=1e-3)
    merged = merged_weights(model)
    assert merged.keys() == names
    again = load_pretrained(str(tmp_path)).eval()
    again.load_state_dict(merged)
    assert torch.allclose(again(ids).last_hidden_state, adapted, atol=1e-4)


def test_a_checkpoint_with_adapters_goes_on_from_another(encoded: Case) -> None:
    train.main(encoded.train_flags("--epoch=1"))
    first = encoded.root / "first.pt"
    (encoded.root / "model.pt").rename(first)
    train.main(encoded.train_flags("--epoch=1", "--lora_r=2", f"--restore_path={first}"))
    model = load_classifier(load_checkpoint(encoded.root / "model.pt"), [])
    assert not any("lora" in name for name in model.state_dict())


def test_where_it_has_no_meaning(encoded: Case, tmp_path: Path) -> None:
    assert "--lora_r" in refusal(train.main, *encoded.train_flags("--lora_r=2", "--bert_use_feature_based"))
    config = f"--config={ROOT / 'configs/config-glove-cnn.json'}"
    assert "--lora_r" in refusal(train.main, config, "--lora_r=2", f"--data_dir={tmp_path}")
    squeeze = load_pretrained(str(make_model("SqueezeBERT", tmp_path, ["play some jazz"] * 20)))
    with pytest.raises(InputError, match="no linear layers"):  # all of its matrices are grouped convolutions
        add_lora(squeeze, 2)


# ---------------------------------------------------------------------------------------------------- fewer layers


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_remove_layers(tmp_path: Path, name: str) -> None:
    folder = make_model(name, tmp_path / "model", ["play some jazz", "call my mother"])
    model = load_pretrained(str(folder)).eval()
    count = model.config.num_hidden_layers
    remove_layers(model, [1] if count > 2 else [count - 1])
    assert model.config.num_hidden_layers == count - 1
    assert all(len(layers) == count - 1 for layers in layer_lists(model))
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.inference_mode():
        after = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        model.save_pretrained(tmp_path / "saved")
        again = load_pretrained(str(tmp_path / "saved")).eval()
        assert torch.equal(after, again(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)


def test_remove_layers_keeps_the_right_ones(tmp_path: Path) -> None:
    folder = make_model("BERT", tmp_path / "model", ["play some jazz"])
    whole, part = load_pretrained(str(folder)), load_pretrained(str(folder))
    remove_layers(part, [0])
    for place in range(LAYERS - 1):
        kept, own = part.encoder.layer[place].state_dict(), whole.encoder.layer[place + 1].state_dict()
        assert all(torch.equal(kept[name], own[name]) for name in own)


def test_a_layer_that_the_others_need(tmp_path: Path) -> None:
    model = load_pretrained(str(make_model("T5", tmp_path / "model", ["play some jazz"])))
    with pytest.raises(Exception, match="relative_attention_bias"):
        remove_layers(model, [0])
