"""The application's own error: what the command line tells in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's, told in one line; generate.py and the scripts print it and exit with 2."""
