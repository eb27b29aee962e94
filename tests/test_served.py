"""The page as people meet it: `python app.py` in a process of its own."""

import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page is an extra: requirements-app.txt")
import httpx

import serving
from tests.conftest import started
from tests.test_app import HOSTILE
from tests.test_image_file import encoded, with_scans

pytestmark = pytest.mark.slow  # the first waits for the page

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def client(served):
    """Somebody who does not use a browser."""
    with httpx.Client(base_url=served.address, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def picture(tmp_path, sample):
    """An image file of this machine."""
    path = tmp_path / "photo.png"
    Image.fromarray(sample.images[70]).save(path)
    return str(path)


def ask(client, inputs, values):
    """What the page's handler with so many inputs answers, as a browser would ask it."""
    handlers = client.get("config").json()["dependencies"]
    number = next(one["id"] for one in handlers if len(one["inputs"]) == inputs)
    job = {"data": values, "fn_index": number, "session_hash": "visitor"}
    assert client.post("gradio_api/queue/join", json=job).status_code == 200
    parameters = {"session_hash": "visitor"}
    with client.stream("GET", "gradio_api/queue/data", params=parameters) as lines:
        for line in lines.iter_lines():
            if '"process_completed"' in line:
                return line
    raise AssertionError("no answer")


def upload(client, content, name="photo.png"):
    """What an upload is called afterwards, as the page's picture."""
    answer = client.post("gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


def test_the_page_listens_on_this_machine_alone_whatever_the_environment_asks(client, served):
    assert client.base_url.host == "127.0.0.1"
    assert client.get("").status_code == 200
    socket.create_server(("127.0.0.2", client.base_url.port)).close()  # 0.0.0.0 would have taken it
    assert "public" not in served.said and "share" not in served.said


def test_a_site_cannot_point_its_name_at_the_page(client):
    assert client.get("", headers={"host": "attacker.example"}).status_code == 400


def test_a_browser_may_fetch_nothing_from_elsewhere_nor_frame_the_page(client):
    policy = client.get("").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "http:" not in policy and "*" not in policy


def test_an_uploaded_picture_is_classified(client, picture):
    said = ask(client, 5, [upload(client, Path(picture).read_bytes()), 3, "layer1", -1, 0.5])
    assert "Evidence for" in said and "confidences" in said


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_answered_with_one_clear_line(client, name):
    said = ask(client, 5, [upload(client, HOSTILE[name]), 3, "layer1", -1, 0.5])
    assert "This file is no readable image" in said or name == "empty"
    assert said.count("readable image") < 2 and "data:image" not in said


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
@pytest.mark.parametrize("url", [{}, {"url": "http://127.0.0.1:9/a.png"}])
def test_pictures_that_were_not_uploaded_are_not_opened(client, picture, meta, url):
    said = ask(client, 5, [{"path": picture, **url, **meta}, 3, "layer1", -1, 0.5])
    assert "data:image" not in said and '"success":false' in said.replace(" ", "")


@pytest.mark.parametrize("path", ["/etc/passwd", "app.py", str(ROOT / "app.py"), "http://127.0.0.1:9/"])
def test_files_of_this_machine_are_not_served(client, path):
    assert client.get(f"gradio_api/file={path}").status_code == 403


def test_uploads_and_requests_are_bounded(client):
    too_much = {"files": ("a.png", b"x" * (serving.MOST_BYTES + 1))}
    assert client.post("gradio_api/upload", files=too_much).status_code == 413
    assert client.post("gradio_api/upload", content=iter([b"x"])).status_code == 413
    longer = b"x" * (serving.MOST_BYTES + 200_000)
    assert client.post("gradio_api/upload", content=longer).status_code == 413
    whole = {"files": ("a.png", b"x" * serving.MOST_BYTES)}
    assert client.post("gradio_api/upload", files=whole).status_code == 200


@pytest.mark.parametrize("count", [0, -3, 1000, 3.5, 1_000_000])
def test_a_number_of_mistakes_that_is_not_offered_is_refused(client, count):
    assert "not in the list of choices" in ask(client, 4, [-1, -1, "layer1", count])


@pytest.mark.parametrize("opacity", [-3, 7, None])
def test_an_opacity_out_of_bounds_is_brought_back(client, picture, opacity):
    said = ask(client, 5, [upload(client, Path(picture).read_bytes()), 3, "layer1", -1, opacity])
    assert "Evidence for" in said


def test_a_jpeg_that_would_take_minutes_is_refused_at_once(client):
    content = with_scans(encoded("JPEG", 3000, progressive=True), 1000)
    start = time.monotonic()
    said = ask(client, 5, [upload(client, content), 3, "layer1", -1, 0.5])
    assert "1,010 scans, over 100" in said and time.monotonic() - start < 10


def test_other_sites_cannot_make_a_visitor_s_browser_post_to_the_page(client):
    for site in ("cross-site", "same-site"):
        headers = {"sec-fetch-site": site, "origin": "https://attacker.example"}
        files = {"files": ("a.png", b"x")}
        assert client.post("gradio_api/upload", files=files, headers=headers).status_code == 403


def test_only_what_the_page_itself_posts_is_taken(client, picture):
    for path in ("run/x", "api/x", "call/x", "vibe-code", "process_recording", "component_server"):
        job = {"data": [None, 3, "layer1", -1, 0.5], "fn_index": 0, "session_hash": "visitor"}
        assert client.post(f"gradio_api/{path}", json=job).status_code == 404, path
    for path in ("vibe-code", "profiling/summary"):
        assert client.get(f"gradio_api/{path}").status_code in (403, 404, 405), path
    folder = upload(client, Path(picture).read_bytes())
    folder["path"] = str(Path(folder["path"]).parent)
    assert "data:image" not in ask(client, 5, [folder, 3, "layer1", -1, 0.5])


def test_no_programming_interface_is_offered(client):
    info = client.get("gradio_api/info").json()
    assert info == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("docs", "redoc", "openapi.json", "monitoring", "monitoring/summary"):
        assert client.get(path).status_code in (403, 404)


def test_the_page_tells_nothing_of_this_machine_s_folders(client):
    assert str(ROOT) not in client.get("config").text
    assert client.get("config").json()["analytics_enabled"] is False


@pytest.fixture
def visitor(space):
    """Somebody who asks for the Space under its name, of the proxy before it."""
    headers = {"host": f"page.localhost:{space.port}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{space.port}", headers=headers, timeout=60) as client:
        yield client


def test_the_files_of_a_space_show_one_s_own_weights_behind_a_proxy(visitor, picture):
    page = visitor.get("config").json()
    assert page["root"] == str(visitor.base_url).replace("127.0.0.1", "page.localhost").rstrip("/")
    assert "What custom_resnet sees" in visitor.get("config").text
    assert page["analytics_enabled"] is False
    said = ask(visitor, 5, [upload(visitor, Path(picture).read_bytes()), 3, "layer1", -1, 0.5])
    assert "Evidence for" in said


def test_a_space_may_be_framed_by_the_site_that_it_names_and_by_no_other(visitor, space):
    policy = visitor.get("").headers["content-security-policy"]
    assert policy.endswith(f"; frame-ancestors {space.at('course').rstrip('/')}")


def test_a_space_is_as_guarded_as_the_page(visitor):
    assert visitor.post("gradio_api/run/x", json={}).status_code == 404
    headers = {"sec-fetch-site": "cross-site"}
    assert visitor.post("gradio_api/upload", files={"files": b"x"}, headers=headers).status_code == 403
    too_much = {"files": ("a.png", b"x" * (serving.MOST_BYTES + 1))}
    assert visitor.post("gradio_api/upload", files=too_much).status_code == 413
    assert visitor.get("gradio_api/file=cifar10/app.py").status_code == 403


def test_gradio_s_own_command_serves_the_page(tmp_path, small_run):
    flags = [str(small_run), "--allow-host", "page.example"]
    command = [sys.executable, "-m", "gradio", "app.py", "--", *flags]
    with started(command, tmp_path) as page, httpx.Client(trust_env=False, timeout=60) as client:
        assert page.address.startswith("http://127.0.0.1:")
        names = {"page.example": 200, "page.example:80": 200, "attacker.example": 400}
        for name, status in names.items():
            assert client.get(page.address, headers={"host": name}).status_code == status
        assert "frame-ancestors 'none'" in client.get(page.address).headers["content-security-policy"]


def test_demo_is_made_when_it_is_asked_for_and_its_launch_is_guarded(tmp_path):
    code = """
        import app
        assert "demo" not in vars(app)
        from app import demo
        assert app.demo is demo and vars(app)["demo"] is demo
        demo.queue().launch(share=None, show_error=True, allowed_hosts=["page.example"])
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    with started(command, tmp_path, ended=-signal.SIGTERM) as page:
        for host, status in (("page.example", 200), ("localhost", 200), ("attacker.example", 400)):
            answer = httpx.get(page.address, headers={"host": host}, trust_env=False)
            assert answer.status_code == status
        assert "frame-ancestors 'none'" in httpx.get(page.address).headers["content-security-policy"]
