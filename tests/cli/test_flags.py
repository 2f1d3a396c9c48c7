"""Flags and configs: which value wins, what is refused, and that answering needs no torch."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ENCODERS, ROOT, make_config, refusal, write_config
from hypothesis import given, settings
from hypothesis import strategies as st

import augment_data
import evaluate
import fastformers
import import_data
import preprocess
import train
from cli.config import COMMON_KEYS, EMBEDDING_KEYS, ENCODER_KEYS, load_config
from cli.flags import Parser
from cli.training_flags import CONFIG_FLAGS, DEFAULT_EPOCHS, TABLE, Flag
from sentence_classifier.errors import InputError

STAGES = {"preprocess.py": preprocess, "train.py": train, "evaluate.py": evaluate, "fastformers.py": fastformers}
stages = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)

# --------------------------------------------------------------------------------------------------------- configs

REFERENCE = {  # REFERENCE.md section 3
    "config-glove-gnb": {"enc_class": "gnb", "dropout": 0.2},
    "config-glove-cnn": {"enc_class": "cnn", "num_filters": 256, "kernel_sizes": [2, 3, 4, 5, 6],
                         "fc_hidden_size": 256, "dropout": 0.2},
    "config-densenet-cnn": {"enc_class": "densenet-cnn", "num_filters": 256, "kernel_sizes": [2, 3, 4], "dropout": 0.3,
                            "densenet_kernels": [[1, 1], [3, 3], [3, 5], [3, 7], [3, 9]]},
    "config-densenet-dsa": {"enc_class": "densenet-dsa", "fc_hidden_size": 256, "dropout": 0.3, "dsa_dim": 300,
                            "densenet_kernels": [[1, 1], [3, 3], [5, 5], [7, 7], [9, 9]], "dsa_num_attentions": 8,
                            "dsa_r": 2},
}
DENSENET = {"densenet_first_num_filters": 200, "densenet_num_filters": 100, "densenet_last_num_filters": 400}


def test_a_shipped_config_is_found_from_another_folder(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path and load_config("configs/config-glove-cnn.json")["enc_class"] == "cnn"
    write_config(tmp_path / "configs.json", "gnb")
    assert load_config("configs.json")["enc_class"] == "gnb"


@pytest.mark.parametrize("name", REFERENCE)
def test_shipped_glove_configs(name: str) -> None:
    config = load_config(str(ROOT / "configs" / f"{name}.json"))
    expected = {"emb_class": "glove", "n_ctx": 100, "lowercase": True, "token_emb_dim": 300, "pad_token": "<pad>",
                "pad_token_id": 0, "unk_token": "<unk>", "unk_token_id": 1, **REFERENCE[name],
                **(DENSENET if "densenet" in name else {})}
    assert {key: config.get(key) for key in expected} == expected


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_is_sound(path: Path) -> None:
    load_config(str(path))


@pytest.mark.parametrize(("changes", "says"), [
    ({"enc_class": "cn"}, 'enc_class is "cn" and must be one of gnb, cls, cnn'),
    ({"emb_class": ["glove"]}, "emb_class is"),
    ({"num_filters": 0}, "num_filters is 0 and must be a whole number above 0"),
    ({"num_filters": True}, "num_filters is true"),
    ({"kernel_sizes": []}, "kernel_sizes is []"),
    ({"kernel_sizes": "2,3"}, "kernel_sizes is"),
    ({"dropout": 1.5}, "dropout is 1.5"),
    ({"dropout": float("nan")}, "dropout is NaN"),
    ({"lowercase": "yes"}, 'lowercase is "yes" and must be true or false'),
    ({"pad_token": "a b"}, "pad_token is"),
    ({"pad_token": "\ud800"}, "pad_token is"),
    ({"pad_token_id": 1}, "pad_token_id is 1 and must be 0"),
    ({"tokenizer": "spacy"}, "tokenizer is"),
    ({"tokenizer": ["whitespace"]}, "tokenizer is"),
    ({"lr": "fast"}, "lr is"),
    ({"criterion": {}}, "criterion is"),
    ({"num_filter": 3}, "unknown key 'num_filter' (did you mean 'num_filters'?)"),
    ({"dsa_dim": 3}, "unknown key 'dsa_dim'"),
])
def test_ill_typed_and_unknown_keys(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write_config(tmp_path / "config.json", **changes)
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value)


@pytest.mark.parametrize("enc_class", ENCODERS)
def test_every_required_key_is_missed(tmp_path: Path, enc_class: str) -> None:
    keys = {**COMMON_KEYS, **EMBEDDING_KEYS["glove"], **ENCODER_KEYS[enc_class]}
    required = ["emb_class", "enc_class", *(name for name, key in keys.items() if key.required)]
    for name in required:
        config = make_config(enc_class)
        del config[name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"{name} is missing"):
            load_config(str(tmp_path / "config.json"))


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", num_filters=-1, dropout="x", whatever=1)
    with pytest.raises(InputError, match="(?s)whatever.*dropout.*num_filters"):
        load_config(str(path))


@pytest.mark.parametrize(("content", "says"), [
    (b"", ":1: not valid JSON"), (b'{\n"a": 1,\n}', ":3: not valid JSON"), (b"[]", ": one JSON object is expected"),
    (b'{"a": 1, "a": 2}', ": not usable (the key 'a' stands twice)"), (b'{"a": "\xff"}', ": broken UTF-8"),
    (b"[" * 100_000, ": not usable"), (b'{"n_ctx": ' + b"9" * 5000 + b"}", ": not usable")])
def test_broken_json(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}{says}")


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                        lambda inner: (st.lists(inner, max_size=3)
                                       | st.dictionaries(st.text(max_size=3), inner, max_size=2)), max_leaves=5)
config_keys = st.sampled_from(sorted({"surplus", *make_config("densenet-cnn"), *CONFIG_FLAGS}))


@settings(max_examples=200)
@given(enc_class=st.sampled_from(ENCODERS), changes=st.dictionaries(config_keys, anything, min_size=1, max_size=3))
def test_any_value_is_taken_or_refused_in_a_sentence(shared_path: Path, enc_class: str,
                                                     changes: dict[str, Any]) -> None:
    config = make_config(enc_class, **changes)
    shared_path.write_text(json.dumps(config))
    try:
        assert json.dumps(load_config(str(shared_path))) == json.dumps(config)
    except InputError as error:
        assert str(error).startswith(f"{shared_path}: ")
        assert any(key in str(error) for key in changes)


@pytest.fixture(scope="session")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "config.json"


# ----------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("in_config", "flags", "expected"), [
    ({}, [], 2e-4), ({"lr": 0.5}, [], 0.5), ({"lr": 0.5}, ["--lr=0.25"], 0.25), ({"lr": 0.5}, ["--lr=2e-4"], 2e-4)])
def test_flag_beats_config_beats_default(tmp_path: Path, in_config: dict, flags: list[str], expected: float) -> None:
    path = write_config(tmp_path / "config.json", **in_config)
    args, _ = train.get_params([f"--config={path}", *flags])
    assert args.lr == expected


@pytest.mark.parametrize(("key", "value", "flag", "other"), [
    ("batch_size", 7, "--batch_size=9", 9), ("epoch", 3, "--epoch=5", 5), ("patience", 2, "--patience=1", 1),
    ("embedding_lr", 0.1, "--embedding_lr=0", 0.0), ("warmup_ratio", 0.1, "--warmup_ratio=0", 0.0),
    ("weight_decay", 0.3, "--weight_decay=0", 0.0), ("word_dropout", 0.3, "--word_dropout=0", 0.0),
    ("embedding_dropout", 0.3, "--embedding_dropout=0.1", 0.1), ("ema_decay", 0.9, "--ema_decay=0", 0.0),
    ("measure", "accuracy", "--measure=loss", "loss"), ("embedding_trainable", True, "--no-embedding_trainable", False),
    ("criterion", "LabelSmoothingCrossEntropy", "--criterion=CrossEntropyLoss", "CrossEntropyLoss")])
def test_every_training_key_of_a_config(tmp_path: Path, key: str, value: Any, flag: str, other: Any) -> None:
    path = write_config(tmp_path / "config.json", **{key: value})
    assert getattr(train.get_params([f"--config={path}"])[0], key) == value
    assert getattr(train.get_params([f"--config={path}", flag])[0], key) == other


TYPED = st.one_of(st.integers(-2, 300), st.sampled_from([0.0, 1.0, 2.0, 1e-4, 0.5, 0.99, 0.995, 0.999999, 1e3, 1e6]),
                  st.sampled_from(["loss", "accuracy", "MSELoss", "Hinge", "", "x"]))


@pytest.mark.parametrize(("name", "value"), [("lr", 2), ("ema_decay", 0.999999), ("embedding_dropout", 0.995)])
def test_what_a_flag_takes_a_config_takes(tmp_path: Path, name: str, value: Any) -> None:
    path = write_config(tmp_path / "config.json", **{name: value})
    assert getattr(train.get_params([f"--config={path}"])[0], name) == value
    path = write_config(tmp_path / "config.json")
    assert getattr(train.get_params([f"--config={path}", f"--{name}={value}"])[0], name) == value


@settings(max_examples=300)
@given(flag=st.sampled_from([flag for flag in TABLE if flag.in_config and flag.action is None]), value=TYPED)
def test_a_flag_and_a_config_take_the_same_values(shared_path: Path, flag: Flag, value: Any) -> None:
    """The values of numbers and words, and what the run then holds; a switch is true or false in a config."""
    typed: Any = InputError
    with contextlib.suppress(InputError):
        typed = getattr(train.get_params([f"--config={write_config(shared_path)}", f"--{flag.name}={value}"])[0],
                        flag.name)
    held: Any = InputError
    with contextlib.suppress(InputError):
        held = getattr(train.get_params([f"--config={write_config(shared_path, **{flag.name: value})}"])[0], flag.name)
    assert held == typed


def test_n_ctx_flag_beats_the_config(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.json", n_ctx=20)
    assert preprocess.get_params([f"--config={path}"])[1]["n_ctx"] == 20
    assert preprocess.get_params([f"--config={path}", "--n_ctx=5"])[1]["n_ctx"] == 5


def test_contract_defaults(tmp_path: Path) -> None:
    args, _ = train.get_params([f"--config={ROOT / 'configs/config-glove-gnb.json'}"])
    expected = {"data_dir": "data/snips", "embedding_filename": "embedding.npy", "label_filename": "label.txt",
                "batch_size": 128, "eval_batch_size": 128, "max_train_steps": None, "eval_and_save_steps": 500,
                "num_warmup_steps": None, "warmup_epoch": 0, "save_path": "pytorch-model.pt", "restore_path": None,
                "adam_epsilon": 1e-8, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "log_dir": "runs",
                "seed": 42, "augmented": False}
    assert {name: getattr(args, name) for name in expected} == expected
    args, config = evaluate.get_params([])
    assert (args.model_path, args.batch_size, args.num_examples, args.num_threads) == ("pytorch-model.pt", 1, 0, 0)
    assert config is None
    (tmp_path / "teacher.pt").touch()
    args, _ = fastformers.get_params(["--do_distill", f"--config={ROOT / 'configs/config-bert-cls.json'}",
                                      f"--teacher_model_path={tmp_path / 'teacher.pt'}"])
    expected = {"teacher_config": None, "teacher_bert_model_name_or_path": None,
                "state_loss_ratio": 0, "state_distill_cs": False, "att_loss_ratio": 0, "logging_steps": 500,
                "log_evaluate_during_training": False, "mpl_data_path": None, "mpl_warmup_steps": 1000,
                "mpl_learning_rate": 5e-5, "mpl_weight_decay": 0.1, "target_num_heads": 8, "target_ffn_dim": 2048,
                "dont_normalize_importance_by_layer": False, "model_path": "pytorch-model.pt",
                "save_path_pruned": "pytorch-model-pruned.pt", "bert_output_dir_pruned": "bert-checkpoint-pruned",
                "batch_size": 128, "lr": 2e-4, "save_path": "pytorch-model.pt"}
    assert {name: getattr(args, name) for name in expected} == expected


def test_more_threads_than_a_process_can_have() -> None:
    assert "100000 is above 1024" in refusal(evaluate.main, "--num_threads=100000")
    assert "is above" in refusal(evaluate.main, f"--num_examples={1 << 63}")


@stages
@pytest.mark.parametrize(("flag", "says"), [
    ("--confg=x", "unknown argument '--confg' (did you mean '--config'?)"),
    ("--data-dir=x", "(did you mean '--data_dir'?)"),
    ("--conf=x", "unknown argument '--conf'"),  # no abbreviations
    ("--data=x", "unknown argument '--data'"),
    ("stray", "unknown argument 'stray'"),
    ("--zzzzzz", "unknown argument '--zzzzzz'"),
])
def test_misspelt_flags(stage: Any, flag: str, says: str) -> None:
    assert says in refusal(stage.main, flag)


@pytest.mark.parametrize("flag", [
    "--batch_size=0", "--batch_size=x", "--lr=-1", "--lr=nan", "--lr=inf", "--warmup_epoch=inf", "--seed=-1",
    "--measure=f1",
    f"--seed={1 << 64}", "--criterion=Hinge", "--embedding_dropout=1", "--epoch=1.5", "--mixed_precision=fp8", "--lr"])
def test_flags_out_of_range(flag: str) -> None:
    assert flag.split("=")[0] in refusal(train.main, flag)


@pytest.mark.parametrize("flag", ["--n_ctx=0", "--max_vocab=-1", "--seed=-1"])
def test_preprocess_flags_out_of_range(flag: str) -> None:
    assert flag.split("=")[0] in refusal(preprocess.main, flag)


# ---------------------------------------------------------------------------------------------------------- --help


class Built(Exception):
    """A stage has built its parser."""


def parser_of(stage: Any) -> Parser:
    """A stage's parser."""
    def stop(parser: Parser, *given: Any) -> None:
        raise Built(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Built) as built:
        patch.setattr(Parser, "parse_args", stop)
        stage.get_params([])
    return built.value.args[0]


