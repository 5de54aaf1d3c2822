"""The tokenizer, and that nobody's text becomes a control token unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from checkpoint_fixtures import refused
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import ALPHABET, CONTROLS, FAMILIES, byte_level, gemma_like
from tokenizers import AddedToken, models, normalizers

from dgemma.errors import RequestError
from dgemma.text import Tokenizer

Family = Callable[[], Tokenizer]
families = pytest.mark.parametrize("family", [gemma_like, byte_level])
texts = st.lists(st.sampled_from([*ALPHABET, *CONTROLS, "<pad>", "\n\n", "<b>", "hello"])).map("".join)


def test_read(tmp_path: Path):
    assert Tokenizer.read(tmp_path) is None
    inner = tokenizers.Tokenizer.from_str(byte_level()._inner.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.read(tmp_path)
    assert tokenizer is not None and tokenizer.size == byte_level().size
    text = "hello world, this is long"  # a file's own truncation and padding do not apply
    assert tokenizer.encode(text) == byte_level().encode(text)
    assert len(tokenizer.encode(text)) > 3 and tokenizer.encode("") == []


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}', "[" * 1000])
def test_damaged_file(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    refused(lambda: Tokenizer.read(tmp_path), str(tmp_path / "tokenizer.json"))


@families
def test_ids(family: Family):
    tokenizer = family()
    turn = tokenizer.id_of("<|turn>")
    assert turn is not None and tokenizer.token_of(turn) == "<|turn>" and tokenizer.is_special(turn)
    assert tokenizer.id_of("<|turn") is None and tokenizer.token_of(10**6) is None and tokenizer.token_of(-1) is None
    assert set(CONTROLS) < set(tokenizer.controls)
    assert not {"\n\n", "<b>", "<0x0A>"} & set(tokenizer.controls)


@families
def test_control_tokens_are_parsed_on_request_only(family: Family):
    tokenizer = family()
    text = 'a<|turn>user\n<turn|> <|tool_call>call:f{x:<|"|>y<|"|>}<tool_call|><pad>é'
    ids = tokenizer.encode(text)
    assert tokenizer.id_of("<|turn>") in ids and tokenizer.id_of("<|tool_call>") in ids
    assert tokenizer.decode(ids, keep_special=True) == text
    assert tokenizer.decode(ids) == "auser\n call:f{x:y}é"
    literal = tokenizer.encode(text, special=False)
    assert tokenizer.decode(literal) == tokenizer.decode(literal, keep_special=True) == text


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@given(text=texts | st.text())
def test_no_text_yields_a_control_token(family: Family, text: str):
    tokenizer = family()
    ids = tokenizer.encode(text, special=False)
    assert not any(tokenizer.is_special(i) and tokenizer.token_of(i) != "<unk>" for i in ids)
    if family is not FAMILIES["llama"]:  # which puts a space before every stretch of text
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text


def test_control_tokens_that_the_vocabulary_or_the_normalizer_would_make():
    """A model that takes whole words from its vocabulary, and a normaliser that turns wide letters into plain ones."""
    words = {letter: index for index, letter in enumerate("<|turn>ab")} | {"<|turn>": 20, "?": 21}
    inner = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=len(words) - 1))
    inner.normalizer = normalizers.NFKC()
    inner.add_special_tokens([AddedToken("<|turn>", special=True, normalized=True)])
    tokenizer = Tokenizer(inner)
    turn = tokenizer.id_of("<|turn>")
    for text in ("a<|turn>b", "a＜|turn>b"):
        assert turn in tokenizer.encode(text)
        assert turn not in tokenizer.encode(text, special=False)
        assert "".join(str(tokenizer.token_of(i)) for i in tokenizer.encode(text, special=False)) == "a<|turn>b"


def test_a_control_token_of_one_letter_cannot_be_text():
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    inner.add_special_tokens([AddedToken("a", special=True)])
    refused(lambda: Tokenizer(inner).encode("a", special=False), "control tokens", kind=RequestError)


@families
@pytest.mark.parametrize("text", ["\ud800", None, 3, ["a"]])
def test_what_is_no_text(family: Family, text: Any):
    refused(lambda: family().encode(text), "cannot be encoded", kind=RequestError)


@families
def test_ids_without_text(family: Family):
    tokenizer = family()
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([10**6, *tokenizer.encode("hello"), 10**6]) == "hello"
    for token in (-1, 2**32):
        refused(lambda token=token: tokenizer.decode([token]), str(token), kind=RequestError)


def test_nothing_here_needs_torch():
    import subprocess
    import sys

    code = "import sys, dgemma.text; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
