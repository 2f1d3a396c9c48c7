"""Command lines: a parser that says what was meant, checked values, and flags that several stages share."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sentence_classifier.errors import FlagError

DATA_DIR, EMBEDDING_PATH = "data/snips", "embeddings/glove.6B.300d.txt"  # where no flag says otherwise


def did_you_mean(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """A hint at the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, that answers a misspelt flag with the nearest one.

    What it parses holds under `command` the command line as it was typed; `script` is the stage's __file__.
    """

    def __init__(self, description: str | None, script: str | None = None) -> None:
        super().__init__(prog=Path(script).name if script else None, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    @property
    def actions(self) -> dict[str, argparse.Action]:
        """What add_argument made, by the name that the parsed flags have; argparse has no public name for it."""
        return {action.dest: action for action in self._actions}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {flag!r}{did_you_mean(flag, self._option_string_actions)}")
        parsed.command = " ".join([self.prog, *words])
        return parsed

    def error(self, message: str) -> NoReturn:
        raise FlagError(message)

    def given(self, argv: Sequence[str] | None) -> set[str]:
        """The names of the flags that a command line holds."""
        words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        return {name for name, action in self.actions.items() if words & set(action.option_strings)}


def command_line(parser: Parser, args: argparse.Namespace, leave_out: Collection[str] = ()) -> list[str]:
    """The flags, but for those in `leave_out`, by which `parser` comes to `args` where these are not its defaults."""
    return [word for name, action in parser.actions.items() if name not in leave_out and hasattr(args, name)
            for value in [getattr(args, name)] if value != parser.get_default(name)
            for word in format_flag(action, value)]


def format_flag(action: argparse.Action, value: Any) -> list[str]:
    """A flag with a value of it, as one would type them; a switch that is off is no word, or its --no- form."""
    flags = action.option_strings
    if isinstance(value, bool):
        return [flags[0]] if value else list(flags[1:])
    return [f"{flags[0]}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def positive_int(text: str) -> int:
    """A flag's value that must be a whole number above 0."""
    return natural_int(text, 1)


def thread_count(text: str) -> int:
    """A flag's value that must be a number of threads; 0: the library's choice."""
    return natural_int(text, 0, 1024)  # torch dies by a signal when told to make thousands


def natural_int(text: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """A flag's value that must be a whole number, 0 or above."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is below {low}")
    if value > high:
        raise argparse.ArgumentTypeError(f"{value} is above {high}")
    return value


def number_list(text: str) -> list[int]:
    """A flag's value that must be whole numbers separated by commas."""
    return [natural_int(part) for part in text.split(",")]


def number(low: float = 0.0, high: float = float("inf"), below: bool = False) -> Callable[[str], float]:
    """A checker for a flag's value that must be a number from `low` to `high` (`below`: less than `high`)."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if not low <= value <= high or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {'below ' if below else ''}{high:g}")
        return value

    return convert


def changed(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Flags with other values of some; the flags themselves stay as they are."""
    return argparse.Namespace(**{**vars(args), **changes})


def one_of(args: argparse.Namespace, *flags: str) -> str | None:
    """Which of the flags is set; None: none of them.

    Raises:
        FlagError: two of them are.
    """
    chosen = [flag for flag in flags if getattr(args, flag)]
    if len(chosen) > 1:
        Parser(None).error(f"{' and '.join(f'--{flag}' for flag in chosen)}: choose one of them")
    return chosen[0] if chosen else None
