"""The web page in a real browser: it settles, replays, keeps, stops, and sends what it was told to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import Page, launch
from page_stub import CANVAS, END, PAGE, POEM, STEPS, Stub, settling
from selenium import webdriver
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


def looks(draft: dict[str, Any]) -> list[tuple[str, str]]:
    """Look and word of every position of a draft before its end, by the definition of the looks."""
    result = []
    for piece, settled, changed, entropy in zip(
        draft["pieces"], draft["settled"], draft["changed"], draft["entropies"], strict=True
    ):
        if piece == END:
            break
        if not settled and entropy >= 0.7:
            result.append(("noise", ""))
        else:
            look = "revised" if changed and draft["step"] > 1 else "settled" if settled else "guess"
            result.append((look, piece.strip()))
    return result


def drafts_of(text: str = POEM) -> list[dict[str, Any]]:
    """All drafts of a reply."""
    return [draft for drafts, _ in settling(text) for draft in drafts]


def test_page_is_one_file_that_needs_nobody() -> None:
    source = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*\s(?:src|href)=[\"'](?!data:)", source)
    assert not re.findall(r"@import|url\((?!data:)|import\(|importScripts|innerHTML|insertAdjacentHTML|eval\(", source)
    addresses = set(re.findall(r"https?://[^\s\"'%)]+", source))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace: nothing is fetched


def test_reply_settles_in_its_bubble(page: Page, stub: Stub) -> None:
    stub.hold.clear()
    page.send("A poem, please", wait=False)
    third = drafts_of()[2]
    page.until("return document.querySelector('.figures').textContent.includes('step 3')")
    assert [(token["look"], token["word"]) for token in page.tokens()] == looks(third)
    by_look = {token["look"]: token for token in page.tokens()}
    assert set(by_look) == {"noise", "guess", "revised", "settled"}
    # Shape tells them apart: a block without letters, letters on a block, dots under letters, letters.
    noise, guess = by_look["noise"], by_look["guess"]
    assert noise["display"] == "inline-block" and not noise["word"] and noise["width"] > 5
    assert guess["word"] and guess["background"] != by_look["settled"]["background"]
    assert (by_look["revised"]["line"], by_look["revised"]["dots"]) == ("underline", "dotted")
    assert by_look["settled"]["line"] == guess["line"] == "none"
    assert by_look["settled"]["background"] == "rgba(0, 0, 0, 0)"
    figures = page.text(".figures")
    assert "canvas 1" in figures and "at most 48" in figures and f"{third['tokens_per_forward']:.1f} tokens" in figures
    assert page.replies() == [""]  # nothing is committed yet

    stub.hold.set()
    page.idle()
    assert page.replies() == [POEM]
    assert not page.all(".view")
    steps = len(drafts_of())
    words = len(POEM.split())
    assert page.text(".figures").startswith(f"{words} tokens{steps} steps{words / steps:.1f} tokens a forward")


def test_bubble_never_shrinks_while_it_settles(page: Page, stub: Stub) -> None:
    page.width(360)
    stub.delay = 0.1  # every step is drawn
    stub.reply = "I " * CANVAS  # words that are narrower than noise: rows go away as they settle
    page.js(
        """window.heights = [];
        new MutationObserver(() => {
            const body = document.querySelector('[aria-busy] .body');
            if (body) heights.push([body.lastChild.offsetHeight, body.offsetHeight]);
        }).observe(document.body, {subtree: true, childList: true});"""
    )
    page.send("Something short")
    canvas, bubble = zip(*page.js("return window.heights"), strict=True)
    assert list(canvas) != sorted(canvas)
    assert list(bubble) == sorted(bubble)


def test_scrubber_replays_what_was_sent(page: Page, stub: Stub) -> None:
    page.send("A poem, please")
    drafts = stub.drafts
    assert len(drafts) == 2 * STEPS
    slider = page.one(".steps input")
    slider.send_keys(Keys.HOME)
    for index, draft in enumerate(drafts[:-1]):
        told, figures, view = page.js(
            """const text = (one) => document.querySelector(one).textContent;
            return [document.activeElement.getAttribute('aria-valuetext'), text('.figures'), text('.view')]"""
        )
        step = f"step {draft['step']} of {STEPS}"
        assert told == f"canvas {draft['canvas'] + 1}, {step}, mean entropy {draft['mean_entropy']:.2f}", index
        assert step in figures and f"{draft['tokens_per_forward']:.1f} tokens a forward" in figures
        assert [(token["look"], token["word"]) for token in page.tokens()] == looks(draft)
        assert view.startswith("".join(text for _, text in list(settling(POEM))[: draft["canvas"]]))
        slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext").endswith("finished")
    assert not page.all(".view") and page.replies() == [POEM]
    slider.send_keys(Keys.HOME, Keys.PAGE_UP)
    assert slider.get_attribute("aria-valuetext").startswith("canvas 2, step 1 ")
    assert page.js("return document.querySelectorAll('.track .edges')[0].getAttribute('d')") == f"M{STEPS - 0.5} 0V1"
    slider.send_keys(Keys.HOME)
    page.one("[aria-label='Replay the steps']").click()
    page.until("return document.querySelector('.steps input').getAttribute('aria-valuetext').endsWith('finished')")


def test_entropy_view_has_figures_and_bars(page: Page, stub: Stub) -> None:
    page.send("A poem, please")
    page.slide(1)
    toggle = page.one(ENTROPY)
    assert toggle.get_attribute("aria-pressed") == "false"
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "true"
    draft = stub.drafts[1]
    tokens = page.tokens()
    assert len(tokens) == CANVAS
    for position, (token, entropy) in enumerate(zip(tokens, draft["entropies"], strict=True)):
        told = re.search(r"· ([\d.]+) nats · position (\d+) ·", token["title"])
        assert told and int(told[2]) == position + 1 and float(told[1]) == pytest.approx(entropy, abs=0.0051)
    ordered = [
        token["bar"] for _, token in sorted(zip(draft["entropies"], tokens, strict=True), key=lambda pair: pair[0])
    ]
    assert ordered == sorted(ordered) and ordered[-1] > 3 * ordered[0]
    place = page.one(".positions input")
    place.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert f"position 3 of {CANVAS}" in page.text(".told")
    assert re.search(r"[\d.]+ nats", tokens[2]["title"])[0] in place.get_attribute("aria-valuetext")
    assert (
        page.js("return [...document.querySelectorAll('.view .tok')].findIndex((one) => one.matches('.picked'))") == 2
    )
    page.slide(len(stub.drafts) - 1)  # at the end the view has the whole reply
    assert "".join(token["word"] for token in page.tokens()) == POEM.replace(" ", "")
    toggle.click()
    assert not page.all(".view") and page.replies() == [POEM]


def test_settings_travel_with_the_request(page: Page, stub: Stub) -> None:
    page.send("Before")
    assert "diffusion" not in stub.requests[0] and "temperature" not in stub.requests[0]
    page.one("#settings-open").click()
    values = {"temperature": "0.7", "max_denoising_steps": "12", "entropy_bound": "0.25", "canvas_length": "16"}
    for name, value in (values | {"max_tokens": "99", "seed": "7"}).items():
        page.one(f"#set-{name}").send_keys(value)
    page.keys(Keys.ESCAPE)
    assert not page.all("#settings")
    page.send("After")
    body = stub.requests[1]
    assert body["diffusion"] == {"max_denoising_steps": 12, "entropy_bound": 0.25, "canvas_length": 16}
    assert (body["temperature"], body["max_tokens"], body["seed"], body["model"]) == (0.7, 99, 7, "stub-1")
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True, "include_drafts": True}
    assert len(stub.drafts[0]["pieces"]) == 16

    page.one("#settings-open").click()
    page.one("#set-canvas_length").send_keys(".5")  # 16.5 tokens
    page.keys(Keys.ESCAPE)
    page.one("#message").send_keys("Not yet", Keys.ENTER)
    assert page.one("#set-canvas_length").get_attribute("aria-invalid") == "true"
    assert "whole number" in page.text("#about-canvas_length") and len(stub.requests) == 2
    page.one("#reset").click()
    page.keys(Keys.ESCAPE)
    page.driver.refresh()
    page.send("As it was")
    assert "diffusion" not in stub.requests[2] and stub.requests[2]["seed"] != 7


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_closes_the_connection_and_keeps_the_text(page: Page, stub: Stub, way: str) -> None:
    stub.mode = "forever"
    page.send("Go on", wait=False)
    page.until("return document.querySelector('.reply .text').textContent.length > 150")
    if way == "button":
        page.one("#send").click()
    else:
        page.keys(Keys.ESCAPE)
    assert stub.gone.wait(10)
    page.idle()
    (text,) = page.replies()
    assert text.startswith(POEM)
    assert "stopped" in page.text(".figures") and "Reply stopped." in page.text("#spoken")
    stub.mode = "settle"
    page.send("And now?")
    assert [message["content"] for message in stub.requests[-1]["messages"]] == ["Go on", text, "And now?"]


def test_regenerate_and_edit_send_the_right_messages(page: Page, stub: Stub) -> None:
    page.send("One")
    page.send("Two")
    assert len(page.all(AGAIN)) == 1  # of the last reply alone
    stub.reply = "Something else."
    page.one(AGAIN).click()
    page.until("return [...document.querySelectorAll('.reply .text')].at(-1).textContent === 'Something else.'")
    page.idle()
    second, third = stub.requests[1:]
    assert [(one["role"], one["content"]) for one in third["messages"]] == [
        ("user", "One"),
        ("assistant", POEM),
        ("user", "Two"),
    ]
    assert third["messages"] == second["messages"] and third["seed"] != second["seed"]

    page.js("settings.put('seed', 5)")
    for _ in range(2):
        page.one(AGAIN).click()
        page.until("return document.querySelector('[aria-busy]') || runs.size === 0")
        page.idle()
    assert [one["seed"] for one in stub.requests[3:]] == [5, 5]

    page.js("document.querySelector('[aria-label=\"Edit and send again\"]').click()")
    area = page.one("[aria-label='Edit your message']")
    assert area.get_attribute("value") == "One"
    area.send_keys(" and a half", Keys.ENTER)
    page.until("return document.querySelectorAll('.turn').length === 2")
    page.idle()
    assert stub.requests[-1]["messages"] == [{"role": "user", "content": "One and a half"}]
    assert page.replies() == ["Something else."] and page.text("#title") == "One and a half"


def test_history_is_kept_renamed_deleted_and_exported(page: Page, stub: Stub) -> None:
    page.send("First chat")
    page.keys(Keys.CONTROL, "k")
    page.send("Second chat")
    figures = page.text(".figures")
    kept = page.js("return JSON.stringify({...localStorage})")
    assert POEM in kept and "entropies" not in kept and "pieces" not in kept
    page.driver.refresh()
    page.until("return document.querySelectorAll('.turn').length === 2")
    assert page.text("#title") == "Second chat" and page.replies() == [POEM] and page.text(".figures") == figures
    assert not page.all(".steps")  # drafts are not kept

    def choose(number: int, does: str) -> None:
        page.js("document.querySelectorAll('#chats .more')[arguments[0]].click()", number)
        page.one(f"#chat-menu [data-does='{does}']").click()

    names = "return [...document.querySelectorAll('#chats .open')].map((one) => one.textContent)"
    choose(1, "rename")
    page.keys(Keys.CONTROL, "a")
    page.keys("A better name", Keys.ENTER)
    assert page.js(names) == ["Second chat", "A better name"]
    choose(0, "delete")
    assert page.js(names) == ["A better name"] and not page.all(".turn")
    page.one("#notice-action").click()
    assert page.js(names) == ["Second chat", "A better name"] and page.replies() == [POEM]

    page.js("URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return '#'; };")
    page.one("#export-all").click()
    exported = json.loads(page.until("return window.saved"))
    assert [chat["title"] for chat in exported["chats"]] == ["Second chat", "A better name"]
    assert exported["chats"][0]["messages"][1]["content"] == POEM


def test_full_storage_is_said_and_survived(page: Page) -> None:
    page.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };")
    page.send("No room")
    assert page.replies() == [POEM]
    assert "storage is full" in page.one("#notice").text


def test_memory_of_drafts_is_bounded(page: Page) -> None:
    page.js("shelf.limit = 6000")
    page.send("One")
    page.send("Two")
    assert page.js("return [...shelf.kept.values()].reduce((sum, one) => sum + one.bytes, 0)") <= 6000
    assert len(page.all(".steps")) == 1  # the older reply lost its steps, and nothing else
    assert page.replies() == [POEM, POEM]
    assert all(f"{2 * STEPS} steps" in one.text for one in page.all(".figures"))
