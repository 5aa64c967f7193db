"""The page in a browser, from the prompt to the downloaded file. Leaves a screenshot in .pytest_artefacts/page.png."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from trainer.drawing.picture_files import read_metadata
from trainer.web.camera_outline import camera_view

ARTEFACTS = Path(__file__).parents[3] / ".pytest_artefacts"
TIMEOUT = 120_000  # milliseconds; a busy machine is no failure


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    chromium = os.environ.get("HDM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in HDM_CHROMIUM")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, served: Any) -> Iterator[Any]:
    """A tab with the page. It must not contact any other server, and none of its scripts may fail."""
    tab = browser.new_page(viewport={"width": 1000, "height": 1200})
    tab.set_default_timeout(TIMEOUT)
    asked: list[str] = []
    failed: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    tab.goto(served.url)
    tab.wait_for_selector("#draw")
    yield tab
    tab.close()
    assert asked
    assert [url for url in asked if not url.startswith((served.url, "data:", "blob:"))] == []
    assert failed == []


def fill(page: Any, field: str, value: object) -> None:
    page.fill(f"#{field} textarea, #{field} input[type=number]", str(value))
    page.keyboard.press("Tab")


def form(page: Any, *fields: str) -> list[str]:
    return [page.input_value(f"#{field} textarea, #{field} input[type=number]") for field in fields]


def outline(page: Any) -> list[float]:
    return [float(edge) for edge in page.get_attribute("#outline", "data-view").split()]


def wait_for_outline(page: Any, *camera: float) -> None:
    """Until it is where camera_outline.py puts it."""
    edges = json.dumps(astuple(camera_view(*camera)))  # type: ignore[arg-type]
    page.wait_for_function(
        f"""{edges}.every((edge, i) => Math.abs(
            edge - Number(document.querySelector("#outline").dataset.view.split(" ")[i])) < 1e-6)"""
    )


def wait_for_message(page: Any, pattern: str) -> str:
    page.wait_for_function(f"/{pattern}/.test(document.querySelector('#message').textContent)")
    return str(page.text_content("#message")).strip()


def test_a_picture_is_drawn_and_downloaded_with_its_metadata(page: Any, tmp_path: Path) -> None:
    page.fill("#prompt textarea", "red star, night")
    page.fill("#negative textarea", "blue fish")
    slider = page.locator("#x_shift input[type=range]")
    slider.focus()
    for _ in range(25):
        slider.press("ArrowRight")
    wait_for_outline(page, 64, 64, 0.25, 0, 1)
    for field, value in (("zoom", 0.8), ("width", 80), ("steps", 3), ("seed", 11), ("guidance", 2.5)):
        fill(page, field, value)
    wait_for_outline(page, 80, 64, 0.25, 0, 0.8)
    page.click("#draw")
    wait_for_message(page, "80 × 64 pixels, 3 steps, seed 11")
    picture = page.wait_for_selector("#picture img")
    page.wait_for_function("document.querySelector('#picture img').complete")
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [80, 64]
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / "page.png", full_page=True)

    with page.expect_download() as download:
        page.click("#download")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert re.fullmatch(r"000011-red-star-night-[0-9a-f]{6}\.png", path.name)
    wanted = {
        "prompt": "red star, night", "negative": "blue fish", "width": 80, "height": 64, "steps": 3, "seed": 11,
        "guidance": 2.5, "sampler": "euler", "x_shift": 0.25, "y_shift": 0.0, "zoom": 0.8,
    }  # fmt: skip
    origin = read_metadata(path)
    assert {name: origin[name] for name in wanted} == wanted


def test_invalid_input_shows_a_message_and_a_drawing_can_be_stopped(page: Any) -> None:
    fill(page, "steps", 2)
    fill(page, "width", 0)  # not the zoom: gradio brings a slider's number between its ends, now and then
    page.wait_for_selector("#outline.impossible")
    page.click("#draw")
    assert "width 0" in wait_for_message(page, "width 0")
    assert page.is_visible("#message [role=alert]")
    fill(page, "width", 64)
    for field, value, words in (
        ("width", -64, "width -64"),
        ("height", 10**7, "128 pixels at most"),
        ("steps", 10**6, "1000 at most"),
        ("seed", -1, "seed -1"),
        ("guidance", "", "guidance is empty"),
    ):
        before = form(page, field)[0]
        fill(page, field, value)
        page.click("#draw")
        wait_for_message(page, words)
        fill(page, field, before)
    assert page.query_selector("#picture img") is None
    page.click("#draw")  # without a prompt
    wait_for_message(page, "64 × 64 pixels, 2 steps")
    page.wait_for_selector("#picture img")
    fill(page, "steps", 1000)
    page.click("#draw")
    wait_for_message(page, "step [1-9]")
    until = time.monotonic() + TIMEOUT / 1000
    while "stopped" not in page.text_content("#message"):
        assert time.monotonic() < until, page.text_content("#message")
        page.click("#stop")  # on a busy machine a click may come between two steps and be lost, as for a person
        page.wait_for_timeout(200)
    fill(page, "steps", 2)
    page.click("#draw")
    wait_for_message(page, "2 steps, seed")


def test_a_picture_of_the_session_restores_its_settings(page: Any) -> None:
    for prompt, width, x_shift in (("red star", 48, 0.5), ("blue fish", 64, 0)):
        page.fill("#prompt textarea", prompt)
        for field, value in (("width", width), ("x_shift", x_shift), ("steps", 2), ("seed", width)):
            fill(page, field, value)
        page.click("#draw")
        wait_for_message(page, f"{width} × 64 pixels")
    page.wait_for_function("document.querySelectorAll('#history img').length == 2")
    page.locator("#history img").nth(1).click()  # the newest comes first
    wait_for_message(page, "in the form again")
    assert form(page, "prompt", "width", "seed", "x_shift") == ["red star", "48", "48", "0.5"]
    wait_for_outline(page, 48, 64, 0.5, 0, 1)
    assert page.evaluate("document.querySelector('#picture img').naturalWidth") == 48


def test_examples_presets_seeds_and_the_camera_work_in_the_browser(page: Any) -> None:
    page.locator("#examples tbody tr").first.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'red star'")
    page.click("#preset input")
    page.click("text=2:1")
    page.wait_for_function("document.querySelector('#width input').value == '88'")
    assert form(page, "height") == ["48"]
    wait_for_outline(page, 88, 48, 0, 0, 1)
    seeds = set()
    for _ in range(3):
        page.click("#random-seed")
        page.wait_for_function(f"!{json.dumps(['0', *seeds])}.includes(document.querySelector('#seed input').value)")
        seeds.add(form(page, "seed")[0])
    assert len(seeds) == 3
    assert all(0 <= int(seed) < 2**31 for seed in seeds)
    # The outline equals the arithmetic in Python.
    for camera in ((64, 128, -0.4, 0.3, 0.5), (128, 64, 1, -1, 4), (96, 96, 0, 0, 1)):
        for field, value in zip(("width", "height", "x_shift", "y_shift", "zoom"), camera, strict=True):
            fill(page, field, value)
        wait_for_outline(page, *camera)
        left, top, right, bottom = outline(page)
        drawn = page.eval_on_selector("#outline rect.view", "r => [r.width.baseVal.value, r.height.baseVal.value]")
        assert drawn[0] / drawn[1] == pytest.approx(camera[0] / camera[1], rel=1e-4), "the aspect ratio of the picture"
        assert (right - left, bottom - top) == (pytest.approx(2 / camera[4]), pytest.approx(2 / camera[4]))
        assert math.isfinite(drawn[0])
