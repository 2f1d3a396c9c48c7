"""Fetch a pretrained model of the Hugging Face hub into a folder, to be given as --bert_model_name_or_path.

Reads from the network. Writes the model's config, tokenizer and safetensors weights; code and pickled weights, which
could run code when they are read, stay behind. The folder appears when all of it has come; the same command resumes a
transfer that broke off.

    python etc/download_hf.py --model_name_or_path bert-base-uncased --output_dir embeddings/bert-base-uncased

HF_ENDPOINT names another hub; a private or gated model needs `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import root  # noqa: F401 (puts the folder above on the path)

from cli.flags import Parser
from sentence_classifier.errors import InputError, fail_cleanly
from util import sync_folder


def choose(files: list[str], name: str) -> list[str]:
    """The files that a model is loaded from (subfolders hold other formats); an InputError says what it lacks."""
    patterns = ("model*.safetensors", "*.json", "*.txt", "*.model")  # *.model: a SentencePiece vocabulary
    files = [file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in patterns)]
    if not any(file.endswith(".safetensors") for file in files):
        raise InputError(f"{name}: no safetensors weights, and pickled ones (.bin) could run code when read; take "
                         "another model, or a --revision that has them (often refs/pr/N, see the discussions on the "
                         "model's page).")
    if "config.json" not in files:
        raise InputError(f"{name}: no config.json, so it is not a model for transformers; take another one.")
    return files


def fetch_model(name: str, revision: str, folder: Path) -> None:
    """Download a model to `folder`, missing or empty, whole or not at all; an InputError says what failed."""
    from huggingface_hub import HfApi, errors, snapshot_download

    hub = HfApi()
    try:
        info = hub.model_info(name, revision=revision)
        files = choose([file.rfilename for file in info.siblings or ()], name)
        # Named after the commit, so that what lies there from an earlier attempt belongs to this model and version.
        part = folder.with_name(f"{folder.name}.{str(info.sha)[:12]}.part")
        snapshot_download(name, revision=info.sha, local_dir=part, allow_patterns=files)
        if missing := [file for file in files if not (part / file).is_file()]:  # without a network it only warns
            raise FileNotFoundError(f"{missing[0]} did not come")
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(f"{name}: gated; accept its terms at {hub.endpoint}/{name}, then run `hf auth login`, or set "
                         "HF_TOKEN.") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise InputError(f"{name}: no such model or --revision at {hub.endpoint}, or a private one; correct the name "
                         "(NAME or OWNER/NAME), or run `hf auth login`.") from None
    except Exception as error:  # of the HTTP library, the disk, Xet's transfers: they share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{name}: cannot be downloaded from {hub.endpoint} ({reason}); run the command again where "
                         "the network is up (a proxy: set https_proxy) and the disk has room.") from None
    shutil.rmtree(part / ".cache")  # the library's notes for resuming
    os.replace(part, folder)
    sync_folder(folder.parent)


def get_params(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="The name of the model on the hub.")
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder to make.")
    parser.add_argument("--revision", default="main", help="A branch, a tag or a commit (default: %(default)s).")
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
    print(f"{folder}: complete; pass it as --bert_model_name_or_path", file=sys.stderr)


if __name__ == "__main__":
    main()
