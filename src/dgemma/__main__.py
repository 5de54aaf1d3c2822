"""`python -m dgemma`: the same as the `dgemma` command."""

from .cli import main

main()
