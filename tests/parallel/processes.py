"""Functions run in several processes with a `World`, as torchrun would start them.

They are forked from this one, which has imported torch already; that takes a second, not ten.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

from zqfp_convert.errors import ZqfpError
from zqfp_convert.parallel import World, join

stores: list[TCPStore] = []  # as torchrun has one beside the processes
FAILED = 7  # the exit code for errors that are no user's
PATIENCE = 60.0  # seconds for them to end


def start(count: int, work: Callable[[World], None], log: Path) -> list[int]:
    """Start processes; what they print goes to `log` with the rank as its suffix.

    They wait until all are there: a store's thread that looks up the address of the first one holds
    a lock of the C library, and one that was forked meanwhile would wait for it in vain.
    """
    stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    port = stores[-1].port
    waiting, starting = os.pipe()
    found = []
    for rank in range(count):
        process = os.fork()
        if process == 0:
            os.close(starting)
            os.read(waiting, 1)  # until all ends that could write are closed
            _run(rank, count, port, work, log.with_suffix(f".{rank}"))
        found.append(process)
    os.close(starting)
    os.close(waiting)
    return found


def _run(rank: int, count: int, port: int, work: Callable[[World], None], log: Path) -> None:
    code = 0
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        faulthandler.dump_traceback_later(PATIENCE - 10, file=sys.stderr)  # where it hangs
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        with join("cpu") as world:
            work(world)
    except ZqfpError as error:
        print(f"Error: {error}")
        code = 2
    except BaseException:
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(processes: list[int], seconds: float = PATIENCE) -> list[int]:
    """Their exit codes, or the signals that killed them, negative; fails if they take longer."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            raise AssertionError(f"not all have ended after {seconds} s: {codes}")
        time.sleep(0.01)
    return [codes[process] for process in processes]


def run(count: int, work: Callable[[World], None], log: Path) -> None:
    """Run processes to their end, which has to be a good one."""
    found = start(count, work, log)
    try:
        codes: object = wait(found)
    except AssertionError as error:
        codes = error
    said = "\n".join(log.with_suffix(f".{rank}").read_text() for rank in range(count))
    assert codes == [0] * count, f"{codes}\n{said}"
