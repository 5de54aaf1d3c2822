"""Running requests: one at a time for now (answer.py), from a prompt's ids to events and a result."""

from .answer import Answer, answer_autoregressively, answer_by_diffusion

__all__ = ["Answer", "answer_autoregressively", "answer_by_diffusion"]
