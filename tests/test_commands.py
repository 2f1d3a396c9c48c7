"""What the documents say can be typed, found and read: commands, flags, links, tables, messages. Nothing is run."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from cli import config
from sentence_classifier.errors import InputError

SCRIPTS = ("import_data", "preprocess", "train", "evaluate", "augment_data", "fastformers", "benchmark",
           "download_datasets", "download_embeddings", "download_hf", "make_sample_data", "split")
OTHER_PROGRAMS = ("pip", "mkdir", "cp", "echo", "git", "cd", ".", "tensorboard", "python3", "nvidia-smi")
# Flags of launchers and other programs, and a pattern that stands for several flags.
OTHER_FLAGS = {"--nproc_per_node", "--nnodes", "--rdzv_endpoint", "--rdzv_backend", "--use_env", "--config_file",
               "--logdir"}
SIZES = {"README.md": 12_000, "OPTIMIZATION.md": 9_000, "DISTILLATION.md": 9_000, "FASTFORMERS.md": 9_000}


def documents() -> list[str]:
    """The Markdown files of the repository."""
    done = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split() or [str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]]


def read(name: str) -> str:
    return Path(ROOT, name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# ----------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command: of lines that begin with "$ ", and of code that begins with a program."""
    lines = re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:python|torchrun|accelerate launch|make|sentence-classifier) [^`]+)`", prose(text))
    for line in lines:
        lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("&&", "|", ";"):
                yield [one for one in command if one != "..."]
                command = []
            else:
                command.append(word)


def check_command(words: list[str]) -> None:
    """Read a command through its script's own parser.

    Raises:
        InputError, SystemExit, AssertionError: it cannot be typed so.
    """
    if ">" in words:
        words = words[: words.index(">")]
    program, *rest = words
    if program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr
    elif program == "sentence-classifier":
        check_runtime(rest)
    elif program == "python" and rest[:2] == ["-m", "sentence_classifier"]:
        check_runtime(rest[2:])
    elif program in ("python", "torchrun", "accelerate") and rest[:2] != ["-m", "spacy"]:
        place = next((number for number, word in enumerate(rest) if word.endswith(".py")), None)
        assert place is not None, f"no script in {shlex.join(words)}"
        assert Path(ROOT, rest[place]).is_file(), f"{rest[place]}: no such script"
        importlib.import_module(Path(rest[place]).stem).get_params(rest[place + 1 :])
    else:
        assert program in (*OTHER_PROGRAMS, "python"), f"{program}: an unknown program"


def check_runtime(words: list[str]) -> None:
    """Read the runtime's command line up to the model that it would load."""
    from sentence_classifier import command_line

    class Parsed(Exception):
        pass

    def stop(*args: object) -> None:
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(command_line, "load", stop)
        command_line.main(words)


@pytest.mark.parametrize("name", documents())
def test_commands_can_be_typed(name: str) -> None:
    for words in commands(read(name)):
        try:
            check_command(words)
        except (InputError, SystemExit) as error:
            if not re.search(r"\.pt: no such (file|checkpoint)", str(error)):  # an earlier command trains it
                pytest.fail(f"{shlex.join(words)}: {error}")


def test_commands_are_found() -> None:
    text = ("```\n$ A=1 true # no\n$ python train.py --lr=1 \\\n    --epoch=2 > out && echo a | python x.py -\n```\n"
            "`python benchmark.py table` and `make -s lint`\n")
    assert list(commands(text)) == [
        ["A=1", "true"], ["python", "train.py", "--lr=1", "--epoch=2", ">", "out"], ["echo", "a"],
        ["python", "x.py", "-"], ["python", "benchmark.py", "table"], ["make", "-s", "lint"]]
    assert sum(1 for name in documents() for _ in commands(read(name))) > 80


@pytest.mark.parametrize("line", [
    "python train.py --config=configs/config-glove-cnn.json --embedding_trainabel",
    "python train.py --config=configs/config-glove-rnn.json",
    "python train.py --config=configs/config-glove-cnn.json --lora_r=8",
    "python trian.py",
    "torchrun --nproc_per_node 2 train.py --zero_stage=4",
    "python etc/split.py --data_path=all.txt",
    "sentence-classifier model.onnx --input=a.txt",
    "make no-such-target",
    "pyhton train.py",
])
def test_a_command_that_cannot_be_typed_is_found(line: str) -> None:
    with pytest.raises((InputError, SystemExit, AssertionError)):
        check_command(line.split())


# -------------------------------------------------------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """The flags of all scripts and of the runtime, read off their --help."""
    return {flag for name in (*SCRIPTS, "sentence_classifier") for flag in re.findall(r"--[a-z][\w-]*", help_of(name))}


def help_of(name: str) -> str:
    """What a script prints for --help."""
    command = ["-m", name] if name == "sentence_classifier" else [
        str(next(path for path in (ROOT / f"{name}.py", ROOT / f"etc/{name}.py") if path.exists()))]
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def unknown_flags(text: str, known: set[str]) -> list[str]:
    """The flags in code within the prose that no script has."""
    code = " ".join(re.findall(r"`([^`]+)`", prose(text)))
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known - OTHER_FLAGS)


