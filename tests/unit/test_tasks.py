"""The tasks' verifiers and split, and the demo tokenizer that is trained on them."""

import dataclasses
import json
import random
import re
from itertools import pairwise, permutations, product
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import dgemma.demo
from dgemma.tasks import FAMILIES, WEIGHTS, Example, held_out, mixture
from dgemma.tasks.calendar import DAYS
from dgemma.tasks.stories import LISTS
from dgemma.tasks.story_grammar import SHAPES
from dgemma.tasks.sudoku import all_grids, lines, solutions, valid
from dgemma.tasks.sums import working
from dgemma.train.tokenizer import CONTROL_TOKENS, build_tokenizer, write_tokenizer

DEMO = Path(dgemma.demo.__file__).parent
families = pytest.mark.parametrize("name", FAMILIES)


def draws(name: str, n: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [FAMILIES[name].sample(rng) for _ in range(n)]


# --- every family ---


@families
def test_own_answers_are_right(name):
    for example in draws(name, 300) + held_out(name, 40, 1):
        assert example.family == name
        assert FAMILIES[name].check(example, example.answer), example
        assert FAMILIES[name].check(example, f"  {example.answer}\n"), example


@families
def test_a_damaged_answer_is_wrong(name):
    """Cutting off the second half, dropping the end, or another problem's answer is refused."""
    examples = draws(name, 120)
    task = FAMILIES[name]
    for example, other in pairwise(examples):
        answer = example.answer
        assert not task.check(example, "")
        assert not task.check(example, answer[: len(answer) // 2])
        assert not task.check(example, answer + " 7 x")
        if name in ("sums", "sorting", "records") and other.answer != answer:
            assert not task.check(example, other.answer)


@families
def test_a_changed_character_in_the_result_is_wrong(name):
    """Any letter or digit of the part that holds the result, replaced by another of its kind, is refused."""
    task = FAMILIES[name]
    rng = random.Random(3)
    for example in draws(name, 60):
        answer = example.answer
        start = {"sums": answer.rfind("."), "calendar": answer.rfind(" ")}.get(name, 0)
        spots = [i for i in range(start + 1, len(answer)) if answer[i].isalnum()]
        at = rng.choice(spots)
        pool = "0123456789" if answer[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
        other = rng.choice([c for c in pool if c != answer[at]])
        assert not task.check(example, answer[:at] + other + answer[at + 1 :]), (answer, at, other)


@families
def test_training_and_held_out_problems_are_disjoint(name):
    task = FAMILIES[name]
    held = {task.key(example) for example in held_out(name, 150, 2)}
    seen = {task.key(example) for example in draws(name, 1500)}
    assert None not in held
    assert held.isdisjoint(seen)


def test_about_one_problem_in_sixteen_is_held_out():
    task, rng = FAMILIES["sums"], random.Random(0)
    share = sum(task.is_held_out(task.draw(rng)) for _ in range(8000)) / 8000
    assert 1 / 16 - 0.012 < share < 1 / 16 + 0.012


@families
def test_held_out_is_the_same_for_the_same_seed(name):
    assert held_out(name, 10, 5) == held_out(name, 10, 5)
    assert held_out(name, 10, 5) != held_out(name, 10, 6)


def test_held_out_refuses_an_unknown_family():
    with pytest.raises(ValueError, match="chess"):
        held_out("chess", 1, 0)


def test_mixture_follows_the_weights_and_trains_on_nothing_held_out():
    assert set(WEIGHTS) == set(FAMILIES)
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    rng = random.Random(0)
    examples = [mixture(rng) for _ in range(3000)]
    assert not any(FAMILIES[example.family].is_held_out(example) for example in examples)
    for name, weight in WEIGHTS.items():
        assert sum(example.family == name for example in examples) / 3000 == pytest.approx(weight, abs=0.035)


@families
def test_data_is_plain_values(name):
    for example in draws(name, 20):
        json.dumps(example.data)


# --- one family at a time ---


def test_the_working_of_a_sum():
    assert working(347, 285, "+") == "7+5=12, 4+8+1=13, 3+2+1=06. 347 + 285 = 632"
    assert working(512, 77, "-") == "12-7=5, 11-7-1=3, 05-0-1=4. 512 - 77 = 435"


def test_every_step_of_a_sums_working_is_true():
    for example in draws("sums", 400):
        for left, right in re.findall(r"([\d+ -]+) ?= ?(\d+)", example.answer):
            total = sum(int(term) for term in re.findall(r"[+-]?\d+", left.replace(" ", "")))
            assert total == int(right), example.answer


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("632", False),
        ("347 + 285 = 632", True),
        ("285+347=632.", True),
        ("347 + 285 = 0632", False),
        ("1347 + 285 = 632", False),
        ("347 - 285 = 632", False),
        ("346 + 286 = 632", False),
        ("347 + 285 = 632 = 9", False),
    ],
)
def test_sum_replies(reply, right):
    data = {"a": 347, "b": 285, "sign": "+"}
    assert FAMILIES["sums"].check(Example(family="sums", prompt="", answer="", data=data), reply) is right


def test_sums_stay_in_range_and_never_go_below_zero():
    for example in draws("sums", 500):
        a, b = example.data["a"], example.data["b"]
        assert 0 <= a <= 999 and 0 <= b <= 999
        assert example.data["sign"] == "+" or a >= b


def test_sorting_refuses_wrong_order_and_lost_items():
    task = FAMILIES["sorting"]
    for items in (("b", "a", "c", "a"), (9, 10, 7, 10)):
        example = Example(family="sorting", prompt="", answer="", data={"items": items})
        accepted = {order for order in permutations(items) if task.check(example, ", ".join(map(str, order)))}
        assert accepted == {tuple(sorted(items))}
        assert not task.check(example, " ".join(map(str, sorted(set(items)))))


def test_sudoku_grids_are_all_the_valid_ones():
    rows = ["".join(row) for row in permutations("1234")]
    assert list(all_grids()) == [grid for four in product(rows, repeat=4) if valid(grid := "".join(four))]
    assert len(all_grids()) == 288


def test_sudoku_accepts_exactly_the_one_solution():
    task = FAMILIES["sudoku"]
    for example in draws("sudoku", 30):
        puzzle = example.data["puzzle"]
        assert 4 <= puzzle.count(".") <= 10
        assert solutions(puzzle) == 1
        assert example.prompt.endswith(lines(puzzle))
        assert [lines(grid) for grid in all_grids() if task.check(example, lines(grid))] == [example.answer]


def test_sudoku_with_two_solutions_accepts_both():
    example = Example(family="sudoku", prompt="", answer="", data={"puzzle": "." * 16})
    assert sum(FAMILIES["sudoku"].check(example, lines(grid)) for grid in all_grids()) == 288
    assert not FAMILIES["sudoku"].check(example, lines("1234" * 4))


def test_records_compare_types_and_take_any_order():
    task = FAMILIES["records"]
    record = {"name": None, "age": 34, "city": "Lisbon", "job": "baker"}
    example = Example(family="records", prompt="", answer="", data={"record": record})
    assert task.check(example, json.dumps(dict(reversed(record.items())), indent=1))
    for key, value in (("age", 34.0), ("age", "34"), ("name", "null"), ("more", 1)):
        assert not task.check(example, json.dumps({**record, key: value}))
    assert not task.check(example, "[" * 100_000)


def test_records_say_what_their_sentence_says():
    for example in draws("records", 300):
        for value in example.data["record"].values():
            assert value is None or str(value) in example.prompt


def test_calendar_against_counting_one_day_at_a_time():
    task = FAMILIES["calendar"]
    for example in draws("calendar", 200):
        at = DAYS.index(example.data["day"])
        for _ in range(example.data["number"]):
            at = (at + (1 if example.data["way"] == "after" else -1)) % 7
        assert [day for day in DAYS if task.check(example, f"It is {day}.")] == [DAYS[at]]


def test_stories_have_their_shape():
    paragraphs = {"short": 4, "medium": 5, "long": 6}
    assert {length: len(shape) for length, shape in SHAPES.items()} == paragraphs
    for example in draws("stories", 100):
        assert example.answer.count("\n\n") + 1 == paragraphs[example.data["length"]]
        assert example.answer.endswith("The end.")
        assert all(part in example.prompt and part in example.answer for part in example.data["parts"].values())


def test_a_story_with_another_part_or_order_is_refused():
    task, rng = FAMILIES["stories"], random.Random(0)
    for example in draws("stories", 40):
        answer, length = example.answer, example.data["length"]
        for part, choices in LISTS.items():
            (named,) = [choice for choice in choices if re.search(rf"\b{choice}\b", answer)]
            stranger = rng.choice([choice for choice in choices if choice != named])
            once = re.sub(rf"\b{named}\b(?!.*\b{named}\b)", stranger, answer, flags=re.S)
            if named in once or part in example.data["parts"]:  # else it is a right story about the stranger
                assert not task.check(example, once), (named, stranger)
            # The same story about another one is right unless the request said who or what.
            swapped = dataclasses.replace(example, data={"length": length, "parts": {part: stranger}})
            assert not task.check(swapped, answer)
        assert not task.check(example, answer.removesuffix(" The end."))
        assert not task.check(example, answer.replace("\n\n", "\n"))
        first, second, *others = answer.split("\n\n")
        assert not task.check(example, "\n\n".join([second, first, *others]))
        assert not task.check(example, "\n\n".join([first, second, second, *others]))
        sentences = first.split(". ")
        assert not task.check(example, "\n\n".join([". ".join(sentences[1:]), second, *others]))


def test_a_hero_keeps_the_pronoun():
    task = FAMILIES["stories"]
    swap = {"he": "she", "she": "he"}
    for example in draws("stories", 60):
        other = re.sub(r"\b(he|she)\b", lambda found: swap[found.group()], example.answer, count=1)
        assert other == example.answer or not task.check(example, other)


# --- the demo tokenizer ---


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def test_the_committed_files_are_nearly_what_the_code_writes(tmp_path):
    """The weights belong to the committed tokenizer, and the weekdays' answers were reworded after both were made: a
    tokenizer made today shares most entries, not all."""
    write_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text("utf-8") == (DEMO / name).read_text("utf-8"), name
    written, committed = (json.loads((d / "tokenizer.json").read_text("utf-8")) for d in (tmp_path, DEMO))
    shared = written["model"]["vocab"].keys() & committed["model"]["vocab"].keys()
    assert len(shared) > 0.97 * len(committed["model"]["vocab"])
    assert len(list(tmp_path.iterdir())) == 3  # no temporary file is left


def test_another_seed_gives_the_same_size():
    assert build_tokenizer(seed=1, samples=1000).get_vocab_size() == 4096


def test_control_tokens_have_the_ids_of_the_released_model(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    for index in range(107):
        text = CONTROL_TOKENS.get(index, f"<unused{index}>")
        assert tokenizer.token_to_id(text) == index
        assert tokenizer.encode(f"a{text}b").ids[1] == index


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(text):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json")) if not _CACHE else _CACHE[0]
    _CACHE[:] = [tokenizer]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


_CACHE: list[Tokenizer] = []


@families
def test_task_text_survives(name, tokenizer):
    for example in draws(name, 100):
        for text in (example.prompt, example.answer):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stops_and_newlines_stand_alone(tokenizer):
    for token in tokenizer.get_vocab():
        if not token.startswith("<"):
            assert not re.search(r"\d.|.\d", token), token
            assert not re.search(r"Ċ.|.Ċ", token), token
            assert token in (".", "Ġ.", ".Ġ", "Ġ.Ġ") or "." not in token, token
    assert tokenizer.encode("1..4\n.23.").tokens == ["1", ".", ".", "4", "Ċ", ".", "2", "3", "."]


def test_letters_and_task_words_are_one_token(tokenizer):
    for letter in "abcdefghijklmnopqrstuvwxyz":
        assert len(tokenizer.encode(letter).ids) == len(tokenizer.encode(f" {letter}").ids) == 1
    for name in FAMILIES:
        for example in draws(name, 300, seed=9):
            for word in re.findall(r" ?[A-Za-z]+", example.answer):
                assert len(tokenizer.encode(word).ids) == 1, (name, word)


def test_transformers_reads_the_same_ids(tokenizer):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(DEMO)
    auto = AutoTokenizer.from_pretrained(DEMO)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    for example in draws("stories", 5) + draws("sums", 5):
        ids = tokenizer.encode(example.answer).ids
        assert theirs.encode(example.answer) == auto.encode(example.answer) == ids
    messages = [{"role": "user", "content": "12+3"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos><|turn>user\n12+3<turn|>\n<|turn>model\n"


@pytest.mark.parametrize("thinking", [False, True])
def test_the_chat_template(thinking, tokenizer):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (DEMO / "chat_template.jinja").read_text()
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2+2"},
    ]
    closed = (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n"
        "<|turn>user\n2+2<turn|>\n"
    )
    assert template.render(messages=messages, bos_token="<bos>", enable_thinking=thinking) == closed
    opened = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True, enable_thinking=thinking)
    assert opened == closed + "<|turn>model\n"
    assert tokenizer.encode(opened).tokens[:4] == ["<bos>", "<|turn>", "system", "Ċ"]
