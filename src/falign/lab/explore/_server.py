"""Server of the page: on the loopback address alone, and for those alone who know its token."""

import hmac
import secrets
import socket
import warnings
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from falign.lab._text import echo
from falign.lab.config import ConfigError
from falign.lab.explore._page import page

HOST = "127.0.0.1"
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'self'"
)
"""Content security: the browser asks no other place for anything, whatever the page's libraries do."""
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),  # the address has the token in it
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Application that lets nobody through whose address does not begin with the token, or names another host.

    Args:
        app: The application behind it.
        token: The first part of every path.
        port: The port that is listened to.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app = app
        self._token = token.encode()
        self._hosts = (f"{HOST}:{port}".encode(), f"localhost:{port}".encode())

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif not self._admits(scope):
            await _refuse(scope, send)
        else:

            async def answer(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
                await send(message)

            await self.app(scope, receive, answer)

    def _admits(self, scope: dict[str, Any]) -> bool:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if headers.get(b"host") not in self._hosts:  # a name that somebody else has made to mean this machine
            return False
        if origin is not None and origin not in [b"http://" + host for host in self._hosts]:
            return False
        first = scope["path"].encode(errors="replace").split(b"/")[1]
        return hmac.compare_digest(first, self._token)


async def _refuse(scope: dict[str, Any], send: Callable) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it is accepted: 403
        return
    text = b"403: open the address that falign explore has printed, with the token in it\n"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": text})


class _Server(uvicorn.Server):
    """Server that waits for nobody at its end: an open page would hold it up."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note the signal, which is raised again when the server has ended."""
        super().handle_exit(sig, frame)
        self.force_exit = True


def serve(*, runs: Path, store: Path, port: int, browser: bool) -> None:
    """Serve the page until a signal ends it, which is then raised.

    Args:
        runs: Folder of run folders.
        store: Store of ``falign reproduce``.
        port: Port to listen to; 0 is any that is free.
        browser: Whether to open the page in a browser.

    Raises:
        ConfigError: The port is taken, or not allowed.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen()  # before the address is told
            listening.listen()  # before the address is told
        except OSError as error:
            raise ConfigError(f"--port is {port}, which cannot be had ({error.strerror}): leave it out") from None
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        ui.page("/", title="falign explore")(lambda: page(runs, store))
        ui.run_with(app, mount_path=f"/{token}", dark=None, tailwind=False, show_welcome_message=False)
        address = f"http://{HOST}:{port}/{token}/"
        echo(f"the page is {address}\nwhoever has this address can look at it, on this machine alone; Ctrl-C ends it")
        if browser:
            webbrowser.open(address)
        server = _Server(uvicorn.Config(Guard(app, token, port), log_level="critical", timeout_graceful_shutdown=1))
        with warnings.catch_warnings():  # NiceGUI looks at every object there is, and PyTorch has one that complains
            warnings.filterwarnings("ignore", "`torch.distributed.reduce_op`", FutureWarning)
            server.run(sockets=[listening])
