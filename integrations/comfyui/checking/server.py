"""Start ComfyUI's server on loopback, give it graphs, and read its replies."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

STARTS_WITHIN = 240.0


class Server:
    """A ComfyUI server on the CPU; a context manager.

    Attributes:
        progress: ``(value, max)`` of every progress message.
    """

    def __init__(self, comfyui: Path, base: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.client, self.progress = uuid.uuid4().hex, list[tuple[int, int]]()
        self.log = (base / "server.log").open("ab")
        command = [sys.executable, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(base), "--disable-auto-launch", "--disable-api-nodes"]
        self.process = subprocess.Popen(command, cwd=base, stdout=self.log, stderr=self.log)

    def __enter__(self) -> Server:
        end = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                self.version = self.get("/system_stats")["system"]["comfyui_version"]
                break
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    said = Path(self.log.name).read_text(errors="replace").splitlines()[-5:]
                    raise RuntimeError("\n".join(["ComfyUI did not start; its last lines:", *said])) from None
                time.sleep(0.5)
        threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    async def _listen(self) -> None:
        import aiohttp

        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as stream:
            async for message in stream:
                if message.type == aiohttp.WSMsgType.TEXT:
                    told = json.loads(message.data)
                    if told.get("type") == "progress":
                        self.progress.append((told["data"]["value"], told["data"]["max"]))

    def get(self, path: str) -> Any:
        """JSON of a page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: Any) -> Any:
        """JSON of the reply, whatever its status."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text or b"null")

    def queue(self, graph: dict[str, Any]) -> Any:
        """The server's reply to a graph: a prompt's id, or what is wrong with the graph."""
        return self.post("/prompt", {"prompt": graph, "client_id": self.client})

    def wait(self, prompt: str, within: float = 900.0) -> dict[str, Any]:
        """The result of a prompt: its status, and outputs by node."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not finish; see {self.log.name}")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Outputs by node.

        Raises:
            RuntimeError: If the graph is not valid, or fails; with the server's message.
        """
        reply = self.queue(graph)
        if "prompt_id" not in reply or reply.get("node_errors"):
            raise RuntimeError(f"refused: {json.dumps(reply)[:2000]}")
        found = self.wait(reply["prompt_id"])
        if found["status"]["status_str"] != "success":
            raise RuntimeError(error_of(found))
        return found["outputs"]


def error_of(found: dict[str, Any]) -> str:
    """The error message of a failed prompt."""
    for kind, told in found["status"]["messages"]:
        if kind == "execution_error":
            return f"{told['node_type']}: {told['exception_message']}"
        if kind == "execution_interrupted":
            return "interrupted"
    return json.dumps(found["status"])[:2000]
