"""The one error for wrong input. Its message is a single line that a user can act on."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: the message names the case or file, what was given, what is allowed, and the mend."""
