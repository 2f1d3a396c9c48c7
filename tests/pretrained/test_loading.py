"""The transformer path: every architecture through the three stages, and what is read off models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, POSITIONS, make_model
from cases import Case, make_case, sample
from helpers import ROOT, code_hash, make_config, refusal, same_weights, snapshot, write_config

import augment_data
import evaluate
import preprocess
import train
from compression.onnx_export import ready_for_export
from dataset import EncodedData, pad
from model import TransformerEmbedding, build_model, load_classifier
from pretrained.layout import layer_lists, layer_parts
from pretrained.loading import (
    attention_of,
    build_of_class,
    can_choose_attention,
    load_pretrained,
    load_tokenizer,
    model_class_of,
    tokenizer_text,
)
from pretrained.surgery import remove_layers
from sentence_classifier.tokenizers import (
    MASK,
    SUBWORDS,
    SubwordTokenizer,
    TokenizerInfo,
    WordTokenizer,
    make_tokenizer,
)
from training.losses import parameter_groups
from training.speedups import FastDropout, PartialEmbedding
from util import load_checkpoint

# A model of each way in which architectures differ; the matrix has them all.
SLICE = [("BERT", "cls"), ("BERT", "gnb"), ("BERT", "densenet-cnn"), ("BERT", "densenet-dsa"), ("RoBERTa", "cnn"),
         ("BART", "cls"), ("ConvBERT", "cnn"), ("MobileBERT", "cls"), ("ALBERT", "cls"), ("DeBERTa-v2", "cls"),
         ("GPT-2", "cls"), ("T5", "cnn"), ("ModernBERT", "cls")]
MATRIX = [(name, encoder) for name in ARCHITECTURES for encoder in ("cls", "cnn")]


@pytest.fixture(scope="session")
def bert_once(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A trained tiny BERT. Not to be changed."""
    case = make_case(tmp_path_factory.mktemp("bert") / "case", "BERT")
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=2"))
    return case


@pytest.fixture
def bert(bert_once: Case, tmp_path: Path) -> Case:
    """A trained tiny BERT of the test's own."""
    shutil.copytree(bert_once.root, tmp_path / "case")
    return Case(tmp_path / "case")


# ------------------------------------------------------------------------------------------------------- the matrix


def logits(model: Any, rows: list[np.ndarray]) -> torch.Tensor:
    with torch.inference_mode():
        batch = pad(rows)
        return model(batch.input_ids, batch.attention_mask)


def run_case(case: Case) -> dict[str, Any]:
    """Through the stages; the figures for the table. Raises where something is not as it must be."""
    preprocess.main(case.flags())
    train.main(case.train_flags("--epoch=12"))
    evaluate.main(case.evaluate_flags(f"--bert_output_dir={case.root / 'out'}"))
    encoded = case.results("test")
    evaluate.main(case.evaluate_flags("--enable_inference"))
    raw = case.results("test")
    trained = case.results("train")

    # The reloaded checkpoint computes what the trained model computed: the same loss on valid.
    checkpoint = load_checkpoint(case.root / "model.pt")
    model = load_classifier(checkpoint, []).eval()
    data = EncodedData(case.root / "data/valid.txt.fs")
    rows = [np.asarray(data.token_ids[a:b]) for a, b in zip(data.offsets, data.offsets[1:], strict=False)]
    loss = torch.nn.functional.cross_entropy(logits(model, rows), torch.as_tensor(np.array(data.targets)).long())
    assert abs(loss.item() - trained["best"]["valid_loss"]) < 1e-4

    # Law 1, with every parameter perturbed.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = sorted(rows[:8], key=len)
    together, longest = logits(model, rows), np.concatenate([rows[-1]] * 3)[:40]
    padded = logits(model, [*rows, longest])[:-1]
    alone = torch.cat([logits(model, [row]) for row in rows])
    size = max(1.0, alone.abs().max().item())  # a Gaussian's logits are sums over all features
    apart = max((together - alone).abs().max().item(), (padded - alone).abs().max().item()) / size
    return {"loss_before": trained["history"][0]["valid_loss"], "loss": trained["best"]["valid_loss"],
            "accuracy": encoded["accuracy"], "raw_accuracy": raw["accuracy"], "apart": apart,
            "majority": max(figures["support"] for figures in encoded["per_class"].values()) / encoded["examples"]}


