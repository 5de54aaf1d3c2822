"""The web page in a real browser, for every person and on bad days: looks, keys, screen readers, safety, trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_browser import Page, launch
from page_stub import POEM, STEPS, Stub, settling
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ENTROPY = "[aria-label='Entropy of each token']"
AGAIN = "[aria-label='Write this reply anew']"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One Chromium for all tests; every test has an origin of its own."""
    driver = launch(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A server that makes replies up."""
    with Stub() as one:
        yield one


@pytest.fixture
def page(browser: webdriver.Chrome, stub: Stub) -> Iterator[Page]:
    """The page, open."""
    one = Page(browser, stub.url, stub)
    yield one
    stub.hold.set()
    one.media()
    one.width(0)


def test_dark_and_light(page: Page) -> None:
    page.send("A poem, please")
    ground = "return getComputedStyle(document.body).backgroundColor"
    texts = [".text", ".figures", ".said", "#title", "#state", ".keys", ".legend", "#chats .open", "#new"]
    grounds = {}
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        grounds[scheme] = page.js(ground)
        assert all(ratio >= 4.5 for ratio in page.contrasts(texts).values()), page.contrasts(texts)
    assert grounds["light"] != grounds["dark"]
    page.one("#settings-open").click()
    page.js("document.querySelector('[name=theme][value=light]').click()")
    assert page.js(ground) == grounds["light"]  # chosen, whatever the system asks for
    page.driver.refresh()
    assert page.js(ground) == grounds["light"]


def test_phone_has_no_sideways_scroll(page: Page, stub: Stub) -> None:
    page.width(360)
    stub.reply = f"{POEM} {'unbroken' * 20} and\n```python\n{'x = 1; ' * 30}\n```\nthe end"
    assert page.overflowing() == []
    stub.hold.clear()
    page.send(f"A poem about {'woods' * 30}", wait=False)
    page.until("return document.querySelector('.figures').textContent.includes('step 3')")
    assert page.overflowing() == []
    stub.hold.set()
    page.idle()
    for action in ("", "page", "heat"):
        if action == "page":
            page.slide(2)
        elif action == "heat":
            page.one(ENTROPY).click()
        assert page.overflowing() == [], action
    page.one("#settings-open").click()
    assert page.overflowing() == []
    page.keys(Keys.ESCAPE)
    page.one("#side-open").click()
    assert page.overflowing() == [] and page.js("return document.getElementById('main').inert")
    page.keys(Keys.ESCAPE)
    assert not page.js("return document.getElementById('main').inert")
    assert page.js("return document.activeElement.id") == "side-open"
    small = page.js(
        """return [...document.querySelectorAll('button.tool, button.send')].filter((one) => one.checkVisibility())
            .map((one) => one.getBoundingClientRect()).filter(({width, height}) => Math.min(width, height) < 32)"""
    )
    assert not small  # a finger hits them


def test_a_session_by_keyboard_alone(page: Page, stub: Stub) -> None:
    page.keys("First line")
    page.keys(Keys.SHIFT, Keys.ENTER)
    page.keys("second line", Keys.ENTER)
    page.until("return document.querySelector('.reply')")
    page.idle()
    assert stub.requests[0]["messages"][0]["content"] == "First line\nsecond line"

    def back_to(label: str) -> None:
        for _ in range(12):
            page.keys(Keys.SHIFT, Keys.TAB)
            if page.js("return document.activeElement.getAttribute('aria-label')") == label:
                return
        raise AssertionError(f"no way back to {label}")

    back_to("Write this reply anew")
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    back_to("Entropy of each token")
    back_to("Steps of this reply")
    page.keys(Keys.ARROW_LEFT)
    assert page.all(".view")
    page.js("document.getElementById('message').focus()")
    page.keys(Keys.ARROW_UP)  # the last message, to edit
    page.keys(" and more", Keys.ENTER)
    page.until("return document.querySelector('[aria-busy]') || runs.size === 0")
    page.idle()
    assert stub.requests[-1]["messages"][0]["content"].endswith("second line and more")
    page.keys(Keys.CONTROL, "k")
    assert page.text("#title") == "New chat" and page.js("return document.activeElement.id") == "message"


def test_screen_reader_hears_committed_text_and_no_noise(page: Page, stub: Stub) -> None:
    stub.hold.clear()
    page.send("A poem, please", wait=False)
    page.until("return document.querySelector('.figures').textContent.includes('step 3')")
    seen = {token["word"] for token in page.tokens()}
    assert "wrong" in seen
    heard = " ".join(page.heard())
    assert "A poem, please" in heard and "wrong" not in heard
    assert not any(word in heard.split() for word in seen if len(word) > 5)
    stub.hold.set()
    page.idle()
    region = page.driver.find_element(By.ID, "spoken")
    assert region.get_attribute("aria-live") == "polite"
    told = page.js("return [...document.getElementById('spoken').children].map((one) => one.textContent)")
    assert " ".join(told[:-1]) == POEM
    assert told[-1] == f"Reply finished: {len(POEM.split())} tokens in {2 * STEPS} steps."
    assert POEM in " ".join(page.heard())
    nameless = page.js(
        """return [...document.querySelectorAll('button, input, textarea')].filter((one) => one.checkVisibility()
            && !one.getAttribute('aria-label') && !one.textContent.trim() && !one.labels?.length).length"""
    )
    assert nameless == 0


def test_less_motion_is_honoured(page: Page, stub: Stub) -> None:
    page.media(prefers_reduced_motion="reduce")
    stub.hold.clear()
    page.send("A poem, please", wait=False)
    page.until("return document.querySelector('.figures').textContent.includes('step 3')")
    assert {token["animation"] for token in page.tokens()} == {"none"}


def test_no_request_leaves_the_server(page: Page, stub: Stub) -> None:
    page.js(
        "window.refused = []; addEventListener('securitypolicyviolation', (event) => refused.push(event.blockedURI));"
    )
    page.send("A poem, please")
    page.one(ENTROPY).click()
    page.one("#settings-open").click()
    names = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and all(name.startswith(stub.url) for name in names)
    assert set(stub.seen) == {"/", "/health", "/v1/models", "/v1/chat/completions"}
    assert page.js("return refused") == []
    page.js("fetch('http://localhost:9/').catch(() => {})")
    page.until("return refused.length === 1")  # and the browser would refuse one that tried
    page.driver.get_log("browser")  # leaves none of this for the next test


def test_what_a_model_writes_stays_text(page: Page, stub: Stub) -> None:
    attack = "<img src=x onerror='window.hacked=1'> <script>window.hacked=2</script> **<b>x</b>** `<i>y</i>`"
    stub.reply = stub.thoughts = attack
    page.send(f"Say {attack}")
    page.one(ENTROPY).click()
    page.slide(2)
    page.driver.refresh()
    page.until("return document.querySelectorAll('.turn').length === 2")
    assert page.js("return window.hacked ?? null") is None
    assert page.replies() == [attack.replace("**", "").replace("`", "")]
    assert page.text(".thoughts div") == attack
    assert not page.js("return document.querySelectorAll('#turns img, #turns script, #turns b, #turns i').length")
    refused = "try { document.createElement('p').innerHTML = 'x'; return false; } catch { return true; }"
    assert page.js(refused)


@pytest.mark.parametrize(("mode", "told"), [("broken", "not numbers"), ("cut", "connection"), ("plain", "")])
def test_text_survives_an_error_in_the_middle(page: Page, stub: Stub, mode: str, told: str) -> None:
    stub.mode = mode
    page.send("A poem, please")
    first = next(text for _, text in settling(POEM))
    if not told:
        assert page.replies() == [POEM] and not page.all(".problem")  # a server without drafts does well
        return
    assert page.replies() == [first] and told in page.text(".problem")
    assert told in page.text("#spoken")
    stub.mode = "settle"
    page.one(".problem button").click()
    page.until("return document.querySelector('.reply .text').textContent === arguments[0]", POEM)
    page.idle()
    assert not page.all(".problem")


@pytest.mark.parametrize(("mode", "told"), [("busy", "Try again in 7 seconds"), ("refused", "canvas_length: 9999")])
def test_refusals_are_told_in_the_servers_words(page: Page, stub: Stub, mode: str, told: str) -> None:
    page.send("One")
    stub.mode = mode
    page.one(AGAIN).click()
    page.until("return !document.querySelector('.problem')?.hidden")
    page.idle()
    assert told in page.text(".problem")
    assert page.replies() == [POEM]  # what stood there stays until something new comes


def test_server_that_goes_and_comes_back(page: Page, stub: Stub) -> None:
    page.send("One")
    stub.__exit__()
    page.send("Two")
    assert "does not answer" in page.text(".problem") and page.text("#state-text") == "Server not answering"
    with Stub(port=stub.port, reply="Here again."):
        page.until("return document.getElementById('state').dataset.state === 'ready'")
        page.one(".problem button").click()
        page.until("return [...document.querySelectorAll('.reply .text')].at(-1).textContent === 'Here again.'")
        page.idle()
    assert page.replies() == [POEM, "Here again."]


def test_api_key_is_asked_for_and_kept_for_the_tab_alone(browser: webdriver.Chrome) -> None:
    with Stub(key="open sesame") as stub:
        browser.get(stub.url)
        page = Page.__new__(Page)
        page.driver, page.url, page.stub = browser, stub.url, stub
        page.until("return document.getElementById('key-dialog').open")
        page.keys("wrong", Keys.ENTER)
        page.until(
            "return !document.getElementById('key-refused').hidden && document.getElementById('key-dialog').open"
        )
        page.keys("open sesame", Keys.ENTER)
        page.until("return document.getElementById('state').dataset.state === 'ready'")
        page.send("Hello")
        assert page.replies() == [POEM]
        assert "sesame" in page.js("return JSON.stringify({...sessionStorage})")
        assert "sesame" not in page.js("return JSON.stringify({...localStorage})")


def test_with_the_real_server(browser: webdriver.Chrome, start: Callable[..., Any]) -> None:
    page = Page(browser, f"{start().url}/")
    page.send("Tell me about the fox")
    (text,) = page.replies()
    assert text and not page.all(".problem"), page.text(".problem")
    page.slide(0)
    assert page.tokens() and "step 1 of" in page.text(".figures")
