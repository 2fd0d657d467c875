"""The page at `/`, in a real browser: Debian's Chromium, driven by Playwright."""

import shutil

import httpx
import pytest

from lora_files import demo_lora
from running import serve

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--no-first-run", "--disable-component-update"]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    tab = browser.new_page(viewport={"width": 1200, "height": 800})
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    yield tab
    tab.close()
    assert faults == []


def test_a_prompt_becomes_a_picture_with_progress_on_the_way(page, live_server):
    page.goto(live_server.url)
    sync_api.expect(page.locator("#model")).to_contain_text("demo-image")
    page.fill("#prompt", "a yellow star on a purple background")
    page.fill("#seed", "11")
    page.fill("#steps", "12")
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => {
                for (const bar of document.querySelectorAll('progress')) window.seen.add(bar.value);
            }).observe(document.body, {subtree: true, childList: true, attributes: true});
        }"""
    )
    page.click("#go")
    page.wait_for_selector("#pictures .frame:not(.unfinished) img", timeout=120_000)
    width = page.evaluate("document.querySelector('#pictures img').naturalWidth")
    assert width == 256
    assert len(page.evaluate("[...window.seen]")) > 2, "the progress bar did not move"
    assert "11" in page.locator("#pictures").inner_text()


def test_a_lora_of_the_server_can_be_chosen_with_its_strength(browser, tmp_path):
    (tmp_path / "loras").mkdir()
    demo_lora(tmp_path / "loras/noise.safetensors", seed=1)
    server = serve(tmp_path, ["--lora-dir", str(tmp_path / "loras"), "--no-warmup"])
    try:
        tab = browser.new_page()
        tab.goto(server.url)
        tab.wait_for_selector("#lora-row:not([hidden])")
        assert not tab.is_visible("#lora-strength")
        tab.select_option("#lora", label="noise")
        tab.fill("#lora-strength", "0.6")
        tab.fill("#prompt", "a red circle")
        assert '"strength": 0.6' in tab.text_content("#curl")
        tab.click("#go")
        tab.wait_for_selector("#pictures .frame:not(.unfinished) img", timeout=120_000)
        assert "noise 0.6" in tab.locator("#pictures").inner_text()
    finally:
        server.stop()


def test_an_error_is_shown_in_words(page, live_server):
    page.goto(live_server.url)
    page.fill("#prompt", "a red circle")
    page.fill("#size", "99999x99999")
    page.click("#go")
    page.wait_for_selector("#problem:not([hidden])")
    assert "99999x99999" in page.locator("#problem").inner_text()


def test_it_works_by_keyboard_alone_and_on_a_phone(browser, live_server):
    phone = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme="dark")
    phone.goto(live_server.url)
    sync_api.expect(phone.locator("#model")).to_contain_text("demo-image")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 375
    phone.keyboard.type("a blue circle")
    phone.keyboard.press("Control+Enter")
    phone.wait_for_selector("#pictures .frame:not(.unfinished) img", timeout=120_000)
    phone.close()


def test_it_asks_for_the_key_where_one_is_needed(browser, tmp_path):
    server = serve(tmp_path, ["--api-key", "open-sesame", "--no-warmup"])
    try:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        tab = browser.new_page()
        tab.goto(server.url)
        tab.wait_for_selector("#key")
        tab.fill("#prompt", "a red circle")
        if not tab.is_visible("#key"):
            tab.click("#go")
            tab.wait_for_selector("#key", state="visible")
        tab.fill("#key", "open-sesame")
        tab.click("#go")
        tab.wait_for_selector("#pictures .frame:not(.unfinished) img", timeout=120_000)
    finally:
        server.stop()