def check_case(figures: dict[str, Any]) -> None:
    """What the matrix asks of every architecture."""
    start = max(np.log(4), figures["loss_before"])  # a Gaussian's density begins beyond that of chance
    assert figures["loss"] < 0.75 * start, figures
    assert figures["accuracy"] >= 2 * figures["majority"], figures
    assert figures["raw_accuracy"] == figures["accuracy"], figures
    assert figures["apart"] < 1e-5, figures


@pytest.mark.parametrize(("name", "encoder"), SLICE)
def test_slice(tmp_path: Path, name: str, encoder: str) -> None:
    check_case(run_case(make_case(tmp_path / "case", name, encoder)))


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "encoder"), MATRIX)
def test_matrix(tmp_path: Path, name: str, encoder: str) -> None:
    """Figures go to .matrix/; what stands there already, by the same code, is not run again."""
    kept = ROOT / ".matrix" / f"{name}-{encoder}-{code_hash()}.json"
    if not kept.exists():
        figures = run_case(make_case(tmp_path / "case", name, encoder))
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"architecture": name, "encoder": encoder, **figures}))
    check_case(json.loads(kept.read_text()))


@pytest.mark.parametrize("name", ["MobileBERT", "ConvBERT"])
def test_padding_would_get_in_without_the_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Law 1 is tested with models for which it does not hold by itself; such a model is refused."""
    case = make_case(tmp_path / "case", name)
    preprocess.main(case.flags())
    monkeypatch.setattr("model.Masking.begin", lambda *_, **__: None)
    assert "do not take padded sentences" in refusal(train.main, *case.train_flags())


# ------------------------------------------------------------------------------------------------------- tokenizers


KINDS = ("BERT", "RoBERTa", "GPT-2", "ALBERT", "T5")  # architectures with each kind of tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """By architecture: a tokenizer's text, and the tokenizer itself."""
    sentences = [line.split("\t")[0] for line in sample(1000, "train.txt")]
    made = {name: ARCHITECTURES[name].make_tokenizer(sentences) for name in KINDS}
    return {name: (tokenizer_text(tokenizer), tokenizer) for name, tokenizer in made.items()}


def subwords(text: str, **info: Any) -> SubwordTokenizer:
    return SubwordTokenizer(text, TokenizerInfo(kind=SUBWORDS, **{"n_ctx": 99, **info}))


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_tokenizers_own(tokenizers: dict[str, tuple[str, Any]], name: str) -> None:
    text, tokenizer = tokenizers[name]
    encoder = subwords(text, n_ctx=50, mask_token=tokenizer.mask_token)
    for sentence in ("call my mother", "Zoë plays  naïve jazz?!", "\u3042"):
        assert encoder(sentence) == tokenizer(sentence)["input_ids"]
    for n_ctx in (3, 5, 8):  # truncated sentences keep their special tokens
        encoder = subwords(text, n_ctx=n_ctx, mask_token=tokenizer.mask_token)
        sentence = "please wake me at half past six tomorrow morning"
        ids, length = encoder.tokenize_batch([sentence])[0]
        assert ids == tokenizer(sentence, truncation=True, max_length=n_ctx)["input_ids"]
        assert length == len(tokenizer(sentence)["input_ids"]) > n_ctx


@pytest.mark.parametrize("name", KINDS)
def test_text_never_becomes_a_special_token(tokenizers: dict[str, tuple[str, Any]], name: str) -> None:
    text, tokenizer = tokenizers[name]
    encoder = subwords(text, mask_token=tokenizer.mask_token)
    bare = set(encoder("call me")) & set(tokenizer.all_special_ids)
    for token in tokenizer.all_special_tokens:
        if token not in ("<unk>", "[UNK]"):
            assert set(encoder(f"call {token} me")) & set(tokenizer.all_special_ids) <= bare | {encoder.unknown}, token


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ALBERT"])
def test_the_mask_of_augmented_text(tokenizers: dict[str, tuple[str, Any]], name: str) -> None:
    text, tokenizer = tokenizers[name]
    mask = tokenizer.mask_token
    assert tokenizer.mask_token_id not in subwords(text, mask_token=mask)("call [MASK] now")
    assert subwords(text, mask_token=mask, augmented=True)("call [MASK] now").count(tokenizer.mask_token_id) == 1


def test_a_sentence_without_tokens(tokenizers: dict[str, tuple[str, Any]]) -> None:
    assert len(subwords(tokenizers["T5"][0], n_ctx=9)("\u200b")) >= 1
    assert len(subwords(tokenizers["GPT-2"][0], n_ctx=9)("")) == 1


