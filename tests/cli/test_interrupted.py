"""Ctrl-C on a conversion in a process of its own, and the command that it says goes on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"
PROGRAM = [sys.executable, "-m", "zqfp_convert"]


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that starts a job in the background lets it ignore Ctrl-C, and so do we.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_leaves_what_the_same_command_goes_on_from(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    words = [DEMO, out, "--samples", "2", "--seq-len", "64", "--device", "cpu", "--log-file", log]
    process = start(*words)
    journal = Path(f"{out}.partial")
    for _ in range(1200):
        if list(journal.glob("checkpoint/*.safetensors")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert not out.exists()
    assert str(journal) in told
    again = shlex.split(told.splitlines()[-1])
    assert again[0] == "zqfp-convert"
    assert again[1:] == [str(word) for word in words]
    assert "Stopped." in log.read_text()
    done = subprocess.run(
        [*PROGRAM, *again[1:]], check=False, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "unfinished" in done.stdout
    assert "unfinished" not in shown
    assert not journal.exists()
    assert (out / "zqfp_manifest.json").is_file()
