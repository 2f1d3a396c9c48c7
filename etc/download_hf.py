"""Fetch a pretrained model of the Hugging Face hub into a folder, to be given as --bert_model_name_or_path.

Reads from the network. Writes the model's config, tokenizer and safetensors weights; code and pickled weights, which
could run code when they are read, stay behind. The folder appears when all of it has come; a transfer that breaks off
is gone on with by the same command.

    python etc/download_hf.py --model_name_or_path bert-base-uncased --output_dir embeddings/bert-base-uncased

HF_ENDPOINT names another hub; a private or gated model needs `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what is imported below lies beside the stages

from download import locked, optional, say

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly
from util import sync_folder

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def choose(files: list[str], name: str) -> list[str]:
    """Of a model's files those that it is loaded from.

    Args:
        files: their paths on the hub.
        name: the model's, for messages.

    Raises:
        InputError: it lacks a config, or weights that can be read safely.
    """
    files = [file for file in files if "/" not in file]  # subfolders hold other formats
    whole, index = "model.safetensors", "model.safetensors.index.json"
    weights = [whole] if whole in files else [index, *(file for file in files if fnmatch(file, "model-*.safetensors"))]
    if weights == [index] or weights[0] not in files:
        pickled = [file for file in files if any(fnmatch(file, pattern) for pattern in PICKLED)]
        raise InputError(f"{name}: no safetensors weights" + (
            f", only {', '.join(pickled)}, which could run code when read; take another model, or a --revision that "
            "has them (often refs/pr/N, see the discussions on the model's page)." if pickled else
            "; take another model."))
    if "config.json" not in files:
        raise InputError(f"{name}: no config.json, so it is not a model for transformers; take another one.")
    # *.model is a sentencepiece vocabulary.
    rest = [file for file in files if file.endswith((".json", ".txt", ".model")) and file != index]
    return rest + weights


@contextlib.contextmanager
def hub_errors(name: str, endpoint: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into InputError."""
    from huggingface_hub import errors

    page = f"{endpoint}/{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f"{name}: gated; accept its terms at {page}, then run `hf auth login`, or set "
                         "HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: no such --revision; see {page}.") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: no such model at {endpoint}, or a private one; correct the name (often OWNER/NAME), "
                         "or run `hf auth login`.") from None
    except errors.HFValidationError:
        raise InputError(f"{name}: not a model's name; NAME or OWNER/NAME is expected.") from None
    except Exception as error:  # of the HTTP library, the disk, Xet's transfers: they share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{name}: cannot be fetched from {endpoint} ({reason}); run the command again where the "
                         "network is up (a proxy: set https_proxy) and the disk has room.") from None


def fetch_model(name: str, revision: str, folder: Path) -> None:
    """Download a model to `folder`, whole or not at all.

    Args:
        name: on the hub.
        revision: a branch, a tag or a commit.
        folder: must be missing or empty.

    Raises:
        InputError: what failed, and what to do.
    """
    hub = optional("huggingface_hub").HfApi()
    with hub_errors(name, hub.endpoint):
        info = hub.model_info(name, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = choose(sorted(sizes), name)
    say(f"{name} at {info.sha}: {len(files)} files, {sum(sizes[file] for file in files) / 1e6:,.1f} MB")
    # Named after the commit, so that what lies there from an earlier attempt belongs to this model and version.
    part = folder.with_name(f"{folder.name}.{info.sha[:12]}.part")
    part.mkdir(parents=True, exist_ok=True)
    with locked(part.with_name(f"{part.name}.lock")):
        for number, file in enumerate(files, 1):
            say(f"[{number}/{len(files)}] {file}")
            with hub_errors(name, hub.endpoint):
                hub.hf_hub_download(name, file, revision=info.sha, local_dir=part)
        shutil.rmtree(part / ".cache")  # the library's notes for going on
        for file in files:
            with open(part / file, "rb") as opened:
                os.fsync(opened.fileno())
        os.replace(part, folder)
        sync_folder(folder.parent)


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="the model's name on the hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--revision", default="main", help="a branch, tag or commit (default: %(default)s)")
    return parser.parse_args(argv)


@fail_cleanly
def main(argv: list[str] | None = None) -> None:
    """Fetch the model that the command line names."""
    args = get_params(argv)
    folder = args.output_dir.absolute()
    if Path(args.model_name_or_path).is_dir():
        raise InputError(f"{args.model_name_or_path}: a folder on this machine; give it as --bert_model_name_or_path.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: already there; move it away, or choose another --output_dir.")
    fetch_model(args.model_name_or_path, args.revision, folder)
    say(f"{folder}: complete; pass it as --bert_model_name_or_path")


if __name__ == "__main__":
    main()
