"""OpenAI's requests and answers without a transport: what the server and batches have in common.

A parsed body becomes a `Call`, checked field by field; its `ask` goes to the engine; its `answer` makes the body of the
response. Nothing here knows of HTTP beyond an error's status.
"""

from .ask import Ask
from .call import Answer, Call
from .errors import ApiError, from_engine
from .read import read_call
from .served import Served

__all__ = ["Answer", "ApiError", "Ask", "Call", "Served", "from_engine", "read_call"]
