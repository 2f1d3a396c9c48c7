"""Models: independence of the batch (law 1), the published equations by hand, the Gaussian decoder, frozen rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, make_model
from helpers import DIM, ENCODERS, make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.naive_bayes import GaussianNB
from torch import Tensor

from dataset import Batch, pad
from model import (
    ENCODERS as REGISTRY,
)
from model import (
    Classifier,
    DenseNet,
    DynamicSelfAttention,
    GaussianDecoder,
    MaxOverTimeConv,
    TransformerEmbedding,
    WordEmbedding,
    build_model,
    word_dropout_probabilities,
)
from pretrained.loading import load_pretrained
from training.losses import parameter_groups
from training.speedups import speed_up_training

WORDS, OWN, CLASSES = 30, 12, 4


def perturbed(enc_class: str, seed: int = 0) -> Classifier:
    """A tiny classifier in which nothing is at a value that would hide a fault: noise on everything."""
    torch.manual_seed(seed)
    model = build_model(make_config(enc_class), CLASSES, WordEmbedding(torch.randn(WORDS, DIM), OWN)).eval()
    with torch.no_grad():
        for values in [*model.parameters(), *model.buffers()]:
            values.add_(torch.randn_like(values) * 0.5)
    return model


def logits(model: Classifier, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch.input_ids, batch.attention_mask)


def wider(batch: Batch, pads: int) -> Batch:
    """The batch with more padding."""
    return Batch(F.pad(batch.input_ids, (0, pads)), F.pad(batch.attention_mask, (0, pads), value=False))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


sentence = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=14).map(np.array)


def test_every_encoder_is_tested() -> None:
    assert {*ENCODERS, "cls"} == set(REGISTRY)  # cls, which words do not have: tests/pretrained/test_loading.py


@pytest.mark.parametrize("enc_class", ENCODERS)
@settings(max_examples=60)
@given(rows=st.lists(sentence, min_size=1, max_size=6), pads=st.integers(0, 25), seed=st.integers(0, 3))
def test_logits_do_not_depend_on_batch_or_padding(enc_class: str, rows: list[np.ndarray], pads: int, seed: int) -> None:
    model = perturbed(enc_class, seed)
    together = logits(model, pad(rows))
    close(logits(model, wider(pad(rows), pads)), together)
    for row, expected in zip(rows, together, strict=True):
        close(logits(model, pad([row]))[0], expected)
        close(logits(model, wider(pad([row]), pads))[0], expected)


@pytest.mark.parametrize("enc_class", ENCODERS)
def test_what_stands_at_pad_positions_does_not_matter(enc_class: str) -> None:
    model = perturbed(enc_class)
    batch = pad([np.array([5]), np.array([7, 20, 3, 3, 29, 1, 2])])
    other = Batch(torch.where(batch.attention_mask, batch.input_ids, 17), batch.attention_mask)
    close(logits(model, batch), logits(model, other))


@pytest.mark.parametrize("enc_class", ENCODERS)
def test_logits_depend_on_every_token(enc_class: str) -> None:
    model = perturbed(enc_class)
    ids = torch.tensor([[4, 9, 25, 14, 6]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    base = logits(model, Batch(ids, mask))
    moved = 0
    for place in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, place] = 21
        moved += int(not torch.allclose(logits(model, Batch(changed, mask)), base))
    assert moved >= 4  # a maximum may pass one over


# ----------------------------------------------------------------------------------- the published equations, by hand


def convolution_at(weight: Tensor, bias: Tensor, x: Tensor, start: int) -> Tensor:
    """One window of a convolution: weight [O, I, K], x [L, I], zeros outside -> [O]."""
    out = bias.clone()
    for offset in range(weight.shape[2]):
        if 0 <= start + offset < len(x):
            out = out + weight[:, :, offset] @ x[start + offset]
    return out


def with_pads(x: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """One sentence [L, D] as a batch with padding, and its mask."""
    mask = torch.arange(len(x) + pads) < len(x)
    return F.pad(x, (0, 0, 0, pads)).unsqueeze(0), mask.unsqueeze(0)


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 9])
@torch.no_grad()
def test_cnn_equations(length: int, pads: int) -> None:
    torch.manual_seed(1)
    layer, x = MaxOverTimeConv(4, 3, [2, 3, 5]), torch.randn(length, 4)
    expected = []
    for convolution in layer.convolutions:
        size = convolution.kernel_size[0]
        starts = range(1 - size, length)
        windows = [convolution_at(convolution.weight, convolution.bias, x, start) for start in starts]
        expected.append(torch.stack(windows).clamp(min=0).amax(0))
    close(layer(*with_pads(x, pads))[0], torch.cat(expected))


@pytest.mark.parametrize("length", [1, 2, 7])
@torch.no_grad()
def test_densenet_equations(length: int) -> None:
    torch.manual_seed(2)
    layer, x = DenseNet(4, [[1, 1], [3, 5], [5, 3]], 3, 2, 6), torch.randn(length, 4)

    def same_length(convolution: torch.nn.Conv1d, signal: Tensor) -> Tensor:
        half = convolution.kernel_size[0] // 2
        rows = [convolution_at(convolution.weight, convolution.bias, signal, i - half) for i in range(length)]
        return torch.stack(rows).clamp(min=0)

    ends = []
    for column in layer.columns:
        outputs = [same_length(column[0], x)]
        for convolution in list(column)[1:]:
            outputs.append(same_length(convolution, torch.cat(outputs, dim=1)))
        ends.append(outputs[-1])
    expected = same_length(layer.mix, torch.cat([x, *ends], dim=1))
    out = layer(*with_pads(x, 4))[0]
    close(out[:length], expected)
    assert not out[length:].any()


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 6])
@torch.no_grad()
def test_dynamic_self_attention_equations(length: int, rounds: int) -> None:
    torch.manual_seed(3)
    heads, size = 3, 5
    layer, t = DynamicSelfAttention(4, heads, size, rounds), 2 * torch.randn(length, 4)
    ends = []
    for head in range(heads):
        weight = layer.projection.weight[head * size : (head + 1) * size]
        bias = layer.projection.bias[head * size : (head + 1) * size]
        x = [F.leaky_relu(weight @ token + bias) for token in t]
        q = [torch.tensor(0.0)] * length
        for _ in range(rounds):
            total = sum(math.exp(value) for value in q)
            s = sum((math.exp(value) / total * token for value, token in zip(q, x, strict=True)), torch.zeros(size))
            z = torch.tanh(s)
            q = [value + token @ z for value, token in zip(q, x, strict=True)]
        ends.append(z)
    close(layer(*with_pads(t, 5))[0], torch.cat(ends))


# ------------------------------------------------------------------------------------------------------ the Gaussian


def gaussian(x: Tensor, share: Tensor, smoothing: float) -> GaussianDecoder:
    decoder = GaussianDecoder({"dropout": 0.0}, x.shape[1], share.shape[1]).eval()
    decoder.fit([(x[:50], share[:50]), (x[50:], share[50:])], smoothing)
    return decoder


def test_gaussian_decoder_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    y = np.arange(160) % 3
    x = (draw.normal(size=(160, 6)) * [1, 2, 0.1, 1, 5, 1] + draw.normal(size=(3, 6))[y]).astype(np.float32)
    decoder = gaussian(torch.from_numpy(x), F.one_hot(torch.from_numpy(y)), 1e-2)
    theirs = GaussianNB(priors=decoder.log_prior.exp().tolist(), var_smoothing=1e-2).fit(x, y)
    new = draw.normal(size=(200, 6)).astype(np.float32) * 2
    with torch.no_grad():
        ours = decoder(torch.from_numpy(new))
    np.testing.assert_allclose(ours.softmax(-1), theirs.predict_proba(new), rtol=1e-3, atol=1e-5)
    assert (ours.argmax(-1).numpy() == theirs.predict(new)).all()


def test_gaussian_logits_are_sums_of_log_densities() -> None:
    torch.manual_seed(0)
    decoder = GaussianDecoder({"dropout": 0.0}, 5, 3).eval()
    with torch.no_grad():
        for values in decoder.parameters():
            values.normal_()
        x = torch.randn(7, 5)
        density = torch.distributions.Normal(decoder.mean, (0.5 * decoder.log_variance).exp())
        expected = decoder.log_prior + density.log_prob(x.unsqueeze(1)).sum(-1) + 2.5 * math.log(2 * math.pi)
        close(decoder(x), expected)


def test_gaussian_fit_weighs_soft_labels() -> None:
    torch.manual_seed(0)
    x, share = torch.randn(80, 3), torch.rand(80, 2).softmax(-1)
    decoder = gaussian(x, share, 1e-9)
    mean = share.t() @ x / share.sum(0).unsqueeze(1)
    close(decoder.mean.detach(), mean)
    variance = torch.stack([(share[:, c : c + 1] * (x - mean[c]) ** 2).sum(0) / share[:, c].sum() for c in range(2)])
    torch.testing.assert_close(decoder.log_variance.exp().detach(), variance, rtol=1e-4, atol=1e-6)


@given(classes=st.lists(st.integers(0, 3), min_size=8, max_size=30), missing=st.integers(0, 3),
       scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_a_class_without_sentences_never_wins(classes: list[int], missing: int, scale: float, seed: int) -> None:
    """Wherever a sentence is: at zero, far from all data, or amid them."""
    torch.manual_seed(seed)
    y = torch.tensor([(missing + 1) % 4 if c == missing else c for c in classes])
    x = torch.randn(len(y), 5) + y.unsqueeze(1)
    decoder = gaussian(x, F.one_hot(y, 4), 1e-3)
    logits = decoder(torch.randn(50, 5) * scale).detach()
    assert torch.isfinite(logits).all() and (logits.argmax(-1) != missing).all()
    others = logits[:, [c for c in range(4) if c != missing]]
    assert (logits[:, missing] < others.amax(-1)).all()


# --------------------------------------------------------------------------------------------------- word embeddings


def test_embedding_looks_up_own_and_frozen_rows() -> None:
    table = torch.randn(10, 3)
    embedding = WordEmbedding(table, 4)
    ids = torch.arange(10).unsqueeze(0)
    close(embedding(ids, torch.ones_like(ids, dtype=torch.bool))[0].detach(), table)
    assert set(embedding.state_dict()) == {"trainable"} and embedding.trainable.shape == (4, 3)


def test_only_rows_that_occur_get_a_gradient() -> None:
    embedding = WordEmbedding(torch.randn(10, 3), 6)
    embedding(torch.tensor([[2, 8, 5]]), torch.tensor([[True, True, True]])).sum().backward()
    assert embedding.trainable.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 5]


def test_word_dropout_puts_unk_in_training_alone() -> None:
    torch.manual_seed(0)
    probabilities = word_dropout_probabilities(torch.tensor([0, 0, 0, 5, 1, 2, 0, 3]), 3.0)
    assert probabilities[[0, 3, 4, 7]].tolist() == [0.0, 0.375, 0.75, 0.5]
    embedding = WordEmbedding(torch.arange(10.0).unsqueeze(1), 10, probabilities)
    ids = torch.tensor([[7, 9]] * 2000).t()
    mask = torch.ones_like(ids, dtype=torch.bool)
    seven, nine = embedding(ids, mask).squeeze(-1)
    assert set(seven.tolist()) == {1.0, 7.0} and 0.45 < (seven == 1).float().mean() < 0.55
    assert (nine == 9).all()  # not a word of the training data
    assert (embedding.eval()(ids, mask)[0] == 7).all()


@pytest.mark.parametrize("name", ["BERT", "MobileBERT", "GPT-2"])
def test_token_cutoff_hides_inner_tokens_in_training_alone(tmp_path: Path, name: str) -> None:
    make_model(name, tmp_path, ["one two three four five six seven eight nine ten"] * 20)
    embedding = TransformerEmbedding(load_pretrained(str(tmp_path)), "first", token_cutoff=0.3)
    seen: list[Tensor] = []
    embedding.transformer.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.abs().sum(-1) > 0))
    ids = torch.randint(3, 40, (400, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5], [2], [1]]).repeat(100, 1)
    torch.manual_seed(0)
    embedding.train()(ids, mask)
    hidden = mask & ~seen[-1]
    inner = mask & (torch.arange(9) > 0) & (torch.arange(9) < mask.sum(1, keepdim=True) - 1)
    assert not (hidden & ~inner).any() and 0.25 < hidden.sum() / inner.sum() < 0.35
    embedding(ids, mask)
    assert (mask & ~seen[-1] != hidden).any()  # drawn anew
    embedding.eval()(ids, mask)
    assert (seen[-1] == mask).all()


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_what_token_cutoff_hides_changes_no_output(tmp_path: Path, name: str) -> None:
    """In encoder-decoders, too, whose parts look tokens up each for itself."""
    make_model(name, tmp_path, ["one two three four five six seven eight nine ten"] * 20)
    embedding = TransformerEmbedding(load_pretrained(str(tmp_path)), "first", token_cutoff=0.999999).train()
    for module in embedding.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    embedding.transformer.eval()  # attention's own dropout
    ids = torch.tensor([[5, 7, 9, 11, 6], [5, 8, 10, 12, 6]])
    one, other = embedding(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_a_training_step_in_half_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Of each architecture, trained as train.py does and answering as a teacher does; near what fp32 says."""
    make_model(name, tmp_path, ["one two three four five six seven eight nine ten"] * 20)
    embedding = TransformerEmbedding(load_pretrained(str(tmp_path)), "first").train()
    speed_up_training(embedding.transformer, torch.device("cpu"), None)
    ids = torch.randint(3, 20, (4, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5], [2], [1]])
    with torch.autocast("cpu", dtype):
        trained = embedding(ids, mask)
    trained.float().square().sum().backward()
    gradients = [parameter.grad for parameter in embedding.parameters() if parameter.grad is not None]
    assert len(gradients) > 10 and all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        exact = embedding.eval()(ids, mask)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(embedding(ids, mask).float(), exact, rtol=0.05, atol=0.08)


@pytest.mark.parametrize("enc_class", ENCODERS)
def test_no_decay_on_biases_norms_vectors_and_statistics(enc_class: str) -> None:
    model = build_model(make_config(enc_class), CLASSES, WordEmbedding(torch.randn(WORDS, DIM), OWN))
    groups = parameter_groups(model, 0.1, 1e-3, embedding_lr=1e-4)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.startswith("embedding") and enc_class != "gnb"
        assert decay[id(parameter)] == (0.1 if matrix else 0.0), name
        assert rate[id(parameter)] == (1e-4 if name.startswith("embedding") else 1e-3), name