def test_n_ctx_below_the_special_tokens(tokenizers: dict[str, tuple[str, Any]]) -> None:
    with pytest.raises(Exception, match="adds 2 special tokens"):
        subwords(tokenizers["BERT"][0], n_ctx=2)


def test_augmented_data(bert: Case) -> None:
    data = bert.root / "data"
    (data / "augmented.raw").write_text("call [MASK] now\tmake_call\nplay [MASK]\tplay_music\n")
    preprocess.main(bert.flags("--augmented"))
    tokenizer = load_tokenizer(str(bert.root / "model"))
    assert list(EncodedData(data / "augmented.raw.fs").token_ids).count(tokenizer.mask_token_id) == 2


def test_a_transformer_teaches_words(bert: Case) -> None:
    data = bert.root / "data"
    augment_data.main([f"--input={data / 'valid.txt'}", f"--output={data / 'augmented.raw'}", "--no_analyzer",
                       "--n_iter=2"])
    preprocess.main(bert.flags("--augmented"))
    evaluate.main(bert.evaluate_flags("--augmented", "--batch_size=16", f"--data_dir={data}"))
    raw, found = ([line.split("\t") for line in (data / name).read_text(encoding="utf-8").splitlines()]
                  for name in ("augmented.raw", "augmented.raw.pred"))
    assert [sentence for sentence, _ in found] == [sentence for sentence, _ in raw]
    teacher = np.array([label.split() for _, label in found], np.float32)
    encoded = EncodedData(data / "augmented.raw.fs")
    model = load_classifier(load_checkpoint(bert.root / "model.pt"), []).eval()
    torch.testing.assert_close(torch.from_numpy(teacher), logits(model, encoded.rows(range(len(encoded)))),
                               atol=1e-4, rtol=1e-4)
    shutil.copy(data / "augmented.raw.pred", data / "augmented.txt")
    config = write_config(bert.root / "student.json")
    preprocess.main([f"--config={config}", f"--data_dir={data}", "--embedding_path=none", "--augmented",
                     "--augmented_filename=augmented.txt"])
    student = EncodedData(data / "augmented.txt.ids")
    np.testing.assert_array_equal(student.targets, teacher)
    place = next(number for number, (sentence, _) in enumerate(raw) if MASK in sentence)
    assert student.rows([place])[0][raw[place][0].split(" ").index(MASK)] == WordTokenizer.unknown


# ------------------------------------------------------------------------------------------------------ what it left


def test_files(bert: Case) -> None:
    assert sorted(path.name for path in (bert.root / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    saved = json.loads((bert.root / "out/config.json").read_text())
    assert sorted(saved["id2label"].values()) == ["make_call", "play_music", "set_alarm", "translate"]
    assert not [path for path in bert.root.iterdir() if path.name.startswith(".")]


def test_the_saved_folder_is_the_best_model(bert: Case) -> None:
    model = load_classifier(load_checkpoint(bert.root / "model.pt"), [])
    saved = load_pretrained(str(bert.root / "out")).state_dict()
    own = model.embedding.transformer.state_dict()
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)


def test_fine_tuning_in_place(bert: Case) -> None:
    train.main([*bert.train_flags("--epoch=1"), f"--bert_model_name_or_path={bert.root / 'out'}"])
    evaluate.main(bert.evaluate_flags(f"--bert_output_dir={bert.root / 'out'}"))


def test_sequential_fine_tuning(bert: Case) -> None:
    flags = [flag.replace(str(bert.root / "model"), str(bert.root / "out")) for flag in bert.train_flags("--epoch=1")]
    # On the data encoded for the first model; the last of two equal flags counts.
    train.main([*flags, f"--save_path={bert.root / 'second.pt'}", f"--bert_output_dir={bert.root / 'second'}"])
    first = json.loads((bert.root / "model.pt.train.json").read_text())["history"]
    second = json.loads((bert.root / "second.pt.train.json").read_text())["history"]
    assert second[0]["train_loss"] < first[0]["train_loss"]


def test_a_pair_of_two_runs_is_refused(bert: Case) -> None:
    shutil.copytree(bert.root / "out", bert.root / "other")
    train.main([*bert.train_flags("--epoch=1", "--seed=1")])
    evaluate.main(bert.evaluate_flags(f"--bert_output_dir={bert.root / 'out'}"))
    assert "of run" in refusal(evaluate.main, *bert.evaluate_flags(f"--bert_output_dir={bert.root / 'other'}"))
    assert "not written by train.py" in refusal(evaluate.main, *bert.evaluate_flags("--bert_output_dir=."))
    # The same config and data: in the place of the old folder. Other ones: the old one moves aside.
    assert not (bert.root / "out.previous").exists()
    config = json.loads((bert.root / "config.json").read_text())
    (bert.root / "config.json").write_text(json.dumps({**config, "dropout": 0.3}))
    train.main([*bert.train_flags("--epoch=1")])
    assert (bert.root / "out.previous/model.safetensors").exists()


def test_resume_and_seed(bert: Case) -> None:
    path = bert.root / "model.pt"
    one = bert.train_flags("--epoch=2", "--eval_and_save_steps=7")
    train.main(one)
    shutil.copy(path, bert.root / "whole.pt")
    from training import trainer

    class Killed(Exception):
        pass

    calls = 0
    original = trainer.Trainer.evaluate_and_save

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        original(self, *args, **kwargs)
        calls += 1
        if calls == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "evaluate_and_save", killed)
        with pytest.raises(Killed):
            train.main(one)
    train.main([*one, "--resume"])
    assert same_weights(path, bert.root / "whole.pt")


