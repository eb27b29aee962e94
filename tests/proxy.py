"""A reverse proxy, as stands before a Space, and pages at other names that frame the one behind it."""

import contextlib
import threading
import time

STYLE = "body { margin: 0; font-family: sans-serif } iframe { width: 100%; height: 820px }"
HOP = {b"connection", b"keep-alive", b"transfer-encoding"}  # of one connection, not of the answer


@contextlib.contextmanager
def reverse_proxy(upstream, port, name):
    """Forward what is asked of a host name; under any other name lies a page that frames this one."""
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.responses import HTMLResponse, StreamingResponse
    from starlette.routing import Route

    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{upstream}", timeout=60, trust_env=False)

    async def answer(request):
        if request.url.hostname != name:
            frame = f'<iframe src="http://{name}:{port}/"></iframe>'
            return HTMLResponse(f"<title>Course</title><style>{STYLE}</style><h1>Course</h1>{frame}")
        headers = {**request.headers, "x-forwarded-proto": "http", "x-forwarded-for": "127.0.0.1"}
        url, content = httpx.URL(str(request.url)).raw_path, await request.body()
        question = client.build_request(request.method, url.decode(), headers=headers, content=content)
        reply = await client.send(question, stream=True)
        plain = StreamingResponse(
            reply.aiter_raw(), reply.status_code, background=BackgroundTask(reply.aclose)
        )
        plain.raw_headers = [pair for pair in reply.headers.raw if pair[0].lower() not in HOP]
        return plain

    @contextlib.asynccontextmanager
    async def lifespan(site):
        async with client:
            yield

    methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]
    site = Starlette(routes=[Route("/{path:path}", answer, methods=methods)], lifespan=lifespan)
    options = {"log_level": "error", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(site, "127.0.0.1", port, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join(30)
