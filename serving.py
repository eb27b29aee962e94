"""How the web page is served: to whom, under which names, in whose frames, and what it refuses."""

import atexit
import functools
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import PIL
from gradio import routes
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sources.apart import start_reader

ROOT = Path(__file__).parent
MOST_BYTES = 8 * 1024**2  # of an uploaded file
MOST_HEAD = 100_000  # of a request, beside the file in it
# What a visitor of the page posts to; gradio's other ways go past the queue, or keep files elsewhere.
POSTS = {f"/gradio_api/{name}" for name in ("queue/join", "upload", "cancel", "reset", "reset/")}
# What a browser may fetch for the page: nothing from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors "
THEME = gr.themes.Base(
    primary_hue="sky", neutral_hue="slate", radius_size="lg", font="system-ui", font_mono="system-ui"
)
NAME = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"  # of a machine


def launch(
    page: gr.Blocks,
    server_name: str = "127.0.0.1",
    server_port: int | None = None,
    *,
    share: bool | None = False,
    allowed_hosts: Sequence[str] = (),
    allowed_frames: Sequence[str] = (),
    **others: Any,
) -> Any:
    """Serve a page as gradio's own `launch` does, but guarded, and to this machine alone.

    Args:
        server_name: the address to listen at; "0.0.0.0" is every address of the machine.
        server_port: None takes the first free one from 7860 on.
        share: ask gradio for a public address, which works for up to a week.
        allowed_hosts: names under which the page may be asked for, beside "localhost" and numbers.
        allowed_frames: origins, such as "https://huggingface.co", whose pages may frame this one.
        others: for `gradio.Blocks.launch`.

    Returns:
        What gradio's `launch` returns.

    Raises:
        ValueError: nothing can be served so; one line.
    """
    check_address(server_name, server_port)
    check_names(allowed_hosts, allowed_frames)
    if not share:  # gradio asks its own page whether it is there, by a proxy if there is one
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
    names = {name.lower() for name in ("localhost", server_name, socket.gethostname(), *allowed_hosts)}
    guarded = Middleware(guard, names=None if share else names, frames=tuple(allowed_frames))
    start_reader()  # else the first visitor would wait for it
    looks = {"theme": THEME, "css_paths": ROOT / "app.css", "footer_links": [], "inline": False}
    limits = {"max_file_size": MOST_BYTES, "state_session_capacity": 64, "show_error": False}
    without = dict.fromkeys(("enable_monitoring", "run_history", "mcp_server", "ssr_mode", "pwa"), False)
    return gr.Blocks.launch(
        page,
        server_name=server_name,
        server_port=server_port,
        share=bool(share),  # never None: on Colab that means a public address
        blocked_paths=[str(ROOT)],
        app_kwargs={"middleware": [guarded], "openapi_url": None},
        **{**looks, **limits, **without, "allowed_paths": [], **others},
    )


def serve(page: gr.Blocks, host: str, port: int | None, **others: Any) -> None:
    """Serve the page until Ctrl-C; `others` are for `launch`."""
    _, address, public = launch(page, host, port, **others, prevent_thread_lock=True, quiet=True)
    print(f"the page is at {public or address}; Ctrl-C ends it", flush=True)
    page.block_thread()


def guard(app: ASGIApp, names: Collection[str] | None, frames: Sequence[str]) -> ASGIApp:
    """Refuse what no visitor of the page sends, and let browsers fetch nothing from elsewhere.

    Args:
        names: of the page, beside numbers; None allows every name.
        frames: origins that may frame the page.
    """
    policy = POLICY + (" ".join(frames) or "'none'")

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = policy
            await send(message)

        if scope["type"] != "http":
            await app(scope, receive, send)
        elif refusal := refuse(scope, names):
            await PlainTextResponse(*refusal)(scope, receive, send)
        else:
            await app(scope, receive, send_with_policy)

    return guarded


def refuse(scope: Scope, names: Collection[str] | None) -> tuple[str, int] | None:
    """Why a request is refused, and its status; None where it is not."""
    headers = Headers(scope=scope)
    length, host = headers.get("content-length", "0"), headers.get("host", "")
    if names is not None and not is_known(host, names):
        return "The page does not go by this name. Who serves it can allow it: --allow-host NAME.", 400
    if "transfer-encoding" in headers or not length.isdigit() or int(length) > MOST_BYTES + MOST_HEAD:
        return "The request is too long.", 413
    if scope["method"] == "POST" and headers.get("sec-fetch-site", "").endswith("-site"):
        return "The request is another site's.", 403
    if scope["method"] == "POST" and scope["path"] not in POSTS:
        return "There is no such thing.", 404
    return None


def is_known(host: str, names: Collection[str]) -> bool:
    """Whether a Host header is a number or one of some names; another site's name could point at us."""
    name = re.sub(r":\d*$", "", host).lower()
    try:
        return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return name in names


@functools.cache  # one folder for all pages of a process
def private_uploads() -> None:
    """Keep uploads, until the process ends, in a folder of our own, not in the /tmp/gradio of all."""
    folder = tempfile.TemporaryDirectory(prefix="page-")
    atexit.register(folder.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    routes.DEFAULT_TEMP_DIR = folder.name  # where gradio makes a folder that it never removes


def check_address(host: str, port: int | None) -> None:
    """Refuse an address that nothing can be served at, which gradio would try for minutes."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must be 1 to 65535, not {port}")
    try:
        socket.create_server((host or "?", port or 0)).close()
    except OSError as error:
        raise ValueError(f"{host}, port {port or 'any'}: {error.strerror}") from None


def check_names(hosts: Sequence[str], frames: Sequence[str]) -> None:
    """Refuse names that no Host header has, and origins that no browser would understand."""
    for host in hosts:
        if not re.fullmatch(NAME, host):
            raise ValueError(f"an allowed host is a name alone, as page.example is, not {host!r}")
    for frame in frames:
        if not re.fullmatch(rf"https?://{NAME}(:[0-9]+)?", frame):
            raise ValueError(
                f"an allowed frame is a site without a path, as https://huggingface.co is, not {frame!r}"
            )


def check_pillow() -> None:
    """Refuse the Pillow that gradio asks for: a page opens pictures that others made."""
    if int(PIL.__version__.split(".")[0]) < 13:
        raise ValueError(
            f"pillow {PIL.__version__} can be taken over by a picture (CVE-2026-112403); "
            "run: pip install --no-deps 'pillow>=13'"
        )
