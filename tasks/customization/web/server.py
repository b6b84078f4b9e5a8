"""Serving the page: on this computer only unless told otherwise, and nothing fetched from any other."""

import asyncio
import errno
import logging
import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.customization.web.studio import Studio

# Scripts of Gradio build functions and styles from text, but come from this server alone.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'none'"
)
HEADERS = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

Scope = dict[str, Any]


def serve(root: Path, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        root: The folder of all profiles.
        host: Address to listen on.
        port: Port; 0 takes any free one.

    Raises:
        ValueError: Gradio is not installed.
        OSError: The address or the port cannot be had.
    """
    # Before Gradio is imported: it would report to its makers, and look for a newer version of itself.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import uvicorn

        from tasks.customization.web.page import build
    except ModuleNotFoundError as error:
        raise ValueError(f"The page needs Gradio (no {error.name} found): pip install 'moe-zoo[demo]'.") from None
    listening = listen(host, port)
    host_is_loopback = is_loopback(host)
    app = application(build(Studio(root)), host_is_loopback)
    shown = f"[{host}]" if ":" in host else host
    print(
        f"Open http://{shown}:{listening.getsockname()[1]} in a browser; Ctrl-C ends it. Profiles: {root}", flush=True
    )
    if not host_is_loopback:
        print("Everyone who can reach this computer can see and change all profiles: there is no password.")
    logging.getLogger("uvicorn.error").addFilter(is_news)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listening])


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the server's log is more than that a window was still open at the end."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "timeout graceful shutdown" not in record.getMessage()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: Address to listen on.
        port: Port; 0 takes any free one.

    Raises:
        OSError: It cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if not 0 <= port <= 65535:
            raise OSError(errno.EINVAL, "ports are 0..65535")
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host} port {port} ({error.strerror or error}): choose others with --host and --port."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether no other computer can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def application(blocks: Any, loopback: bool) -> Any:
    """The ASGI application of a page.

    Args:
        blocks: What `page.build` returns.
        loopback: Whether it listens on this computer alone.
    """
    import fastapi
    import gradio as gr

    from tasks.customization.web.page import asset

    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        "/",
        theme=theme,
        css=asset("page.css"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
    )
    return Guard(app, loopback)


class Guard:
    """Refuses what another site's page asks for in the person's browser, and forbids the page to ask other sites.

    A site can name this computer as its own (DNS rebinding) or post here from its own page; the first is seen by the
    header `Host`, the second by `Origin`.
    """

    def __init__(self, app: Any, loopback: bool) -> None:
        """Wrap an ASGI application.

        Args:
            app: The application.
            loopback: Whether only this computer's own names are right.
        """
        self.app = app
        self.loopback = loopback

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer or refuse a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self.allows(headers.get(b"host", ""), headers.get(b"origin")):
            text = b"This page answers the computer that it runs on, under its own address only."
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text})
            return

        async def send_with_headers(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def allows(self, host: str, origin: str | None) -> bool:
        """Whether a request comes from this page.

        Args:
            host: The header `Host`.
            origin: The header `Origin`, where there is one.
        """
        if self.loopback and urlsplit(f"//{host}").hostname not in LOOPBACK_NAMES:
            return False
        return origin is None or urlsplit(origin).netloc == host
