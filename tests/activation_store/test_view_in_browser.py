"""The page of a store in a real browser: choosing by keyboard, tints, numbers, grids, narrow screens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from picture_stores import HOSTILE, make_page_store

from activation_store import ActivationStore
from activation_store.__main__ import main

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="the browser needs the extra `browser`")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.slow
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DIRECTION = np.arange(16, dtype=np.float32) - 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and its page with a direction of layer 17."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium and chromedriver")
    folder = tmp_path_factory.mktemp("page")
    make_page_store(folder)
    safetensors.numpy.save_file({"up": DIRECTION}, folder / "taste.safetensors", {"layer": "17"})
    words = ["view", f"{folder}/store", "--output", f"{folder}/page.html"]
    assert main([*words, "--direction", f"{folder}/taste.safetensors"]) == 0
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> ActivationStore:
    return ActivationStore(folder / "store")


@pytest.fixture(scope="module")
def browser(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, folder: Path) -> Any:
    """The page as it is opened, 1200 pixels wide; no test leaves an error in the console."""
    browser.set_window_size(1200, 900)
    browser.get(f"file://{folder}/page.html")
    yield browser
    assert browser.get_log("browser") == []


def find(page: Any, selector: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, selector)


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def focus(page: Any, selector: str) -> None:
    """Moves the focus on by Tab, as one without a mouse does, until an element has it."""
    for _ in range(12):
        if page.execute_script("return document.activeElement.matches(arguments[0])", selector):
            return
        press(page, Keys.TAB)
    pytest.fail(f"Tab does not reach {selector}")


def choose(page: Any, control: str, label: str) -> None:
    for option in find(page, control).find_elements(By.CSS_SELECTOR, "option"):
        if option.text.startswith(label):
            option.click()
            return
    pytest.fail(f"{control} has no {label}")


def details(page: Any) -> dict[str, str]:
    """What is said of the chosen token, by name."""
    script = (
        "return [...document.querySelectorAll('#details > span')]"
        ".map(one => [one.firstChild.textContent.trim(), one.lastChild.textContent])"
    )
    return dict(page.execute_script(script))


def until(page: Any, holds: Callable[[], bool]) -> None:
    """Waits for what the browser does in its own time."""
    WebDriverWait(page, 20, poll_frequency=0.05).until(lambda _: holds())


def figure(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", "").split()[0])


def test_tasks_are_chosen_by_arrow_keys(page: Any):
    focus(page, "#tasks > div")
    assert find(page, "#title").text == "mirror-beside"
    press(page, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert find(page, "#title").text == "turn-clockwise"
    assert page.switch_to.active_element.get_attribute("aria-selected") == "true"
    press(page, Keys.HOME)
    assert find(page, "#title").text == "mirror-beside"


def test_the_numbers_of_a_token_are_those_of_its_row(page: Any, store: ActivationStore):
    record = next(iter(store.sequences(task_ids="mirror-beside")))
    choose(page, "#tint", "norm of layer 17")
    focus(page, "#answer > span")
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    said = details(page)
    row = store.rows(record, 17)[record.prompt_length + 2]
    assert figure(said["norm of layer 17"]) == pytest.approx(np.linalg.norm(row), rel=1e-4)
    assert figure(said["log-probability"]) == pytest.approx(store.generated_logprobs(record)[2], rel=1e-4)
    assert said["id"] == str(store.generated_tokens(record)[2])
    assert said["position"] == str(record.prompt_length + 2)


def test_a_token_under_the_pointer_shows_its_part_along_a_direction(page: Any, store: ActivationStore):
    record = next(iter(store.sequences(task_ids="mirror-beside")))
    choose(page, "#tint", "taste: up")
    cell = find(page, "#prompt > span")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    webdriver.ActionChains(page).move_to_element(cell).perform()
    said = details(page)
    value = store.rows(record, 17)[0] @ DIRECTION / np.linalg.norm(DIRECTION)
    assert figure(said["taste: up (layer 17)"]) == pytest.approx(value, rel=1e-3)
    assert (said["position"], said["of the"]) == ("0", "prompt")


def test_the_tint_changes_with_what_is_chosen(page: Any):
    def colours() -> list[str]:
        cells = "[...document.querySelectorAll('#answer > span')]"
        return page.execute_script(f"return {cells}.map(one => one.style.backgroundColor)")

    first = colours()
    assert len(set(first)) > 10
    choose(page, "#tint", "norm of layer 23")
    assert colours() != first
    assert figure(find(page, "#low").text) < figure(find(page, "#high").text)
    choose(page, "#tint", "log-probability")
    assert colours() == first


def test_attention_sinks_are_framed_and_leave_the_scale_to_the_others(page: Any):
    choose(page, "#tint", "norm of layer 10")
    framed = page.find_elements(By.CSS_SELECTOR, "#prompt > span.beyond")
    assert [cell.get_attribute("data-place") for cell in framed] == ["0"]
    assert figure(find(page, "#high").text) < 10
    assert re.search(r"beyond the scale, up to \d{3}", find(page, "#beyond").text)


def test_down_and_up_go_to_the_line_below_and_above(page: Any):
    def top() -> float:
        return page.execute_script("return document.activeElement.getBoundingClientRect().top + scrollY")

    focus(page, "#answer > span")
    lines = [top()]
    for _ in range(2):
        press(page, Keys.ARROW_DOWN)
        lines.append(top())
    assert lines[0] < lines[1] < lines[2]
    assert lines[2] - lines[1] < 40  # pixels: the very next line
    press(page, Keys.ARROW_UP)
    assert top() == lines[1]
    assert details(page)["of the"] == "answer"


def test_wrong_cells_of_an_answer_are_marked(page: Any):
    assert page.find_elements(By.CSS_SELECTOR, ".wrong") == []
    assert find(page, "#verdict").text.startswith("✓ solved")
    choose(page, "#sample", "1")
    assert find(page, "#verdict").text.startswith("✗ not solved")
    cells = page.find_elements(By.CSS_SELECTOR, "#test figure:nth-child(2) i")
    assert [place for place, cell in enumerate(cells) if cell.get_attribute("class")] == [0]
    label = find(page, "#test figure:nth-child(2) .grid").get_attribute("aria-label")
    assert label.startswith("Answer, 8\N{MULTIPLICATION SIGN}3, 1 of 24 cells wrong; rows: ")


def test_an_answer_without_a_grid_and_one_of_another_shape_are_told(page: Any):
    focus(page, "#tasks > div")
    press(page, Keys.ARROW_DOWN)
    assert "there is no grid in it" in find(page, "#test").text
    press(page, Keys.ARROW_DOWN)
    assert "Answer, 3x3, should be 4x3" in find(page, "#test").text.replace("\N{MULTIPLICATION SIGN}", "x")


def test_a_token_that_looks_like_a_script_is_text(page: Any):
    focus(page, "#tasks > div")
    press(page, Keys.ARROW_DOWN)
    texts = [
        cell.text.replace("\N{MIDDLE DOT}", " ")
        for cell in page.find_elements(By.CSS_SELECTOR, "#answer > span")
    ]
    assert HOSTILE in texts
    focus(page, "#answer > span")
    press(page, *[Keys.ARROW_RIGHT] * texts.index(HOSTILE))
    assert json.loads(details(page)["token"]) == HOSTILE
    assert page.find_elements(By.TAG_NAME, "img") == []
    assert page.title == "store"


@pytest.mark.parametrize("task", range(3))
def test_a_screen_of_360_pixels_needs_no_scrolling_to_the_side(page: Any, task: int):
    page.set_window_size(360, 740)
    until(page, lambda: page.execute_script("return window.innerWidth") == 360)
    focus(page, "#tasks > div")
    press(page, *[Keys.ARROW_DOWN] * task)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    outside = "return [...document.querySelectorAll('*')].filter(x => x.getBoundingClientRect().right > 360)"
    assert page.execute_script(outside) == []


def test_the_focus_can_be_seen_and_every_control_has_a_name(page: Any):
    for selector in ("#tint", "#tasks > div", "#sample", "#digits", "#answer > span", "#prompt > span"):
        focus(page, selector)
        style = "return getComputedStyle(document.activeElement).outlineStyle"
        assert page.execute_script(style) != "none", selector
        assert page.switch_to.active_element.accessible_name, selector


def test_a_dark_screen_has_a_dark_page(page: Any):
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert page.execute_script(ground) == "rgb(255, 255, 255)"
    before = find(page, "#answer > span").value_of_css_property("background-color")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        until(page, lambda: page.execute_script(ground) == "rgb(20, 23, 27)")
        until(page, lambda: find(page, "#answer > span").value_of_css_property("background-color") != before)
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_is_asked_of_a_network(page: Any, folder: Path):
    page.get_log("performance")  # of the browser's own start
    page.refresh()
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent}
    assert f"file://{folder}/page.html" in asked
    assert {url for url in asked if not url.startswith(("file://", "data:"))} == set()
