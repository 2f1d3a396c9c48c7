"""Training transformers faster leaves what they learn as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pretrained.loading import attention_of, load_pretrained
from training.losses import parameter_groups
from training.speedups import FastDropout, attention, choose_attention, mask_without_asking, speed_up_training


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    y = FastDropout(p)(x)
    y.sum().backward()
    assert y.dtype == dtype and y.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=0.005)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16)
    assert torch.equal(x.grad, y.detach())


def test_dropout_of_elements_is_independent() -> None:
    torch.manual_seed(0)
    dropped = (FastDropout(0.5)(torch.ones(1 << 20)) == 0).float() - 0.5
    for distance in (*range(1, 9), 1024):
        assert abs((dropped[distance:] * dropped[:-distance]).mean().item()) < 4 * 0.25 / (1 << 10)


def test_dropout_follows_the_seed() -> None:
    drop, x = FastDropout(0.3), torch.ones(1000)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(drop(x))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p: float) -> None:
    x = torch.randn(7, 3)
    assert torch.equal(FastDropout(p)(x), x * (1 - p))
    assert torch.equal(FastDropout(0.5).eval()(x), x)
    assert FastDropout(0.5)(x[:0]).shape == (0, 3)


def attend(way: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The answer and the gradients of query, key and value."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    answer = way(module, *inputs, mask)[0]
    answer.backward(torch.linspace(-1, 1, answer.numel()).view(answer.shape))
    return [answer, *(x.grad for x in inputs if x.grad is not None)]


@given(batch=st.integers(1, 4), heads=st.integers(1, 3), length=st.integers(1, 20), size=st.integers(1, 9),
       causal=st.booleans(), masked=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_attention_is_torchs(batch: int, heads: int, length: int, size: int, causal: bool, masked: bool,
                             data: Any) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(batch * length)
    q, k, v = (torch.randn(batch, length, heads, size).transpose(1, 2) for _ in range(3))
    lengths = torch.tensor([data.draw(st.integers(1, length)) for _ in range(batch)])
    seen = (torch.arange(length) < lengths[:, None])[:, None, None].expand(batch, 1, length, length)
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if masked else None
    module = nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    ways = (attend(way, module, q, k, v, mask) for way in (attention, sdpa_attention_forward))
    for mine, theirs in zip(*ways, strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_attention_drops_weights() -> None:
    torch.manual_seed(0)
    x, ones = torch.zeros(50, 4, 30, 8, requires_grad=True), torch.ones(50, 4, 30, 1)
    kept = attention(nn.Module(), x, x, ones, torch.zeros(1, 1, 30, 30), dropout=0.25)[0]
    assert kept.mean().item() == pytest.approx(1, abs=0.005)
    assert kept.var().item() == pytest.approx(0.25 / 0.75 / 30, rel=0.1)  # of thirty weights of 1/30 each


def test_attention_with_fewer_heads_of_keys_goes_through_torch() -> None:
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    q, kv = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8, requires_grad=True)
    assert attention(module, q, kv, kv, torch.zeros(2, 1, 5, 5))[0].shape == (2, 5, 4, 8)


def test_masks_for_a_gpu_are_made_without_asking_it() -> None:
    """On a device that cannot answer, transformers' own mask fails, and a passing test of ours proves something."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    for function, skip in ((bidirectional_mask_function, "bidirectional"), (causal_mask_function, "causal")):
        wanted = {"batch_size": 2, "q_length": 5, "kv_length": 5, "mask_function": function, "device": "meta",
                  "attention_mask": torch.ones(2, 5, dtype=torch.bool, device="meta"), f"allow_is_{skip}_skip": True}
        with pytest.raises((RuntimeError, NotImplementedError)):
            sdpa_mask(**wanted)
        made = mask_without_asking(**wanted)
        assert made is not None and made.shape == (2, 1, 5, 5) and made.dtype == torch.bool


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_attention_for_a_gpu_is_torchs(tmp_path: Path, name: str) -> None:
    """Computed here on the CPU: the same vectors, whether some tokens are masked or none."""
    model = load_pretrained(str(make_model(name, tmp_path, WORDS * 20))).eval()
    if attention_of(model) != "sdpa":
        return
    ids = torch.tensor([[4, 5, 6, 7], [7, 6, 5, 4]])
    masks = [torch.ones_like(ids), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])]
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        answers = []
        for device in (None, "cuda"):
            if device:
                choose_attention(model, torch.device(device))
                assert attention_of(model) == "training_on_cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
            with torch.no_grad():
                answers.append([model(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
                                for mask in masks])
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    for theirs, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


WORDS = ["play some jazz", "call my mother", "will it rain in paris"]


def classifier_steps(transformer: Any, ids: Tensor, steps: int) -> None:
    """Some steps of AdamW with the groups of train.py."""
    model = nn.Module()
    model.embedding = transformer
    # The bias of keys changes no softmax: without this epsilon, the rounding of its gradient would move it.
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01, 1e-2, None), lr=1e-2, eps=1e-3,  # type: ignore[arg-type]
                                  fused=True)
    for _ in range(steps):
        hidden = transformer(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "DistilBERT"])
