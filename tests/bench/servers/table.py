"""The one table that every server of the bench answers from, and every loader checks the answers against."""

from collections.abc import Iterator

MAP = "users"


def entries(number: int) -> Iterator[tuple[str, str]]:
    """Iterate over so many keys with their values: of a large table, only the first ones are asked for."""
    return ((f"user{n}@example.com", f"mailbox{n}/") for n in range(number))


ENTRIES = dict(entries(1000))
