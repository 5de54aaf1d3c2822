"""The `dgemma` command. Importing this package loads click and nothing heavier; see `app` for the commands."""

from .app import app, main

__all__ = ["app", "main"]
