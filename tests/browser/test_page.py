import os
import re
import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sources import cifar10

SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
READY = {"A picture": ".large figure img", "Mistakes": ".card img", "The run": ".plot table"}
SECONDS = 60_000  # for an answer on a busy machine, in Playwright's milliseconds


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium, or CHROMIUM's, or the one that Playwright fetched."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # for whom Chromium has no sandbox
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] * root)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served):
    """Open the page at some size, and see that nothing goes wrong or elsewhere meanwhile."""
    contexts, troubles = [], []

    def watch(request):
        if not request.url.startswith((served.address, "data:", "blob:")):
            troubles.append(f"fetched {request.url}")

    def open_page(size="desktop", scheme="light"):
        width, height = SIZES[size]
        options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
        context = browser.new_context(**options, device_scale_factor=1 if size == "desktop" else 2)
        context.set_default_timeout(SECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
        page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
        page.goto(served.address)
        answer(page, "Evidence for")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def photo(tmp_path, sample):
    path = tmp_path / "photo.jpg"
    Image.fromarray(sample.images[70]).resize((320, 240)).save(path)
    return path


def answer(page, text):
    """Wait until the caption of the large picture has this text."""
    expect(page.locator(".large figcaption")).to_contain_text(text, timeout=SECONDS)


def choose(page, label, option):
    """Pick from the dropdown of this label that can be seen."""
    page.get_by_label(label, exact=True).filter(visible=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def open_tab(page, tab):
    page.get_by_role("tab", name=tab).click()
    expect(page.locator(READY[tab]).first).to_be_visible(timeout=SECONDS)


def captions(page):
    """The captions of the cards that are shown."""
    return page.locator(".card figcaption").filter(visible=True).all_inner_texts()


def test_an_uploaded_picture_is_named_and_explained(visit, photo):
    page = visit()
    before = page.locator(".large figure img").get_attribute("src")
    page.get_by_label("Remove Image").click()
    expect(page.locator(".note")).to_contain_text("Choose a picture", timeout=SECONDS)
    page.get_by_test_id("file-upload").set_input_files(photo)
    answer(page, "Evidence for")
    assert page.locator(".large figure img").get_attribute("src") != before
    named = page.get_by_test_id("label-output-value").inner_text().strip()
    assert named in cifar10.CLASSES
    answer(page, f"Evidence for {named} at layer2")


def test_a_pasted_picture_is_explained(visit):
    page = visit()
    page.get_by_label("Remove Image").click()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("""async () => {
        const canvas = new OffscreenCanvas(64, 48);
        canvas.getContext("2d").fillRect(8, 8, 30, 20);
        const picture = await canvas.convertToBlob();
        await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]);
    }""")
    expect(page.locator(".note")).to_contain_text("Choose a picture", timeout=SECONDS)
    page.get_by_label("Paste from clipboard").click()
    answer(page, "Evidence for")


@pytest.mark.parametrize(
    "content", ["<script>alert(1)</script>", "<svg width='9' height='9'/>", "GIF89a"]
)
def test_a_file_that_is_no_picture_gets_one_clear_line_in_the_place_of_the_map(visit, tmp_path, content):
    page = visit()
    fake = tmp_path / "fake.png"
    fake.write_text(content)
    page.get_by_label("Remove Image").click()
    page.get_by_test_id("file-upload").set_input_files(fake)
    expect(page.get_by_role("alert")).to_contain_text("This file is no readable image", timeout=SECONDS)
    assert page.content().count("no readable image") == 1
    assert str(tmp_path) not in page.content() and page.locator(".large").count() == 0


def test_an_example_layer_class_opacity_and_count_can_be_chosen(visit):
    page = visit()
    picture = page.locator(".large figure img")
    before = picture.get_attribute("src")
    page.get_by_role("button", name="ship", exact=True).click()
    expect(picture).not_to_have_attribute("src", before, timeout=SECONDS)
    choose(page, "Layer", "layer1, 16 px")
    answer(page, "at layer1")
    choose(page, "Evidence for", "cat")
    answer(page, "Evidence for cat at layer1")
    before = picture.get_attribute("src")
    page.get_by_label("range slider for Opacity").fill("0.2")
    expect(picture).not_to_have_attribute("src", before, timeout=SECONDS)
    choose(page, "Classes to name", "2")
    expect(page.locator("[data-testid$=confidence-set]")).to_have_count(2, timeout=SECONDS)


def test_mistakes_can_be_filtered_by_true_and_predicted_class(visit):
    page = visit()
    page.get_by_role("tab", name="Mistakes").click()
    expect(page.locator("section").first).to_contain_text("surest first", timeout=SECONDS)
    assert len(captions(page)) == 2 * 6 * 3
    choose(page, "True class", "cat")
    expect(page.locator(".card figcaption").nth(1)).to_contain_text("cat", timeout=SECONDS)
    wrong = page.locator("section").first.locator(".card figcaption").all_inner_texts()
    assert wrong and all(text.startswith("true\ncat ") for text in wrong[1::3])
    assert not any(text.startswith("predicted\ncat ") for text in wrong[2::3])
    choose(page, "True class", "any")
    choose(page, "How many", "12")
    expect(page.locator("section").first.locator(".card")).to_have_count(12, timeout=SECONDS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tab_fits_the_screen_by_day_and_by_night(visit, tmp_path, size, scheme):
    """SCREENSHOTS=DIR keeps the pictures."""
    page = visit(size, scheme)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    for tab in READY:
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        for text in page.locator("h1, h2, p, figcaption, label").filter(visible=True).all():
            right = text.evaluate("e => e.getBoundingClientRect().left + e.scrollWidth")
            assert right <= SIZES[size][0] + 1, text.inner_text()
        page.screenshot(path=folder / f"{size}-{scheme}-{tab.split()[-1].lower()}.png", full_page=True)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
    assert (brightness > 600) if scheme == "light" else (brightness < 150)


def violations(page):
    """What axe finds, from moderate on; gradio's own page has no landmarks, which is its matter."""
    found = Axe().run(page).response["violations"]
    return [
        (one["id"], one["impact"], node["html"][:120])
        for one in found
        if one["impact"] != "minor" and one["id"] not in ("region", "landmark-one-main")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_in_any_tab_menu_or_refusal(visit, tmp_path, size, scheme):
    page = visit(size, scheme)
    for tab in READY:
        open_tab(page, tab)
        assert violations(page) == [], tab
    open_tab(page, "A picture")
    page.get_by_label("Layer", exact=True).filter(visible=True).click()
    expect(page.get_by_role("option").first).to_be_visible()
    page.wait_for_timeout(500)  # until it has faded in
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_label("Remove Image").click()
    expect(page.locator(".note").first).to_contain_text("Choose a picture", timeout=SECONDS)
    assert violations(page) == []
    (tmp_path / "fake.png").write_text("hello")
    page.get_by_test_id("file-upload").set_input_files(tmp_path / "fake.png")
    expect(page.get_by_role("alert")).to_be_visible(timeout=SECONDS)
    assert violations(page) == []


@pytest.mark.parametrize("size", SIZES)
def test_what_can_be_clicked_is_24_px_high_and_wide_and_has_a_name(visit, size):
    page = visit(size)
    for tab in READY:
        open_tab(page, tab)
        things = page.locator("button, input, [role=tab], [role=button]").filter(visible=True).all()
        assert len(things) > 5
        for thing in things:
            if thing.evaluate("e => e.closest('[aria-hidden=true], .visually-hidden') !== null"):
                continue
            box = thing.bounding_box()
            name = thing.evaluate("e => e.getAttribute('aria-label') || e.innerText")
            assert name.strip() and min(box["width"], box["height"]) >= 24, (tab, name, box)


def test_whoever_moves_by_keyboard_sees_where_and_reaches_the_examples_by_name(visit):
    page = visit()
    page.get_by_role("tab", name="A picture").focus()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
            const element = document.activeElement, style = getComputedStyle(element);
            const name = element.getAttribute("aria-label") || element.innerText;
            return [name, `${style.outlineWidth} ${style.outlineStyle}`];
        }""")
        if page.evaluate("document.activeElement === document.body"):
            break
        seen.append(name.strip())
        assert outline == "3px solid", name
    assert [name for name in seen if name in cifar10.CLASSES][:10] == list(cifar10.CLASSES)
    assert "range slider for Opacity" in seen and "Paste from clipboard" in seen


@pytest.mark.parametrize("size", SIZES)
def test_an_open_menu_does_not_cover_the_map_that_it_changes(visit, size):
    page = visit(size)
    for label in ("Layer", "Evidence for", "Classes to name"):
        page.get_by_label(label, exact=True).filter(visible=True).click()
        menu = page.get_by_role("listbox").filter(has_text="✓", visible=True).last.bounding_box()
        image = page.locator(".large figure img").bounding_box()
        beside = menu["x"] >= image["x"] + image["width"]
        assert beside or menu["y"] >= image["y"] + image["height"], label
        page.keyboard.press("Escape")


def test_on_a_phone_picture_and_map_are_on_one_screen_and_the_table_says_that_it_scrolls(visit):
    page = visit("phone")
    top = page.locator("#picture").bounding_box()["y"]
    bottom = page.locator(".large figcaption").bounding_box()
    assert bottom["y"] + bottom["height"] - top < SIZES["phone"][1]
    open_tab(page, "The run")
    expect(page.get_by_text("Swipe sideways").first).to_be_visible()
    region = page.get_by_role("region", name="Confusion matrix")
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
    first = page.locator("th[scope=row]").first.bounding_box()
    assert first["x"] >= region.bounding_box()["x"]  # the names of the rows stay


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_of_one_image_can_be_told_from_cells_of_none(visit, scheme):
    page = visit("desktop", scheme)
    open_tab(page, "The run")
    colors = page.evaluate("""() => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
        const paint = (element, back) => {
            canvas.fillStyle = back; canvas.fillRect(0, 0, 1, 1);
            canvas.fillStyle = getComputedStyle(element).backgroundColor; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        };
        const back = getComputedStyle(document.body).backgroundColor;
        const cells = [...document.querySelectorAll(".plot td")].filter(e => e.innerText == "1");
        return cells.map(cell => [paint(document.body, back), paint(cell, back)]);
    }""")
    assert colors
    for back, cell in colors:
        assert sum(abs(one - other) for one, other in zip(back, cell, strict=True)) >= 30


def test_limits_are_told_in_the_units_of_the_docs(visit, tmp_path):
    page = visit()
    (tmp_path / "big.png").write_bytes(b"x" * (8 * 1024**2 + 1))
    page.get_by_label("Remove Image").click()
    page.get_by_test_id("file-upload").set_input_files(tmp_path / "big.png")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(re.compile("8(.0)? MB", re.IGNORECASE), timeout=SECONDS)


def test_a_number_out_of_bounds_is_brought_back_and_no_error(visit):
    page = visit()
    for typed in ("7", "-3", "0.123", ""):
        before = page.locator(".large figure img").get_attribute("src")
        page.get_by_label("number input for Opacity").fill(typed)
        expect(page.locator(".large figure img")).not_to_have_attribute("src", before, timeout=SECONDS)
        assert page.get_by_test_id("toast-body").count() == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_page_works_in_a_frame_of_the_site_that_is_allowed(browser, space, photo, tmp_path, size):
    """SCREENSHOTS=DIR keeps the pictures."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(SECONDS)
    troubles, inside = [], (space.at("course"), space.at("page"), "data:", "blob:")
    page.on("request", lambda one: one.url.startswith(inside) or troubles.append(f"fetched {one.url}"))
    page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
    page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
    page.goto(space.at("course"))
    frame = page.frame_locator("iframe")
    answer(frame, "Evidence for")
    before = frame.locator(".large figure img").get_attribute("src")
    frame.get_by_label("Remove Image").click()
    frame.get_by_test_id("file-upload").set_input_files(photo)
    answer(frame, "Evidence for")
    assert frame.locator(".large figure img").get_attribute("src") != before
    page.screenshot(path=Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"framed-{size}.png")
    frame.get_by_role("tab", name="Mistakes").click()
    expect(frame.locator(".card img").first).to_be_visible(timeout=SECONDS)
    page.close()
    assert troubles == []


@pytest.mark.parametrize("name", ["elsewhere", "course.elsewhere", "other.course"])
def test_the_page_is_refused_in_a_frame_of_another_site(browser, space, name):
    page = browser.new_page()
    with page.expect_event("console", lambda line: "frame-ancestors" in line.text, timeout=SECONDS):
        page.goto(space.at(name))
    frame = page.frame_locator("iframe")
    expect(frame.locator(".headline")).to_have_count(0)
    assert page.frames[1].url.startswith("chrome-error:")
    page.close()


def test_no_site_may_frame_the_page_that_is_served_without_flags(browser, served, space):
    page = browser.new_page()
    page.goto(space.at("course"))
    with page.expect_event("console", lambda line: "frame-ancestors" in line.text, timeout=SECONDS):
        page.locator("iframe").evaluate("(frame, address) => { frame.src = address }", served.address)
    page.close()
