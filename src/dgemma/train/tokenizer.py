"""The demo model's tokenizer: a byte-level BPE of 4,096 entries trained on the task mixture.

Control tokens have the ids that they have in the released model. Every digit, every full stop and every newline is a
token of its own, so a number or a sudoku cell is always one token; words that the tasks use are one token each.
"""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dgemma.tasks import FAMILIES
from dgemma.train.common_words import COMMON_WORDS

VOCABULARY = 4096
RESERVED = 107  # ids below this are control tokens
CONTROL_TOKENS = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}

# What BPE may never merge across, in order of preference. Other characters stay between matches, which also cuts.
PIECES = "|".join(
    (
        r"\n",  # every newline alone: a grid's lines keep their shape
        r"\p{N}",  # every digit alone
        r"\.(?: (?=\p{N}))?",  # every full stop alone (a sudoku hole); with the space that would stand before a digit
        r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})",
        r" ?\p{L}+",  # a word with its space
        r" ?[^\s\p{L}\p{N}.]+(?: (?=\p{N}))?",  # marks, " + " and ", " before a number included
        r" +(?!\S)",
        r"\s",
    )
)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' + (message['content'] | trim) + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def control_token(index: int) -> str:
    """The text of the control token with this id (below `RESERVED`)."""
    return CONTROL_TOKENS.get(index, f"<unused{index}>")


def _corpus(seed: int, samples: int) -> Iterator[str]:
    """Samples of every family (the one with the most rare words more often), the letters, then the common words.

    What the tasks use comes several times and each common word once, so the tasks' words are merged first.
    """
    rng = random.Random(seed)
    for name, task in FAMILIES.items():
        for _ in range(samples * (4 if name == "smalltalk" else 1)):
            example = task.sample(rng)
            yield example.prompt
            yield example.answer
    yield from ["user\nmodel\nsystem\nassistant\ntool\ncall"] * samples  # the chat template's words
    letters = " ".join("abcdefghijklmnopqrstuvwxyz")
    yield from [f"a {letters} {letters.upper()}"] * samples
    for word in COMMON_WORDS:
        yield f" {word}"


def build_tokenizer(seed: int = 0, samples: int = 3000) -> Tokenizer:
    """Train the tokenizer on `samples` examples a family; the same for the same seed."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[AddedToken(control_token(i), special=True, normalized=False) for i in range(RESERVED)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, samples), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """The settings that `transformers` reads beside `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 4096,
    }


def write_tokenizer(directory: str | Path, seed: int = 0) -> Tokenizer:
    """Build the tokenizer and write its three files into `directory`, each of them atomically."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(seed)
    _write(directory / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write(directory / "tokenizer_config.json", json.dumps(tokenizer_config(), indent=2) + "\n")
    _write(directory / "chat_template.jinja", CHAT_TEMPLATE)
    return tokenizer


def _write(path: Path, text: str) -> None:
    """Write `path` in one step: readers see the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
