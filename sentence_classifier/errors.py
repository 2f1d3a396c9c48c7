"""Errors that are the user's or the disk's, and how a script answers them: with one sentence and exit status 2."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something that the user handed in cannot be used. The message is one sentence for the user.

    A stage answers it with exit status 2, without a traceback and without having overwritten anything.
    """


class FlagError(InputError):
    """A flag that is refused, by itself, or with the other flags, the config or the data."""


class FullDisk(InputError):
    """There is no room for a file."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: cannot be written ({reason}); make room and start again (train.py with --resume): "
                         "what was saved before is untouched.")
        self.strerror = reason


def print_anything() -> None:
    """Make standard output and standard error take any text, whatever encoding the console or the pipe has.

    Into files and pipes text goes in UTF-8, unless PYTHONIOENCODING names another encoding. What an encoding lacks, and
    the bytes of a path that are not text, are printed as escapes, such as \\ub178.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            named = stream.isatty() or os.environ.get("PYTHONIOENCODING")
            stream.reconfigure(encoding=None if named else "utf-8", errors="backslashreplace")


def fail_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a stage's `main`: what the user handed in, or the disk, ends it with a sentence and exit status 2."""

    def wrapped(argv: list[str] | None = None) -> None:
        print_anything()
        try:
            main(argv)
        except KeyboardInterrupt:
            print("interrupted.", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (InputError, OSError) as error:
            said = error if isinstance(error, InputError) or not error.strerror else (
                f"{error.filename or 'writing a file'}: {error.strerror}."
            )
            print(f"error: {said}", file=sys.stderr)
            raise SystemExit(2) from None
        except UnicodeEncodeError as error:
            if error.encoding == "utf-8":
                raise
            print(f"error: {error.object}: this system's encoding of paths, {error.encoding}, lacks some of these "
                  "characters; set the environment variable PYTHONUTF8=1.", file=sys.stderr)
            raise SystemExit(2) from None

    wrapped.__doc__ = main.__doc__
    return wrapped
