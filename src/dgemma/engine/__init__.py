"""Running requests: one at a time for now (answer.py), from a prompt's ids to events and a result."""

from .answer import Answer, run

__all__ = ["Answer", "run"]
