"""A real `mlflow server` that a test starts, kills and starts again, its databases, and a proxy to it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from workers import free_port

PATIENCE_S = 180.0


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait until the condition is true; the test fails after three minutes."""
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.3)


class Server:
    """`mlflow server` on a free port; its data outlives its process."""

    def __init__(self, folder: Path, *, database: str) -> None:
        self._folder, self._database, self.port = folder, database, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers; do nothing if it runs."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self._database, "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
        quiet["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # five processes that no test needs
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._answers, f"mlflow server ({self._folder / 'server.log'})")

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "mlflow server has ended"
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False

    def kill(self) -> None:
        """kill -9 the server and the workers that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri)


class Postgres:
    """An empty PostgreSQL database that a test kills and starts again."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("PostgreSQL is not installed: apt install postgresql")
        pytest.importorskip("psycopg2")
        self._folder, self._port, self._tools = (
            Path(tempfile.mkdtemp(prefix="flowmask-pg-")),
            free_port(),
            found[-1].parent,
        )
        self.uri = f"postgresql+psycopg2://flowmask@127.0.0.1:{self._port}/postgres"
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses root
            self._as_user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(self._folder, "postgres")
        self._run("initdb", "-U", "flowmask", "-A", "trust", "-N", "-E", "UTF8")
        self.start()

    def _run(self, tool: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._tools / tool), "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        settings = f"-F -p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "start", "-w", "-t", "120", "-l", str(self._folder / "log"), "-o", settings)

    def kill(self) -> None:
        """End the server as a power cut does: it recovers committed data from its log."""
        self._run("pg_ctl", "stop", "-m", "immediate", "-w")

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class Line:
    """A TCP proxy to a server. A test can cut it, or let it drop the answers."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.state: Literal["open", "silent", "mute", "cut"] = "open"
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, state: Literal["open", "silent", "mute", "cut"]) -> None:
        """open: passes all; silent: accepts, never answers; mute: passes requests, drops answers; cut: refuses."""
        self.state = state
        held, self._held = self._held, []
        for connection in held:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.set("cut")
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            state = self.state
            if state == "cut":
                caller.close()
                continue
            self._held.append(caller)
            if state == "silent":
                continue
            with suppress(OSError):
                server = socket.create_connection(("127.0.0.1", self._target))
                self._held.append(server)
                threading.Thread(target=_pump, args=(caller, server, True), daemon=True).start()
                threading.Thread(target=_pump, args=(server, caller, state == "open"), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, passes: bool) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if passes:
                sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
