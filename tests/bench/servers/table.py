"""The one table that every server of the bench answers from, and every loader checks the answers against."""

import time
from collections.abc import Iterator

MAP = "users"


def entries(number: int) -> Iterator[tuple[str, str]]:
    """Iterate over so many keys with their values: of a large table, only the first ones are asked for."""
    return ((f"user{n}@example.com", f"mailbox{n}/") for n in range(number))


ENTRIES = dict(entries(1000))


def after_5_ms(key: str) -> str | None:
    """Answer as from a database that is slow."""
    time.sleep(0.005)
    return ENTRIES.get(key)


def after_200_ms(key: str) -> str | None:
    """Answer as from one that is far away."""
    time.sleep(0.2)
    return ENTRIES.get(key)


SLOW = {"slow": after_5_ms, "sleepy": after_200_ms}
"""Maps with the same entries, whose lookups take long and need no processor."""
