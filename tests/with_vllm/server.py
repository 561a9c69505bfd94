"""vLLM's OpenAI-compatible server on the loopback, as a user starts it: `vllm serve FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

PATIENCE = 900  # seconds to start within
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_LOGGING_LEVEL": "INFO",
}


class NotStarted(SystemExit):
    """The server has ended, or takes too long; `log` is what it has said."""

    def __init__(self, path: Path) -> None:
        self.log = path.read_text()
        super().__init__(f"{self.log[-6000:]}\nvllm serve did not start; see {path}")


class Server:
    """Serves a folder for as long as the `with` lasts."""

    def __init__(self, folder: Path, log: Path, ranks: int, *options: str) -> None:
        self._log = log
        if ranks > 1:
            options += ("--tensor-parallel-size", str(ranks))
        cores = sorted(os.sched_getaffinity(0))
        shares = [
            cores[rank * len(cores) // ranks :][: len(cores) // ranks] for rank in range(ranks)
        ]
        threads = "|".join(",".join(map(str, share)) for share in shares)
        self._settings = SETTINGS | {"VLLM_CPU_OMP_THREADS_BIND": threads}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        vllm = Path(sys.executable).with_name("vllm")
        self._command = [
            str(vllm), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", "packed", *options,
        ]  # fmt: skip

    def __enter__(self) -> Server:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                env=os.environ | self._settings,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + PATIENCE
        try:
            while not self._ready():
                if self._process.poll() is not None or time.monotonic() > end:
                    raise NotStarted(self._log)
                time.sleep(1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def complete(self, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
        """The choices of `/v1/completions`, one for each prompt of token ids."""
        body = {"model": "packed", "prompt": prompts, "temperature": 0, **options}
        request = Request(
            f"{self._url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=PATIENCE) as response:
            choices = json.load(response)["choices"]
        return sorted(choices, key=lambda choice: choice["index"])

    def _ready(self) -> bool:
        try:
            with urlopen(f"{self._url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (URLError, OSError):
            return False
