"""vLLM's own server for a comparison in float32: eager, prompts in chunks, the prefix cache on.

    with serving(path, flags, tensor=1, data=1, runner=None) as server:
        httpx.get(f"{server.url}/health")          # waits until it answers

Invariant: it ends with the block, whatever happens in it.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

CHUNK = 64  # tokens a step


class Server:
    """vLLM's, in a process of its own; `url` waits until it answers."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url, self._log = f"http://127.0.0.1:{port}", folder / "log"
        with self._log.open("w") as log:
            told = [*command, "--port", str(port)]
            self._process = subprocess.Popen(told, stdout=log, stderr=subprocess.STDOUT, env=environment)

    @property
    def url(self) -> str:
        for _ in range(1800):
            if self._process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self._url}/health", trust_env=False).status_code == 200:
                    return self._url
            time.sleep(1)
        raise SystemExit(f"vLLM did not start:\n{self._log.read_text()[-6000:]}")

    @property
    def runner(self) -> str:
        """Which of its two it took, as its log says."""
        return "V2" if "Using V2 Model Runner" in self._log.read_text() else "V1"

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextlib.contextmanager
def serving(path: str, flags: list[str], tensor: int, data: int, runner: str | None) -> Iterator[Server]:
    """A server that is on its way. One thread a rank: more than the free cores wait for one another at every layer."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", path, "--served-model-name", "m"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"]
    command += ["--max-num-batched-tokens", str(CHUNK), "--enable-chunked-prefill", "--enable-prefix-caching"]
    command += ["--tensor-parallel-size", str(tensor), "--data-parallel-size", str(data)]
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        counts.mkdir()
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "PROMETHEUS_MULTIPROC_DIR": str(counts),
            **({"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0"} if runner else {}),
        }
        server = Server([*command, *flags], environment, Path(folder))
        try:
            yield server
        finally:
            server.stop()
