"""Evaluation: exact-match tasks on held-out prompts, quality and speed in one table."""
