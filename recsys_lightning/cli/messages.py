"""One line for what jsonargparse says in many."""

from jsonargparse import ArgumentParser


def one_line(message: str, parser: ArgumentParser) -> str:
    """The message on one line."""
    return message
