"""Sees when another process of the same work has failed or is gone, and ends this one then.

A process that waits for another on a GPU cannot be woken up, so a thread beside it looks, and
another one hears what torchrun tells all processes once one has died: to end (SIGTERM). What they
end is safe: whatever counts is in a journal on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from zqfp_convert.errors import ProcessError

BEAT = 0.5  # seconds between two signs of life
GONE = 120.0  # seconds without one; a thread may have to wait while another one writes a file
GRACE = 5.0  # seconds that a process has to find out by itself that another one has failed
EXIT_CODE = 2
SILENT = "does not answer any more"
ENDED = "was told to end (SIGTERM)"


class Watch:
    """Tells the other processes of a failure here, and ends this one for a failure there.

    A context around the work. The first process to fail raises its error, which is for it to
    print. Others raise `ProcessError` where they are to say it, and end silently
    elsewhere.
    """

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self._rank, self._size, self._local_rank = rank, size, local_rank
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        distributed: Any = dist
        store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = distributed.PrefixStore(f"zqfp-convert/{attempt}", store)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._speaking = threading.Lock()
        self._heard: Heard | None = None

    def __enter__(self) -> Watch:
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._heard = Heard()
            threading.Thread(target=self._hear, name="hear", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        first = error is not None and not isinstance(error, ProcessError) and self._tell(error)
        with self._speaking:  # else the same might be said here and there
            self._left.set()
        if self._heard is not None:
            self._heard.close()
        if error is None:
            self._thread.join()
            return
        if first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(3 * BEAT)  # the store goes with the first process
        if first or (isinstance(error, ProcessError) and self._speaks(self._told())):
            return
        time.sleep(GRACE)  # torchrun ends the others with this one: first they say why
        _end()

    def lost(self, error: str) -> ProcessError:
        """What has become of a process that could not be met."""
        unknown = {"rank": None, "error": error.splitlines()[0][:200], "host": ""}
        return _error(self._found_out() or unknown, self._size)

    def _found_out(self) -> dict[str, Any] | None:
        """What another process has told, or which one gives no sign of life; None if all do."""
        before, began = self._beats(), time.monotonic()
        while (told := self._told()) is None and time.monotonic() - began < 4 * BEAT:
            time.sleep(BEAT)
        if told is not None:
            return told
        beats = self._beats()
        silent = [rank for rank, beat in enumerate(beats) if beat == before[rank] != -2]
        rank = next((one for one in silent if one != self._rank), None)
        return None if rank is None else {"rank": rank, "error": SILENT, "host": ""}

    def _tell(self, error: BaseException) -> bool:
        """Tell the others what has happened here; whether nothing had happened elsewhere."""
        text = str(error) or type(error).__name__
        told = {"rank": self._rank, "error": text, "host": socket.gethostname()}
        try:
            first: bool = self._store.add("failures", 1) == 1
            if first:
                self._store.set("failed", json.dumps(told))
        except RuntimeError:  # the store has gone, with whoever failed before
            return False
        return first

    def _told(self) -> dict[str, Any] | None:
        try:
            if not self._store.check(["failed"]):
                return None
            found: dict[str, Any] = json.loads(self._store.get("failed"))
        except RuntimeError:
            return {"rank": 0, "error": "its process, or torchrun's, is gone", "host": ""}
        return found

    def _speaks(self, told: dict[str, Any] | None) -> bool:
        """Whether it is for this process to say that another one has failed."""
        elsewhere = told is None or told["host"] != socket.gethostname()
        return self._rank == 0 or (self._local_rank == 0 and elsewhere)

    def _beats(self) -> list[int]:
        """Everybody's last sign of life; -2 for those that have not given one yet."""
        keys = [f"beat{rank}" for rank in range(self._size)]
        try:
            return [int(self._store.get(key)) if self._store.check([key]) else -2 for key in keys]
        except RuntimeError:
            return [-1] * self._size

    def _look(self) -> None:
        seen = [-2] * self._size
        since = [time.monotonic()] * self._size
        count = 0
        while not self._left.wait(BEAT):
            count += 1
            told = self._told()
            if told is None:
                with suppress(RuntimeError):  # `_told` says so the next time
                    self._store.set(f"beat{self._rank}", str(count))
            if told is None and count % 10 == 0:
                now = time.monotonic()
                for rank, beat in enumerate(self._beats()):
                    if beat != seen[rank] or rank == self._rank:
                        seen[rank], since[rank] = beat, now
                    elif now - since[rank] > GONE:
                        text = f"has not given a sign of life for {GONE:.0f} seconds"
                        told = {"rank": rank, "error": text, "host": ""}
            if told is None or self._left.wait(GRACE):
                continue
            self._end_with(told)

    def _hear(self) -> None:
        """Wait until this process is told to end; then find out why, say it, and end it.

        All are told at once, and go on giving signs of life while they find out.
        """
        assert self._heard is not None
        if self._heard.wait():
            own = {"rank": self._rank, "error": ENDED, "host": socket.gethostname()}
            self._end_with(self._found_out() or own)

    def _end_with(self, told: dict[str, Any]) -> None:
        """Say what has happened, where it is for this process to say it, and end it.

        Not where its other thread has left with an error, which is then for that one to say.
        """
        with self._speaking:
            if self._left.is_set():
                return
            if self._speaks(told):
                print(f"Error: {_error(told, self._size)}", file=sys.stderr)  # noqa: T201
            _end()


class Heard:
    """Hears the signal to end, whatever the main thread is doing; made and closed by that one."""

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()
        self._there.setblocking(False)
        # A handler of Python runs in the main thread, when that is free; a byte comes at once.
        self._fd = signal.set_wakeup_fd(self._there.fileno(), warn_on_full_buffer=False)
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait(self) -> bool:
        """Wait for the signal; False where nobody listens any more."""
        while number := self._here.recv(1):  # of any signal that Python handles
            if number[0] == signal.SIGTERM:
                return True
        return False

    def close(self) -> None:
        """Leave signals to what they were left to before."""
        signal.signal(signal.SIGTERM, self._handler)
        signal.set_wakeup_fd(self._fd)
        self._there.close()


def _error(told: dict[str, Any], size: int) -> ProcessError:
    which = "one" if told["rank"] is None else str(told["rank"])
    host = f" on {told['host']}" if told["host"] else ""
    return ProcessError(
        f"process {which} of {size}{host}",
        told["error"],
        needed="all processes to the end",
        do="See what that process has said; the same command goes on from what is done.",
    )


def _end() -> None:
    """End this process at once: its other threads may wait for what will never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
