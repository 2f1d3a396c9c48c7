"""TensorBoard's curves of a run."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Curves:
    """TensorBoard's curves of a run, written at once. Where the disk is full they break off without ending the run.

    Args:
        folder: of the event files.
        step: points from this step on that an earlier file holds are void.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"))
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._write(step, summary=scalar(name, value))

    def _write(self, step: int, **content: Any) -> None:
        with contextlib.suppress(OSError):
            self.file.write_event(Event(wall_time=time.time(), step=step, **content))
            self.file.flush()
