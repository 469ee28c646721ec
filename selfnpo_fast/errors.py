"""The one exception that a user's mistake raises: a single line that names the field, the value and the mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. Commands print the message alone and leave with exit code 2."""
