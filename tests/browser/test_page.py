import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sources import cifar10

SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
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


def captions(page):
    """The captions of the cards that are shown."""
    return page.locator(".card figcaption").filter(visible=True).all_inner_texts()


def test_an_uploaded_picture_is_named_and_explained(visit, photo):
    page = visit()
    before = page.locator(".large img").get_attribute("src")
    page.get_by_label("Remove Image").click()
    expect(page.locator(".note")).to_contain_text("Choose a picture", timeout=SECONDS)
    page.get_by_test_id("file-upload").set_input_files(photo)
    answer(page, "Evidence for")
    assert page.locator(".large img").get_attribute("src") != before
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


def test_a_file_that_is_no_picture_gets_one_clear_line(visit, tmp_path):
    page = visit()
    page.get_by_label("Remove Image").click()
    fake = tmp_path / "fake.png"
    fake.write_text("<script>alert(1)</script>")
    page.get_by_test_id("file-upload").set_input_files(fake)
    expect(page.get_by_test_id("toast-body")).to_contain_text("no readable image", timeout=SECONDS)
    assert str(tmp_path) not in page.content()


def test_an_example_layer_class_opacity_and_count_can_be_chosen(visit):
    page = visit()
    picture = page.locator(".large img")
    before = picture.get_attribute("src")
    page.get_by_label("Thumbnail 9 of 10").click()
    expect(picture).not_to_have_attribute("src", before, timeout=SECONDS)
    choose(page, "Layer", "layer1, 16 px")
    answer(page, "at layer1")
    choose(page, "Evidence for", "cat")
    answer(page, "Evidence for cat at layer1")
    before = picture.get_attribute("src")
    page.get_by_label("range slider for Opacity").fill("0.2")
    expect(picture).not_to_have_attribute("src", before, timeout=SECONDS)
    page.get_by_label("number input for Classes to name").fill("2")
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
    page.get_by_label("How many").fill("2")
    expect(page.locator("section").first.locator(".card")).to_have_count(2, timeout=SECONDS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tab_fits_the_screen_by_day_and_by_night(visit, tmp_path, size, scheme):
    """SCREENSHOTS=DIR keeps the pictures."""
    page = visit(size, scheme)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    ready = {"A picture": ".large img", "Mistakes": ".card img", "The run": ".plot img"}
    for tab, content in ready.items():
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(content).first).to_be_visible(timeout=SECONDS)
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        page.screenshot(path=folder / f"{size}-{scheme}-{tab.split()[-1].lower()}.png", full_page=True)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
    assert (brightness > 600) if scheme == "light" else (brightness < 150)
