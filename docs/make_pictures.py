"""Make the pictures of these pages from a store: its plots, and the page as a browser shows it.

    python docs/make_pictures.py activations --output docs/images

Needs the extras `plots` and `browser`, Chromium and its driver.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By

from activation_store.__main__ import main as activation_store

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
WIDE, NARROW = (1280, 900), (360, 900)


def open_browser(profile: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def take(browser: webdriver.Chrome, page: Path, picture: Path, scheme: str, tint: str) -> None:
    """Writes a picture of the page: the task that is solved, if one is, with a token chosen."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page.resolve().as_uri())
    tasks = browser.find_elements(By.CSS_SELECTOR, "#tasks > div")
    next((task for task in tasks if "✓" in task.text), tasks[0]).click()
    for option in browser.find_elements(By.CSS_SELECTOR, "#tint option"):
        if option.text.startswith(tint):
            option.click()
            break
    tokens = browser.find_elements(By.CSS_SELECTOR, "#answer > span")
    browser.execute_script("arguments[0].focus({preventScroll: true})", tokens[len(tokens) // 2])
    browser.save_screenshot(str(picture))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the documentation from a store.")
    parser.add_argument("directory", help="the store, made with --extract_prompt")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        assert activation_store(["plot", options.directory, "--output", str(options.output)]) == 0
        assert activation_store(["view", options.directory, "--output", str(page)]) == 0
        browser = open_browser(f"{scratch}/profile")
        try:
            for name, size, scheme, tint in (
                ("page", WIDE, "light", "norm"),
                ("page-dark", WIDE, "dark", "norm"),
                ("page-narrow", NARROW, "light", "log-probability"),
            ):
                browser.set_window_size(*size)
                take(browser, page, options.output / f"{name}.png", scheme, tint)
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