# ----------------------------------------------------------------------------------------------------------- flags


def test_what_nobody_reads_is_not_computed(bert: Case) -> None:
    """The last layer's feed-forward part sees one token of each sentence; logits and gradients are those of all."""
    checkpoint = load_checkpoint(bert.root / "model.pt")
    ids, mask = torch.tensor([[2, 9, 8, 7], [2, 6, 0, 0]]), torch.tensor([[True] * 4, [True, True, False, False]])
    found = []
    for whole in (False, True):
        model = load_classifier(checkpoint, []).eval()
        if whole:
            model.embedding.reads = "all"
        seen: list[int] = []
        layer_parts(model.embedding.transformer)[-1].outer.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].shape[1]))
        out = model(ids, mask)
        assert seen == [4 if whole else 1]
        out.square().sum().backward()
        found.append([out, *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_build_model_says_what_is_read(tmp_path: Path) -> None:
    transformer = load_pretrained(str(make_model("BERT", tmp_path, sample(200, "train.txt"))))
    config = {"dropout": 0.1, "num_filters": 4, "kernel_sizes": [2], "fc_hidden_size": 4}
    for encoder, position, reads in (("cls", "first", "first"), ("cls", "last", "all"), ("cnn", "first", "all"),
                                     ("gnb", "first", "all")):
        model = build_model({**config, "enc_class": encoder}, 3, TransformerEmbedding(transformer, position))
        assert model.embedding.reads == reads
    embedding = build_model({**config, "enc_class": "cls"}, 3, TransformerEmbedding(transformer, "first"))
    with ready_for_export(embedding):
        assert embedding.embedding.reads == "all"
    assert embedding.embedding.reads == "first"
    embedding.embedding.keep_output(attentions=False)
    assert embedding.embedding.reads == "all"


@pytest.mark.parametrize("name", ["BERT", "BART", "T5", "ALBERT", "ModernBERT"])
def test_lower_layers_learn_more_slowly(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    make_model(name, tmp_path, sample(200, "train.txt"))
    transformer = load_pretrained(str(tmp_path))
    model = build_model({"enc_class": "cls", "dropout": 0.1}, 3, TransformerEmbedding(transformer, "first"))
    groups = parameter_groups(model, 0.1, lr=1.0, embedding_lr=0.8, layer_lr_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    assert {rate[id(p)] for part in (model.encoder, model.decoder) for p in part.parameters()} == {1.0}
    layers = [layer for layers in layer_lists(transformer) for layer in layers]
    assert ("--layer_lr_decay has no effect" in caplog.text) == (name == "ALBERT")
    if name == "ALBERT":  # all layers share their weights
        assert {rate[id(p)] for p in transformer.parameters()} == {0.8}
        return
    for above, layer in enumerate(reversed(layers)):
        assert {rate[id(p)] for p in layer.parameters()} == {0.8 * 0.5**above}
    assert rate[id(transformer.get_input_embeddings().weight)] == 0.8 * 0.5 ** len(layers)


def test_rates_by_layer_are_a_transformers(bert: Case) -> None:
    said = refusal(train.main, *bert.train_flags("--layer_lr_decay=0.9", "--bert_use_feature_based"))
    assert "--layer_lr_decay is of a transformer that is trained" in said
    assert "from 0 to 1" in refusal(train.main, *bert.train_flags("--layer_lr_decay=1.1"))


def test_each_embedding_has_its_own_way_to_hide_words(bert: Case) -> None:
    assert "a transformer has --token_cutoff" in refusal(train.main, *bert.train_flags("--word_dropout=0.5"))
    assert "word vectors have --word_dropout" in refusal(
        train.main, f"--config={ROOT}/configs/config-glove-cnn.json", "--token_cutoff=0.1")


def test_feature_based(bert: Case) -> None:
    train.main(bert.train_flags("--epoch=1", "--bert_use_feature_based"))
    frozen = load_classifier(load_checkpoint(bert.root / "model.pt"), []).embedding.transformer.state_dict()
    before = load_pretrained(str(bert.root / "model")).state_dict()
    assert all(torch.equal(frozen[name], before[name]) for name in before)


def test_gradient_checkpointing_computes_the_same_twice(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert.modeling_bert import BertSelfAttention

    calls = []
    forward = BertSelfAttention.forward
    monkeypatch.setattr(BertSelfAttention, "forward", lambda *a, **k: calls.append(torch.is_grad_enabled())
                        or forward(*a, **k))
    flags = bert.train_flags("--epoch=1", "--max_train_steps=3")
    train.main(flags)
    once = len(calls)
    calls.clear()
    shutil.copy(bert.root / "model.pt", bert.root / "plain.pt")
    train.main([*flags, "--gradient_checkpointing"])
    assert len(calls) == once + 3 * LAYERS  # three steps
    plain, saving = (load_checkpoint(bert.root / name).model for name in ("plain.pt", "model.pt"))
    assert all(torch.allclose(plain[name], saving[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("part", [FastDropout, PartialEmbedding])
def test_a_transformer_trains_with_the_fast_parts(bert: Case, monkeypatch: pytest.MonkeyPatch, part: Any) -> None:
    used = []
    forward = part.forward
    monkeypatch.setattr(part, "forward", lambda self, x: used.append(self.training) or forward(self, x))
    train.main(bert.train_flags("--epoch=1", "--max_train_steps=1"))
    assert any(used)  # in training


def test_remove_layers_through_the_stages(bert: Case) -> None:
    train.main(bert.train_flags("--epoch=1", "--bert_remove_layers=0,2"))
    checkpoint = load_checkpoint(bert.root / "model.pt")
    assert load_classifier(checkpoint, []).embedding.transformer.config.num_hidden_layers == LAYERS - 2
    assert load_pretrained(str(bert.root / "out")).config.num_hidden_layers == LAYERS - 2


def test_private_names_of_transformers(tmp_path: Path) -> None:
    """These fail where an upgrade of transformers takes a name away or gives it another meaning."""
    from transformers import AutoModel, AutoModelForTextEncoding, BertConfig, BertModel, T5Config, T5EncoderModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert model_class_of(AutoModel, config) is BertModel
    assert model_class_of(AutoModelForTextEncoding, T5Config()) is T5EncoderModel
    assert model_class_of(AutoModelForTextEncoding, make_unknown_config()) is None
    model = build_of_class(BertModel, config, add_pooling_layer=False)
    assert type(model) is BertModel and model.pooler is None
    assert attention_of(model) == "sdpa" and can_choose_attention(model)
    model.set_attn_implementation("eager")
    assert attention_of(model) == "eager"
    own = load_pretrained(str(make_model("DeBERTa", tmp_path, ["play some jazz"] * 20)))
    assert not can_choose_attention(own)


def make_unknown_config() -> Any:
    """A config of an architecture that no Auto class knows."""
    from transformers import PretrainedConfig

    return type("OwnConfig", (PretrainedConfig,), {})()


# ------------------------------------------------------------------------------------------------------ clear answers


def test_models_that_are_not_there(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = snapshot(bert.root)
    flags = [flag for flag in bert.flags() if not flag.startswith("--bert_model")]
    for stage, more in ((preprocess.main, []), (train.main, ["--device=cpu"])):
        said = refusal(stage, *flags, *more, "--bert_model_name_or_path=./nowhere")
        assert "./nowhere: no such folder" in said
        said = refusal(stage, *flags, *more, "--bert_model_name_or_path=nobody/no-such-model")
        assert "etc/download_hf.py" in said
        said = refusal(stage, *flags, *more, f"--bert_model_name_or_path={bert.root / 'data'}")
        assert "in this folder" in said
    (bert.root / "model/model.safetensors").unlink()
    said = refusal(train.main, *bert.train_flags())
    assert "no usable model" in said and "model.safetensors" in said
    assert set(before) - set(snapshot(bert.root)) == {"model/model.safetensors"}


def test_another_tokenizer(bert: Case, tmp_path: Path) -> None:
    shutil.rmtree(bert.root / "model")
    make_model("BERT", bert.root / "model", ["other words", "and a few more"])
    assert "encoded with the tokenizer of" in refusal(train.main, *bert.train_flags())


def test_too_long_for_the_model(bert: Case) -> None:
    said = refusal(preprocess.main, *bert.flags(f"--n_ctx={POSITIONS + 1}"))
    assert f"n_ctx is {POSITIONS + 1}" in said and f"{POSITIONS} positions" in said


def test_too_long_for_a_model_whose_positions_begin_late(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "RoBERTa")
    preprocess.main(case.flags(f"--n_ctx={POSITIONS}"))  # RoBERTa's first two positions stand for padding
    assert "takes shorter sentences only" in refusal(train.main, *case.train_flags())
    preprocess.main(case.flags(f"--n_ctx={POSITIONS - 2}"))
    train.main(case.train_flags("--max_train_steps=1"))


@pytest.mark.parametrize(("places", "said"), [("3", "layers are 0 to 2"), ("0,1,2", "all of the model's layers"),
                                              ("x", "not a whole number")])
def test_layers_that_cannot_be_removed(bert: Case, places: str, said: str) -> None:
    assert said in refusal(train.main, *bert.train_flags(f"--bert_remove_layers={places}"))


def test_words_have_no_classification_token(bert: Case) -> None:
    (bert.root / "config.json").write_text(json.dumps(make_config("gnb", enc_class="cls")))
    assert "classification token" in refusal(train.main, *bert.train_flags())


def test_raw_text_is_read_as_encoded_text(bert: Case) -> None:
    checkpoint = load_checkpoint(bert.root / "model.pt")
    encoder = make_tokenizer(checkpoint.run.vocabulary, checkpoint.run.encoding)
    data = EncodedData(bert.root / "data/test.txt.fs")
    for number, line in enumerate((bert.root / "data/test.txt").read_text().splitlines()):
        own = data.token_ids[data.offsets[number] : data.offsets[number + 1]].tolist()
        assert encoder(line.split("\t")[0]) == own


@pytest.mark.parametrize("place", [".", "data", "model.pt", "mine"])
def test_output_folders_that_are_refused_before_training(bert: Case, monkeypatch: pytest.MonkeyPatch,
                                                         place: str) -> None:
    monkeypatch.chdir(bert.root)
    (bert.root / "mine").mkdir()
    (bert.root / "mine/thesis.txt").write_text("all of it")
    before = snapshot(bert.root)
    assert "--bert_output_dir" in refusal(train.main, *bert.train_flags(f"--bert_output_dir={place}"))
    assert {**snapshot(bert.root), "train.log": None} == {**before, "train.log": None}


def test_another_transformer_is_another_identity(bert: Case) -> None:
    model = load_pretrained(str(bert.root / "model"))
    remove_layers(model, [0])
    model.save_pretrained(bert.root / "model")  # beside the same tokenizer
    train.main(bert.train_flags("--epoch=1"))
    assert (bert.root / "model.pt.previous").exists() and (bert.root / "out.previous").exists()


def test_an_interrupted_run_leaves_a_pair(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import trainer

    original = trainer.Trainer.evaluate_and_save

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "evaluate_and_save", interrupted)
    with pytest.raises(SystemExit):
        train.main(bert.train_flags("--epoch=2"))
    evaluate.main(bert.evaluate_flags(f"--bert_output_dir={bert.root / 'out'}"))


def test_a_folder_without_tokenizer(bert: Case) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert.root / "model" / name).unlink()
    assert "tokenizer" in refusal(preprocess.main, *bert.flags())


def test_a_folder_that_brings_code(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((bert.root / "model/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (bert.root / "model/config.json").write_text(json.dumps(config))
    (bert.root / "model/own.py").write_text(f"open({str(bert.root / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refusal(train.main, *bert.train_flags())
    assert not (bert.root / "ran").exists()


def test_fewer_embeddings_than_tokens(bert: Case) -> None:
    model = load_pretrained(str(bert.root / "model"))
    model.resize_token_embeddings(20)
    model.save_pretrained(bert.root / "model")
    assert "more tokens than the model has embeddings" in refusal(train.main, *bert.train_flags())


def test_gradient_checkpointing_where_there_is_none(tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", "ALBERT")
    preprocess.main(case.flags())
    assert "albert models lack it" in refusal(train.main, *case.train_flags("--gradient_checkpointing"))
