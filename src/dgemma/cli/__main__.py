"""`python -m dgemma.cli` does what `dgemma` does."""

from . import main

if __name__ == "__main__":
    main()
