"""What all stages share: whole files, what is said of a run, checkpoints, seeds, memory, logs, pictures."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from sentence_classifier.decisions import Decision
from sentence_classifier.errors import FullDisk, InputError
from sentence_classifier.labels import SEPARATOR, Labels
from sentence_classifier.lines import open_input
from sentence_classifier.tokenizers import TokenizerInfo

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:  # logs and results files are written without it, too
    import torch

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 2
# In a saved transformer's config.json: the run that it belongs to, and what that was trained from.
RUN_ID, IDENTITY = "classifier_run_id", "classifier_identity"
ROOT = Path(__file__).resolve().parent
# For labels in pictures: Chinese, Japanese and Korean; other scripts; signs.
FONTS = ("Noto Sans CJK JP", "NanumGothic", "Apple SD Gothic Neo", "Malgun Gothic", "Arial Unicode MS",
         "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Segoe UI Symbol", "Noto Emoji", "Symbola")


def setup_logging(log_path: str | None = None) -> None:
    """Log to standard error in logging's default layout, and also to `log_path`.

    Of several processes only the main one says more than warnings, and writes the file.
    """
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main else logging.WARNING)
    if log_path and main:
        try:
            handler = logging.FileHandler(log_path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"{log_path}: cannot be written ({error.strerror}).") from None
        handler.setFormatter(logging.Formatter("%(asctime)s:%(levelname)s:%(name)s:%(message)s"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: what matters says so
        root = logging.getLogger()
        for old in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
            root.removeHandler(old)
            old.close()
        root.addHandler(handler)


def set_seed(seed: int) -> None:
    """Seed every generator that training draws from."""
    import torch

    torch.manual_seed(seed)  # CUDA generators included
    torch.backends.cudnn.deterministic = True


# ---------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that takes `path`'s place, whole and synced to disk, when the block ends well.

    When the block raises, or the process dies in it, whatever stood at `path` stays as it was.

    Raises:
        InputError: `path` cannot be written to; FullDisk: there is no room.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, f".{path.name}.*.tmp")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        text = "b" not in mode
        file = open(temporary, mode, encoding="utf-8" if text else None, newline="\n" if text else None)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place.") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        refuse_full_disk(path, error)
        raise


def refuse_full_disk(path: Path, error: BaseException | None) -> None:
    """Raise FullDisk if it was for want of room on the disk that writing `path` failed, however that was reported."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # as safetensors says it
            number = int(found[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FullDisk(path, os.strerror(number)) from None
        error = error.__context__  # torch.save reports what comes of it


def sweep(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders that nobody has touched for a day: processes that were killed left them."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def previous_name(path: Path) -> Path:
    """A free name under which what stands at `path` may be kept: path.previous, path.previous.2 ..."""
    endings = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (path.with_name(f"{path.name}.previous{ending}") for ending in endings)
    return next(name for name in names if not os.path.lexists(name))


def second_name(path: Path, name: Path) -> None:
    """Give the file at `path` a second name, in the place of a file that may be there."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


@contextlib.contextmanager
def exclusive(flag: str, path: str | None) -> Iterator[None]:
    """Let no other process write within the block to the path of this flag, where the system has file locks.

    It is a file or folder that may not be there yet; None: nothing to do.

    Raises:
        InputError: another process is in such a block.
    """
    if path is None or fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    place = Path(path).absolute()
    place = place.with_name(f".{place.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(place, "a"))
        except OSError as error:
            raise InputError(f"{flag}={path}: cannot be written ({error.strerror}); choose another place.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(place), os.fstat(file.fileno())):
                raise OSError  # removed in between by the run before, and made anew by another
        except OSError:
            raise InputError(f"{flag}={path}: another run is writing to it; wait for its end, or choose another place."
                             ) from None
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 checksum of a file's content, in hexadecimal."""
    with open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextlib.contextmanager
def picture(path: str | os.PathLike[str], rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Draw a PNG file that appears whole: yields matplotlib's figure and its axes, as pyplot.subplots returns them.

    Text in a script that matplotlib's own font lacks is drawn with one of FONTS, where one is installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
        try:
            yield figure, axes
            with atomic_write(path, "wb") as file:
                figure.savefig(file, format="png", dpi=120)
        finally:
            plt.close(figure)


# ------------------------------------------------------------------------------------------------------ the machine


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """From now on this process keeps what memory it frees for its next allocations, where its C library is glibc.

    Each step of a training allocates and frees the same large tensors. glibc would give those of over 32 MB back to the
    system at once, which hands them out anew page by page, each filled with zeros first. For scripts, not for mains
    that others call: the setting is the whole process's, in which another library may count on those zeros.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(option, value)


def git_revision() -> str:
    """The repository's commit, with "-dirty" where tracked files differ from it, or "unknown" outside a checkout."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=ROOT,
                              check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "numpy", "accelerate")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


# ------------------------------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True, kw_only=True)
class EncodingInfo(TokenizerInfo):
    """What made an encoded file; preprocess.py writes it into the file, and a checkpoint holds that of train.txt.

    Attributes:
        vocab_sha256, source_sha256: of the vocabulary's file and of the text.
        sentences, skipped: how many lines were encoded, and how many bad ones were passed over.
        dummy_label: what stands in augmented text in the place of labels that it lacks.
        table: of words, the fingerprint of embedding.npy.
        own_rows, seen_rows: of words, how many rows of the table the vector file lacks, and how many train.txt has.
        leading_special: of subwords, whether each sentence begins with a special token.
        multi_label: whether a sentence may have several labels, or none.
        label_separator: of multi_label, what stands between labels in the text.
    """

    labels: tuple[str, ...]
    vocab_sha256: str
    source_sha256: str = ""
    skip_bad_lines: bool = False
    sentences: int = 0
    skipped: int = 0
    dummy_label: str | None = None
    table: str | None = None
    own_rows: int = 0
    seen_rows: int = 0
    embedding_path: str | None = None
    bert_model_name_or_path: str | None = None
    leading_special: bool = False
    multi_label: bool = False
    label_separator: str | None = None

    def decisive(self) -> dict[str, Any]:
        """What decides about the token ids and the vectors: all but the names of the files that they came from."""
        return {key: value for key, value in self.to_json().items() if not key.endswith("_path")}


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a checkpoint, a state and a .onnx file say of the training run that they come from.

    Attributes:
        run_id: a name that no other run has.
        identity: a hash of config and data: two runs with the same one may replace each other's files.
        flags: train.py's, as resolved.
        vocabulary: the content of the vocabulary's file.
        embedding: what the embedding needs to be built again.
        thresholds: [C] with several labels, the probabilities from which on a sentence has them; chosen on valid.
    """

    run_id: str
    identity: str
    config: dict[str, Any]
    flags: dict[str, Any]
    encoding: EncodingInfo
    vocabulary: str
    embedding: dict[str, Any]
    versions: dict[str, str]
    git_revision: str
    date: str
    command: str
    thresholds: tuple[float, ...] = ()

    @property
    def decision(self) -> Decision:
        """How logits become labels."""
        return Decision(self.encoding.multi_label, tuple(self.thresholds), self.encoding.label_separator or SEPARATOR)

    @property
    def labels(self) -> Labels:
        """The label map."""
        return Labels(self.encoding.labels)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "encoding": self.encoding.to_json()}

    @classmethod
    def from_json(cls, found: dict[str, Any], **changes: Any) -> Self:
        """From what to_json returned.

        Raises:
            TypeError, KeyError: something is missing.
        """
        known = {field.name for field in fields(cls)}
        held = {key: value for key, value in found.items() if key in known}
        held["thresholds"] = tuple(found.get("thresholds", ()))
        return cls(**{**held, "encoding": EncodingInfo.from_json(found["encoding"]), **changes})

    def summary(self) -> dict[str, Any]:
        """What a results file says of the run."""
        keys = ("run_id", "date", "git_revision", "command", "versions", "config", "flags")
        return {key: getattr(self, key) for key in keys}


@dataclass(kw_only=True)
class Checkpoint:
    """A trained model.

    Attributes:
        model: the state dict of the classifier in fp32.
        metrics: on the valid data.
        quantization: what quantization-aware training learned; see compression.quantization.
    """

    run: RunInfo
    model: dict[str, torch.Tensor]
    metrics: dict[str, float]
    quantization: dict[str, Any] | None = None


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str], keep: int = 0) -> None:
    """Write a checkpoint, whole or not at all; see save_state."""
    save_state(checkpoint.run, {key: value for key, value in vars(checkpoint).items() if key != "run"}, path, keep)


def save_state(run: RunInfo, content: dict[str, Any], path: str | os.PathLike[str], keep: int = 0) -> None:
    """Write plain data and tensors of a run, whole or not at all.

    A file at `path` that another config or other data made (its identity differs) is kept aside first. Of others so
    many as `keep` stay as path.1 (the newest), path.2 ...

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    import torch

    path = Path(path)
    if path.exists() and peek_identity(path) != run.identity:
        aside = previous_name(path)
        second_name(path, aside)  # so that `path` itself never goes missing in between
        logger.warning("[%s came from another config or other data and is kept as %s]", path, aside)
    elif path.exists() and keep:
        names = [path.with_name(f"{path.name}.{number}") for number in range(1, keep + 1)]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                os.replace(newer, older)
        second_name(path, names[0])
    with atomic_write(path, "wb") as file:
        torch.save({"format": CHECKPOINT_FORMAT, "run": run.to_json(), **content}, file)


def peek_identity(path: str | os.PathLike[str]) -> str | None:
    """The identity of the checkpoint at `path`, None where the file is not one of ours."""
    try:
        return load_state(path)["run"].identity
    except InputError:
        return None


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint onto the CPU without running code from it.

    Raises:
        InputError: no such file, not a whole checkpoint of this toolkit, or one without a model.
    """
    found = load_state(path)
    if "metrics" not in found:
        raise InputError(f"{path}: the state of a run, which holds no finished model; give that run's --save_path.")
    return Checkpoint(**found)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what save_state wrote likewise: its content, and under "run" the RunInfo."""
    import torch

    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; train.py writes one to its --save_path.")
    if not zipfile.is_zipfile(path):  # torch's own message is about options of torch.save
        raise InputError(f"{path}: not a whole checkpoint of this toolkit (no zip archive, or a truncated one).")
    try:
        # Memory-mapped: an identity can be read without reading the weights. Torch wants a path that is text for it.
        mapped = str(path).isprintable()
        with open(path, "rb") as file:
            found = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises a dozen kinds for a damaged zip; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a whole checkpoint of this toolkit ({reason}).") from None
    try:
        if found.pop("format") != CHECKPOINT_FORMAT:
            raise ValueError
        return {**found, "run": RunInfo.from_json(found["run"])}
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: not a checkpoint of this toolkit, or of another version of it; train again."
                         ) from None


def saved_fact(folder: str | os.PathLike[str], key: str) -> Any:
    """What a saved transformer's config.json says under a key, None where it says nothing."""
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def write_json(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a results file.

    In a path that is not text, the bytes that are none become JSON's escapes and are read back as they were.
    """
    content = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path, "wb") as file:
        file.write(content.encode("utf-8", "backslashreplace"))
