"""Text before its canvas is done: never taken back, whatever the rule sends, and whatever happens to the request."""

from __future__ import annotations

from typing import Any

import pytest

from dgemma.engine import Request, early
from dgemma.engine.early import Prefix, Rule
from dgemma.events import Commit, Draft, Early, Event, Result
from dgemma.text import Tokenizer
from engines import (
    Injected,
    alone,
    answers,
    ask,
    assert_all_free,
    attribute,
    drive,
    engine_of,
    result_of,
    talker,
    words,
)
from tiny import EOS, SPECS, Lab, Spec

TALK = Spec(name="words", vocab=4096)
# Sends what it sees at once: mostly nonsense, which the network would still change.
RASH = Rule(steps=1, entropy=3.0)
BLIND = Rule(steps=1, entropy=1e9)


@pytest.fixture(scope="module")
def network(lab: Lab) -> Any:
    return lab.network("base")


@pytest.fixture(scope="module")
def talking(lab: Lab) -> tuple[Any, Tokenizer]:
    return talker(lab)


def check(events: list[Event]) -> Result:
    """All that was told is there in the end, in order, and no draft contradicts what was sent before it."""
    result = result_of(events)
    tokens: list[int] = []
    text, thoughts, logprobs = "", "", []
    canvas: list[int] = []  # what went out early of the canvas under way
    for event in events:
        if isinstance(event, Draft):
            assert event.tokens[: len(canvas)] == canvas
        elif isinstance(event, Early | Commit):
            assert isinstance(event, Commit) or event.tokens
            canvas = [] if isinstance(event, Commit) else canvas + event.tokens
            tokens += event.tokens
            text, thoughts = text + event.text, thoughts + event.thoughts
            logprobs += event.logprobs
            assert result.tokens[: len(tokens)] == tokens
            assert result.text.startswith(text) and (result.thoughts or "").startswith(thoughts)
    assert tokens == result.tokens and text == result.text and thoughts == (result.thoughts or "")
    if result.logprobs is not None:
        assert logprobs == list(result.logprobs) and [own.token for own in logprobs] == tokens
    return result


def early_of(events: list[Event]) -> list[Early]:
    return [event for event in events if isinstance(event, Early)]


def rash_requests(network: Any, spec: Spec) -> list[Request]:
    """Requests whose sent tokens the network would have changed."""
    return [
        ask(network, words(spec, 9, seed=0), seed=0, early_text="eager", drafts=True),
        ask(network, words(spec, 21, seed=1), seed=1, early_text="safe", drafts=True, logprobs=1, temperature=0.0),
        ask(network, words(spec, 30, seed=2), seed=2, early_text="eager", drafts=True, max_new_tokens=20),
        ask(network, words(spec, 14, seed=3), seed=3, early_text="eager", drafts=True, stop_token_ids=(EOS, 9, 30)),
        ask(network, words(spec, 14, seed=4), seed=4, early_text="off", drafts=True, stop_token_ids=(EOS, 9, 30)),
    ]


@pytest.fixture
def rash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(early.RULES, "eager", RASH)
    monkeypatch.setitem(early.RULES, "safe", Rule(steps=2, entropy=3.0))


def test_off_sends_nothing_early(network: Any) -> None:
    events = list(engine_of(network).submit(ask(network, words(SPECS["base"], 9), early_text="off")))
    assert not early_of(events)
    assert len(events) == 3  # two canvases and the end


def test_a_token_is_sure_when_it_has_held(network: Any) -> None:
    """The standing rules against the drafts: same argmax for so many steps, entropy below so much, all before too."""
    spec, sent_by = SPECS["base"], {}
    for name, rule in early.RULES.items():
        sent_by[name] = 0
        for seed in range(3):
            request = ask(network, words(spec, 9), seed=seed, early_text=name, drafts=True, max_denoising_steps=9)
            events = list(engine_of(network).submit(request))
            check(events)
            sent, drafts = 0, []
            for place, event in enumerate(events):
                if isinstance(event, Commit):
                    sent, drafts = 0, []
                elif isinstance(event, Draft):
                    drafts.append(event)
                    latest = drafts[-rule.steps :]
                    sure = 0
                    while (
                        len(latest) == rule.steps
                        and sure < len(event.tokens)
                        and event.entropies[sure] < rule.entropy
                        and len({draft.tokens[sure] for draft in latest}) == 1
                    ):
                        sure += 1
                    after = events[place + 1]
                    if not isinstance(after, Commit):
                        gained = len(after.tokens) if isinstance(after, Early) else 0
                        assert gained == max(0, sure - sent)
                        sent += gained
                        sent_by[name] += gained
    assert sent_by["eager"] > sent_by["safe"] > 0


@pytest.mark.parametrize("name", ["off", "safe", "eager"])
@pytest.mark.parametrize("stop", [(), (" the", "er", "a")])
def test_text_adds_up(talking: tuple[Any, Tokenizer], name: str, stop: tuple[str, ...]) -> None:
    network, tokenizer = talking
    for seed in range(3):
        request = ask(network, words(TALK, 12, seed=seed), seed=seed, early_text=name, stop=stop, max_new_tokens=40)
        result = check(list(engine_of(network, tokenizer).submit(request)))
        assert not any(text in result.text for text in stop)
        if not stop:
            assert len(result.tokens) == 40 and len(result.text) > 20


