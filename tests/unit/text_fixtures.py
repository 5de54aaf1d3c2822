"""Small tokenizers of the two families in use, made on the spot."""

from __future__ import annotations

import functools
import json

import hypothesis
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from dgemma.text import Tokenizer

# A time limit for each example would make the tests fail on a busy machine, and only there.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

CORPUS = ["hello world, this is a text of a user and the model's turn: thought channel", "naïve 日本語 and 🙂 über"] * 3
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CONTROLS = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", '<|"|>', "<|tool_call>", "<tool_call|>"]
# Text in which a tokenizer may trip: characters of one to four bytes, joined ones, spaces, control tokens' texts.
ALPHABET = "abho <|>\n\t/é日本語🙂👩\u200d🚀\ufffd\u0301<turn|><|channel>"


@functools.cache
def gemma_like() -> Tokenizer:
    """Spaces as ▁, byte tokens for what is in no vocabulary: Gemma's kind."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.train_from_iterator(
        CORPUS[:1] * 3,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)],
            show_progress=False,
        ),
    )
    data = json.loads(inner.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    return _finish(tokenizers.Tokenizer.from_str(json.dumps(data)))


@functools.cache
def byte_level() -> Tokenizer:
    """Bytes as letters: the demo's kind."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _finish(inner)


@functools.cache
def llama_like() -> Tokenizer:
    """As `gemma_like`, with a space put before the text and taken away again: the start depends on what it is."""
    inner = tokenizers.Tokenizer.from_str(gemma_like()._inner.to_str())
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


FAMILIES = {"gemma": gemma_like, "byte level": byte_level, "llama": llama_like}


def _finish(inner: tokenizers.Tokenizer) -> Tokenizer:
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS[:5]])
    # Some files do not mark every control token as special, and add plain words in the same list.
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in [*CONTROLS[5:], "\n\n", "<b>"]])
    return Tokenizer(inner)
