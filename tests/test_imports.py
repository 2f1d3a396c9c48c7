"""The house: imports point downwards only, the runtime stands alone, the root holds the commands."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# From the top down: a module may import from its own floor and from those below it.
FLOORS = (("preprocess", "train", "evaluate", "import_data", "augment_data", "fastformers", "compare", "benchmark"),
          ("benchmarks",), ("training",), ("confidence",), ("compression",), ("model",), ("dataset",), ("pretrained",),
          ("cli",), ("text",), ("util",), ("sentence_classifier",))
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
LIGHT = ("cli", "text", "util", "sentence_classifier")  # no torch, no transformers at the top of a module
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "peft", "tensorboardX"}


def modules() -> list[Path]:
    """The product's modules, by their paths from the root."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.split()
    return [Path(path) for path in listed if not path.startswith(("tests/", "etc/")) and (ROOT / path).exists()]


def imports(source: str, top_only: bool = False) -> Iterator[str]:
    """The top names of what a module imports; what is for type checkers alone stands apart from both."""
    tree = ast.parse(source)
    for checking in [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]:
        tree.body.remove(checking)
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def upward(name: str, source: str) -> list[str]:
    """What a module of the house `name` imports from above, or from another stage."""
    stages = FLOORS[0]
    allowed = (name, {"fastformers": "train"}.get(name))
    return [other for other in imports(source) if other in FLOOR and (
        FLOOR[other] < FLOOR[name] or (other in stages and other not in allowed))]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_downwards(path: Path) -> None:
    name = path.parts[0].removesuffix(".py")
    assert name in FLOOR, f"{path}: on no floor of the house"
    assert upward(name, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("name", "source"), [
    ("text", "from dataset import pad"), ("util", "def f():\n    import training.trainer"),
    ("sentence_classifier", "from util import sha256"), ("evaluate", "from train import run"),
    ("model", "from compression import quantization"), ("cli", "if 1:\n    import evaluate")])
def test_a_planted_upward_import_is_found(name: str, source: str) -> None:
    assert upward(name, source)


@pytest.mark.parametrize(("name", "source"), [
    ("fastformers", "from train import run"), ("training", "import model, util"), ("text", "from text.lines import x"),
    ("cli", "if TYPE_CHECKING:\n    from training.trainer import Trainer")])
def test_imports_downwards_and_of_types_are_fine(name: str, source: str) -> None:
    assert not upward(name, source)


@pytest.mark.parametrize("path", [path for path in modules() if path.parts[0].removesuffix(".py") in LIGHT
                                  or len(path.parts) == 1 and path.stem not in ("model", "dataset")], ids=str)
def test_light_modules_load_no_torch_at_their_top(path: Path) -> None:
    assert HEAVY.isdisjoint(imports((ROOT / path).read_text(encoding="utf-8"), top_only=True))


def test_packages_are_empty_but_for_the_runtime() -> None:
    for path in modules():
        if path.name == "__init__.py" and path.parts[0] != "sentence_classifier":
            assert (ROOT / path).read_text(encoding="utf-8") == "", path


def test_the_root_holds_the_commands_and_what_all_share() -> None:
    root = [path for path in modules() if len(path.parts) == 1]
    assert len(root) <= 11, root
    assert {path.stem for path in root} <= {*FLOORS[0], "model", "dataset", "util"}


@pytest.mark.parametrize("path", [*modules(), *(path.relative_to(ROOT) for path in (ROOT / "etc").glob("*.py"))],
                         ids=str)
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8").count("\n") <= 500
