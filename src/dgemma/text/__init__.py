"""Text in and out: tokenizer, streaming decoder, stop strings, chat template, thought channels. Needs no torch."""

from .chat import ChatTemplate, check_messages
from .detokenize import StopStrings, StreamDecoder
from .thoughts import ChannelSplitter, split_thoughts
from .tokenizer import Tokenizer

__all__ = [
    "ChannelSplitter",
    "ChatTemplate",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "check_messages",
    "split_thoughts",
]
