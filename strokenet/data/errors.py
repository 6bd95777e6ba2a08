"""The one error for wrong input. Its message is a single line that a user can act on."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: the message names the case or file, what was given, what is allowed, and the mend.

    A name from outside may hold line breaks or escape codes of the terminal: what cannot be printed is written as its
    Python escape, so that the message is one line whatever it quotes.

    exit_code: of a command that ends with it.
    """

    exit_code = 4

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ToldElsewhere(InputError):
    """What another process of the same command ends with too, and says: this one ends in silence, by the same code."""
