"""A saved transformer's folder is whole at every moment, and what another run left is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from pretrained import saving

SCRIPT = """
import json, os, sys
from types import SimpleNamespace
from pretrained import saving

folder, run_id, identity, moment, way = sys.argv[1:]
renames = 0

def dying(function):
    def counted(*names):
        global renames
        if renames == int(moment):
            os._exit(9)
        renames += 1
        return function(*names)
    return counted

def unknown(*names):
    raise OSError("no such thing here")

os.rename = dying(os.rename)
saving._exchange_at_once = dying(saving._exchange_at_once) if way == "at once" else unknown

class Model:
    config = SimpleNamespace()

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(vars(self.config)))

tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").write_text(run_id))
saving.save_pretrained(Model(), tokenizer, ["no", "yes"], run_id, identity, folder)
"""


def save(folder: Path, run_id: str, identity: str, moment: int = 99, way: str = "at once") -> bool:
    """Save a model in a process of its own that dies before its so many-th rename; whether it got to its end."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), run_id, identity, str(moment), way], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 0


def run_of(folder: Path) -> str:
    """The run that wrote a folder, which must be whole."""
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer.json").read_text() == config[saving.RUN_ID]
    return config[saving.RUN_ID]


@pytest.mark.parametrize("way", ["at once", "by a third name"])
@pytest.mark.parametrize("other", [False, True])
def test_dying_at_any_rename_leaves_a_whole_folder(tmp_path: Path, way: str, other: bool) -> None:
    """Of another run, too, nothing is lost."""
    ended, moment = False, 0
    while not ended:
        place = tmp_path / str(moment)
        folder = place / "bert"
        place.mkdir()
        save(folder, "old", "one")
        ended = save(folder, "new", "other" if other else "one", moment, way)
        if way == "at once":
            assert run_of(folder) in ("old", "new")
        saving.check_output_folder(str(folder), str(place / "data"))  # as the next start does
        assert run_of(folder) in (("new",) if ended else ("old", "new"))
        if other:
            kept = [run_of(path) for path in place.iterdir() if path.name.startswith("bert")]
            assert "old" in kept and ("new" in kept or not ended)
        elif ended:
            assert [path.name for path in place.iterdir()] == ["bert"]
        save(folder, "newest", "one")
        assert run_of(folder) == "newest"
        moment += 1
    assert moment > (2 if way == "at once" else 3) - (not other)


def test_two_folders_change_places(tmp_path: Path) -> None:
    for way in (saving._exchange_at_once, lambda *names: saving._exchange(*names, tmp_path / "between")):
        for name in ("one", "other"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "file").write_text(name)
        way(tmp_path / "one", tmp_path / "other")
        assert [(tmp_path / name / "file").read_text() for name in ("other", "one")] == ["one", "other"]
    with pytest.raises(OSError):
        saving._exchange_at_once(tmp_path / "one", tmp_path / "nowhere")


def test_a_rename_that_fails_gives_the_folder_back(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError):
        saving._exchange(tmp_path / "nowhere", tmp_path / "target", tmp_path / "between")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
