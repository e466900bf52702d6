"""`python -m s2srm`, which torchrun starts, and the `s2srm` script."""

from typing import NoReturn

from s2srm.cli import main
from s2srm.process import run_and_exit


def program() -> NoReturn:
    """The command line as a process of its own."""
    run_and_exit(main)


if __name__ == "__main__":
    program()