@pytest.mark.parametrize("name", documents())
def test_flags_exist(name: str, flags: set[str]) -> None:
    assert not unknown_flags(read(name), flags)


def test_an_unknown_flag_is_found(flags: set[str]) -> None:
    assert unknown_flags("`--lr` and `train.py --lrr=1`, --typo, `a --b`", flags) == ["--b", "--lrr"]


def test_every_config_key_is_documented() -> None:
    tables = [config.COMMON_KEYS, *config.EMBEDDING_KEYS.values(), *config.ENCODER_KEYS.values(), config.CONFIG_FLAGS]
    text = read("docs/config.md")
    assert not [key for keys in tables for key in keys if f"`{key}`" not in text]


# ----------------------------------------------------------------------------------------------------- tables, links


def broken_tables(text: str) -> list[str]:
    """The first line of each block of table lines that does not make one table."""
    broken: list[str] = []
    for block in re.findall(r"(?:^\|.*$\n?)+", prose(text), re.MULTILINE):
        lines = block.rstrip("\n").split("\n")
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
        if len(lines) < 3 or not re.fullmatch(r"\|(?: ?:?-+:? ?\|)+", lines[1]) or len(set(cells)) > 1:
            broken.append(lines[0])
    return broken


@pytest.mark.parametrize("name", documents())
def test_tables_are_whole(name: str) -> None:
    assert not broken_tables(read(name))


@pytest.mark.parametrize(("text", "broken"), [
    ("| a | b |\n|---|---|\n| 1 | 2 |\n", []),
    ("| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| 3 | 4 |\n", ["| 3 | 4 |"]),  # an empty line cuts it in two
    ("| a | b |\n|---|---|\n| 1 | 2 | 3 |\n", ["| a | b |"]),
    ("| a | b |\n| 1 | 2 |\n| 3 | 4 |\n", ["| a | b |"]),
    ("```\n| a |\n```\n", []),
])
def test_a_broken_table_is_found(text: str, broken: list[str]) -> None:
    assert broken_tables(text) == broken


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to files that are not there."""
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose(text))
    return [link for link in links if "://" not in link and not (folder / link).exists()]


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name: str) -> None:
    assert not broken_links(read(name), Path(ROOT, name).parent)


def test_a_broken_link_is_found() -> None:
    text = "[a](README.md) [b](docs/none.md) ![c](none.png) [d](https://example.org/x) [e](README.md#install)"
    assert broken_links(text, ROOT) == ["docs/none.md", "none.png"]


# -------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", SIZES)
def test_pages_are_short_and_say_nothing_internal(name: str) -> None:
    assert len(read(name).encode()) <= SIZES[name]
    assert not internal(read(name))


def internal(text: str) -> list[str]:
    """Revision hashes, and columns of goals."""
    return re.findall(r"\b(?=[a-f]*\d)[0-9a-f]{12}\b|aim \||\| met", text)


@pytest.mark.parametrize("text", ["revision 99e21bc4f0d3", "| measured | aim | met |", "| ratio | met |"])
def test_internal_text_is_found(text: str) -> None:
    assert internal(text)


def messages(paths: list[Path]) -> str:
    """All text that the product's strings hold, a line each; {} where a value stands."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def unknown_messages(text: str, known: Callable[[str], bool]) -> list[str]:
    """The messages in the first column of tables that have a column "message", of which the product says no such."""
    unknown = []
    for line in re.findall(r"^\| (.*?) \| .* \| .* \|$", text, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", line):
            parts = re.split(r"\b[A-Z]+\b:?\d*:?|\.\.\.|\(.*?\)", message)  # N, FILE:12, (a list)
            unknown += [message for part in parts if len(part.strip(" :,;")) > 8 and not known(part.strip(" :,;"))]
    return unknown


FOREIGN = "DefaultCPUAllocator CUDA out of memory No space left on device Killed"  # torch's and the system's


def test_troubleshooting_names_real_messages() -> None:
    product = [ROOT / name for name in subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()]
    said = messages([path for path in product if "tests" not in path.parts]) + FOREIGN
    text = read("docs/troubleshooting.md").partition("## What each command costs")[0]
    if product:  # a copy without git has no list of them
        assert not unknown_messages(text, lambda part: part in said)


def test_an_unknown_message_is_found() -> None:
    text = "| `the loss is nan at step N; lower it` | cause | remedy |\n| `FILE:12: no TAB in it` | a | b |\n"
    assert unknown_messages(text, lambda part: part in "no TAB in it") == ["the loss is nan at step N; lower it"]