def test_rows_that_are_read_learn_as_in_the_whole_table(tmp_path: Path, name: str) -> None:
    folder = str(make_model(name, tmp_path / "model", WORDS))
    ids = torch.tensor([[5, 7, 9, 7], [5, 8, 8, 10]])
    whole, part = load_pretrained(folder).eval(), load_pretrained(folder).eval()
    before = whole.get_input_embeddings().weight.detach().clone()
    speed_up_training(part, torch.device("cpu"), ids.flatten().numpy())
    assert part.get_input_embeddings().weight.shape[0] == 5
    for model in (whole, part):
        classifier_steps(model, ids, 3)
    mine, theirs = part.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-5) for key in mine)
    after = load_pretrained(folder).eval()
    after.load_state_dict(mine)
    table = after.get_input_embeddings().weight
    changed = (table != before).any(1).nonzero().flatten().tolist()
    assert changed == [5, 7, 8, 9, 10]
    others = torch.arange(len(table)).unsqueeze(0)[:, :12]  # tokens that no step has seen, too
    with torch.inference_mode():
        answers = [model(input_ids=others, attention_mask=torch.ones_like(others)).last_hidden_state
                   for model in (after, part)]
        assert torch.allclose(*answers, atol=1e-5)
        part.load_state_dict(load_pretrained(folder).state_dict())  # and back
        assert torch.equal(part.state_dict()[next(k for k, v in mine.items() if v.shape == before.shape)], before)


def test_a_table_that_has_other_uses_is_trained_as_a_whole(tmp_path: Path) -> None:
    tied = load_pretrained(str(make_model("BART", tmp_path / "bart", WORDS)))
    frozen = load_pretrained(str(make_model("BERT", tmp_path / "bert", WORDS))).requires_grad_(False)
    padded = load_pretrained(str(tmp_path / "bert"))
    for model, ids in ((tied, [5]), (frozen, [5]), (padded, [padded.get_input_embeddings().padding_idx])):
        rows = len(model.get_input_embeddings().weight)
        speed_up_training(model, torch.device("cpu"), ids)
        assert len(model.get_input_embeddings().weight) == rows


def test_a_table_of_another_size_is_refused_as_ever(tmp_path: Path) -> None:
    model = load_pretrained(str(make_model("BERT", tmp_path / "model", WORDS)))
    speed_up_training(model, torch.device("cpu"), [5, 6])
    state = model.state_dict()
    name = next(key for key in state if "word_embeddings" in key)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, name: state[name][:-1]})


def test_only_plain_dropout_and_torchs_attention_are_replaced(tmp_path: Path) -> None:
    folder = str(make_model("BERT", tmp_path / "model", WORDS))
    model = load_pretrained(folder)
    model.more = nn.Sequential(nn.Dropout(0.3), nn.Dropout1d(0.4))
    speed_up_training(model, torch.device("cpu"), None)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {FastDropout}
    assert type(model.more[1]) is nn.Dropout1d and model.more[0].p == 0.3
    used: list[bool] = []
    from transformers import AttentionInterface

    name = attention_of(model)
    whole = AttentionInterface()[name]
    AttentionInterface.register(name, lambda *a, **k: used.append(True) or whole(*a, **k))
    try:
        ids = torch.tensor([[5, 6]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        AttentionInterface.register(name, whole)
    assert len(used) == LAYERS
    eager = load_pretrained(folder)
    eager.set_attn_implementation("eager")  # as for a teacher whose attentions are read
    speed_up_training(eager, torch.device("cpu"), None)
    assert attention_of(eager) == "eager"
