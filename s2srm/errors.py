"""The one exception that a command turns into a single line and exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: its message names the file, line, key or value, and what would be right.

    Commands print the message on one line without a traceback and exit with code 2. Code that
    imports s2srm as a library can catch it as a ValueError.
    """