@pytest.mark.parametrize("stage", [*STAGES.values(), augment_data, import_data])
def test_help_texts_are_full_sentences(stage: Any) -> None:
    parser = parser_of(stage)
    texts = {name: action.help or "" for name, action in parser.actions.items() if name != "help"}
    assert len(texts) > 5
    assert [name for name, text in texts.items() if not re.fullmatch(r"(?s)[A-Z].*[^ .]\.", text)] == []
    for name, text in texts.items():  # with its default, within the sentence
        assert "(default" not in text or re.search(r" \(default: .+\)\.$", text), (name, text)


def test_help_tells_true_defaults() -> None:
    parser = parser_of(train)
    for flag in TABLE:
        text = parser.actions[flag.name].help or ""
        assert flag.in_config == ("(default: the config's" in text), text
        if not flag.says_default and flag.default and flag.action is None:
            assert re.search(rf"\(default: (the config's, else )?{re.escape(str(flag.default))}\)\.$", text), text
    said = parser.format_help()
    assert "highest learning rate (default: the config's, else 2e-4)." in " ".join(said.split())
    assert "(default: the config's, else 64 for word vectors and 3 for transformers)." in " ".join(said.split())
    for kind, epochs in DEFAULT_EPOCHS.items():
        assert str(epochs) in TABLE[[flag.name for flag in TABLE].index("epoch")].says_default, kind
    for name in ("lr", "warmup_epoch"):
        assert float(parser.get_default(name)) == {"lr": 2e-4, "warmup_epoch": 0}[name]


WATCH = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    status = 0
except SystemExit as end:
    status = end.code
heavy = {{"torch", "transformers", "accelerate", "tensorboardX", "sklearn", "matplotlib"}} & set(sys.modules)
print(status or 0, *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--misspelt", 2), ("--config=missing.json", 2)])
def test_help_and_bad_flags_load_no_torch(stage: str, flag: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", WATCH.format(root=str(ROOT)), str(ROOT / stage), flag],
                          capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == str(status), done.stderr
    assert ("usage: " in done.stdout) == (flag == "--help")


def test_preprocessing_loads_no_torch(raw: Any) -> None:
    done = subprocess.run([sys.executable, "-c", WATCH.format(root=str(ROOT)), str(ROOT / "preprocess.py"),
                           *raw.preprocess_flags()], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0", done.stderr
