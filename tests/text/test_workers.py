"""Pieces spread over processes: the order of the results, errors, deaths, few under way at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from helpers import ROOT

from sentence_classifier.errors import InputError
from text.workers import Workers


def slow_square(number: int) -> int:
    time.sleep(0.01 * (number % 3 == 0))
    return number * number


def fail(number: int) -> int:
    if number in (4, 5):
        raise InputError(f"file:{number}: bad.")
    return number


def die(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


@pytest.fixture(scope="module")
def three() -> Iterator[Workers]:
    with Workers(3) as workers:
        yield workers


def test_results_come_in_order_and_few_pieces_are_under_way(three: Workers) -> None:
    for workers in (Workers(1), three):
        begun = 0

        def pieces() -> Iterator[int]:
            nonlocal begun
            for number in range(40):
                begun = number
                yield number

        for number, result in enumerate(workers.map(slow_square, pieces())):
            assert result == number * number and begun <= number + 2 * workers.number


def test_the_first_error_is_raised_after_what_comes_before_it(three: Workers) -> None:
    for workers in (Workers(1), three):
        seen = []
        with pytest.raises(InputError, match="file:4: bad."):
            seen.extend(number for number in workers.map(fail, range(9)))
        assert list(workers.map(slow_square, [2])) == [4]  # the others go on


def test_a_process_that_dies_is_said() -> None:
    with Workers(2) as workers, pytest.raises(InputError, match="one of the 2 processes of --num_workers died"):
        list(workers.map(die, range(9)))


def test_processes_end_with_the_one_that_started_them() -> None:
    program = ("import time; from text.workers import Workers\nif __name__ == '__main__':\n"
               "    with Workers(2) as workers:\n        print(set(workers.map(abs, range(9))), flush=True)\n"
               "        time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=60)[1]
