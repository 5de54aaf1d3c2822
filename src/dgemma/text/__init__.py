"""Text in and out: tokenizer, streaming decoder, stop strings, chat template, thoughts, tool calls. Needs no torch."""

from .chat import ChatTemplate, check_messages
from .detokenize import StopStrings, StreamDecoder
from .thoughts import Pieces, ReplySplitter
from .tokenizer import Tokenizer
from .tools import Call, check_tools, format_call

__all__ = [
    "Call",
    "ChatTemplate",
    "Pieces",
    "ReplySplitter",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "check_messages",
    "check_tools",
    "format_call",
]