@pytest.mark.usefixtures("rash")
def test_nonsense_is_never_taken_back(talking: tuple[Any, Tokenizer], network: Any) -> None:
    changed = 0
    for model, tokenizer, spec in ((network, None, SPECS["base"]), (*talking, TALK)):
        free = alone(model, [ask(model, words(spec, 9, seed=0), seed=0)], tokenizer)[0].tokens
        for request in rash_requests(model, spec):
            events = list(engine_of(model, tokenizer).submit(request))
            result = check(events)
            assert bool(early_of(events)) == (request.params.early_text != "off")
            changed += request.seed == 0 and result.tokens != free
    assert changed == 2, "the rule was to send what the network would have changed"


def test_a_blind_rule_keeps_the_first_look(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all is sent at the first step, the answer is each canvas's first argmax."""
    monkeypatch.setitem(early.RULES, "eager", BLIND)
    request = ask(network, words(SPECS["base"], 9), early_text="eager", drafts=True, max_new_tokens=20)
    engine = engine_of(network)
    ticket = engine.submit(request)
    events: list[Event] = []
    while not ticket.closed:
        engine.step()
        for row in engine._running:
            if row.canvas is not None and row.canvas.number > 1:
                sent = row.tokens[16 * row.canvas.index :]
                assert row.canvas.tokens[0, : len(sent)].tolist() == sent, "what the network looks at next"
    events = list(ticket)
    result = check(events)
    firsts = [event.tokens for event in events if isinstance(event, Draft) and event.step == 1]
    assert result.tokens == [token for tokens in firsts for token in tokens][:20]
    assert [len(event.tokens) for event in early_of(events)] == [16, 4]


@pytest.mark.usefixtures("rash")
@pytest.mark.parametrize("seed", range(2))
def test_company_and_preemption_change_nothing(network: Any, seed: int) -> None:
    requests = rash_requests(network, SPECS["base"]) * 2
    truth = [result.tokens for result in alone(network, requests[:5])] * 2
    engine = engine_of(network, page_size=4, cache_tokens=80, max_batch=4)
    tickets = drive(engine, requests, joins=[(seed + 1) * n for n in range(10)])
    assert [check(list(ticket)).tokens for ticket in tickets] == truth
    assert engine.status().preemptions > 0
    assert_all_free(engine)


@pytest.mark.usefixtures("rash")
@pytest.mark.parametrize("when", [2, 4, 9])
def test_a_failed_step_changes_nothing(network: Any, when: int) -> None:
    """The canvas is drawn again, and what was sent of it stays as it is: to the user and to the network."""
    requests = rash_requests(network, SPECS["base"])
    truth = [(result.tokens, result.stats.steps_per_canvas) for result in alone(network, requests)]
    run, count = network.run, 0

    def fail(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == when:
            raise Injected
        return run(*arguments)

    engine = engine_of(network)
    with attribute(network, "run", fail):
        tickets = drive(engine, requests)
    assert count > when
    found = [check(list(ticket)) for ticket in tickets]
    assert [(result.tokens, result.stats.steps_per_canvas) for result in found] == truth


def test_early_text_ends_at_a_stop_string(talking: tuple[Any, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string in what is sent early ends the answer at once; the rest of the canvas is not waited for."""
    network, tokenizer = talking
    monkeypatch.setitem(early.RULES, "eager", BLIND)
    free = ask(network, words(TALK, 12), early_text="eager", max_new_tokens=32)
    text = answers(engine_of(network, tokenizer), [free])[0].text
    stop = text[4:7]
    request = ask(network, words(TALK, 12), early_text="eager", max_new_tokens=32, stop=(stop,))
    events = list(engine_of(network, tokenizer).submit(request))
    result = check(events)
    assert result.text == text[: text.index(stop)] and result.finish_reason == "stop"
    assert result.stats.steps_per_canvas == [1] and not any(isinstance(event, Commit) for event in events)


def test_prefix_counts_from_the_start_and_in_a_row() -> None:
    import torch

    prefix = Prefix(Rule(steps=2, entropy=0.1), 4)
    low, high = 0.05, 0.2
    seen = [
        ([5, 6, 7, 8], [low, low, low, low], 0),
        ([5, 6, 9, 8], [low, low, low, low], 2),
        ([5, 6, 9, 8], [low, low, high, low], 2),
        ([5, 6, 9, 8], [low, low, low, low], 4),
        ([4, 6, 9, 8], [low, low, low, low], 0),
        ([4, 6, 9, 8], [high, low, low, low], 0),
        ([4, 6, 9, 8], [low, low, low, 0.1], 3),
    ]
    for likeliest, entropies, sure in seen:
        assert prefix.update(torch.tensor(likeliest), torch.tensor(entropies, dtype=torch.float64)) == sure
