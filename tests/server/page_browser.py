"""A real headless Chromium for the tests of the web page."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from page_stub import Stub
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

SECONDS = 30.0  # for what takes a moment on an idle machine
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1200,900"""


def launch(profile: Path) -> webdriver.Chrome:
    """Chromium with a fresh profile; the test is skipped where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


CONTRASTS = """
const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const light = (color) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    const linear = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return /, 0\\)|transparent/.test(color) ? ground(node.parentElement) : color;
};
return Object.fromEntries(arguments[0].map((selector) => {
    const node = [...document.querySelectorAll(selector)].at(-1);
    const [dark, bright] = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => a - b);
    return [selector, (bright + 0.05) / (dark + 0.05)];
}));
"""


class Page:
    """The page of one server, as a person has it before them."""

    def __init__(self, driver: webdriver.Chrome, url: str, stub: Stub | None = None):
        self.driver, self.url, self.stub = driver, url, stub
        driver.get(url)
        self.until("return document.getElementById('state').dataset.state !== 'starting'")

    def js(self, code: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(code, *arguments)

    def until(self, code: str, *arguments: Any) -> Any:
        """What a script returns once it is true."""
        limit = time.monotonic() + SECONDS
        while not (value := self.js(code, *arguments)):
            assert time.monotonic() < limit, f"it did not come about: {code}"
            time.sleep(0.02)
        return value

    def all(self, selector: str) -> list[WebElement]:
        """Elements that can be seen."""
        return [one for one in self.driver.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]

    def one(self, selector: str) -> WebElement:
        """The last of them."""
        return self.all(selector)[-1]

    def text(self, selector: str) -> str:
        """Text of the last element of a selector, seen or not."""
        return self.js("return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector)

    def keys(self, *keys: str) -> None:
        """Types into whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def send(self, text: str, *, wait: bool = True) -> None:
        """Writes a message and, unless told not to, waits for the end of the reply."""
        turns = self.js("return document.querySelectorAll('.turn').length")
        self.one("#message").send_keys(text, Keys.ENTER)
        self.until("return document.querySelectorAll('.turn').length === arguments[0]", turns + 2)
        if wait:
            self.idle()

    def idle(self) -> None:
        """Waits until nothing is being written."""
        self.until("return !document.querySelector('[aria-busy]') && !document.querySelector('.send.stop')")

    def replies(self) -> list[str]:
        """The committed text of every reply."""
        return self.js("return [...document.querySelectorAll('.reply .text')].map((one) => one.textContent)")

    def tokens(self) -> list[dict[str, Any]]:
        """Tokens of the last drawn canvas, with what tells their looks apart."""
        return self.js(
            """return [...[...document.querySelectorAll('.view')].at(-1).querySelectorAll('.tok')].map((node) => {
                const style = getComputedStyle(node), box = node.getBoundingClientRect();
                return {look: node.classList[1], word: node.textContent, title: node.title, display: style.display,
                    line: style.textDecorationLine, dots: style.textDecorationStyle, background: style.backgroundColor,
                    bar: parseFloat(style.backgroundSize.split(' ')[1]), width: box.width, height: box.height,
                    animation: style.animationName};
            })"""
        )

    def slide(self, index: int, selector: str = ".steps input") -> None:
        """Moves a slider as a pointer would."""
        self.js(
            """const slider = [...document.querySelectorAll(arguments[0])].filter((one) => one.offsetParent).at(-1);
            slider.value = arguments[1];
            for (const kind of ['input', 'change']) slider.dispatchEvent(new Event(kind));""",
            selector,
            index,
        )

    def media(self, **features: str) -> None:
        """What the person's system asks for, such as `prefers_color_scheme="dark"`."""
        pairs = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": pairs})

    def width(self, pixels: int) -> None:
        """A screen of this width; 0 is the window's own."""
        if pixels:
            screen = {"width": pixels, "height": 740, "deviceScaleFactor": 2, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        else:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def overflowing(self) -> list[str]:
        """Parts of the page that can be scrolled sideways."""
        return self.js(
            """return ['html', '#log', '#side', '#settings'].filter((one) => {
                const node = document.querySelector(one);
                return node.scrollWidth > node.clientWidth;
            })"""
        )

    def contrasts(self, selectors: list[str]) -> dict[str, float]:
        """Contrast of the text of elements with their ground, as WCAG 2 defines it."""
        return self.js(CONTRASTS, selectors)

    def heard(self) -> list[str]:
        """Every text in the accessibility tree: what a screen reader can reach."""
        nodes = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [
            node["name"]["value"] for node in nodes if not node.get("ignored") and node.get("name", {}).get("value")
        ]
