"""How settings are checked: a reader per kind of value, and errors that tell key, what was found, what is accepted.

The library's ``Config``, the config file and every map type read their settings with these functions, so that a
time or a wrong key means the same everywhere. What is refused may be a secret in the wrong place, and errors go to
terminals, logs and files that anybody reads: ``shown`` is the one way of a value into a text. This file imports
nothing of the package.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# postconf(5), "time value": a whole number and one unit. Postfix ignores what follows the unit; we refuse it.
_TIME = re.compile(r"([0-9]{1,10})([smhdw]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
# A time has to fit where it is used, in the kernel's structures too; Postfix ends at the same value.
_LONGEST = 2**31 - 1

# What may be shown of a text: a word or a path, a host with its port, a network, a number with its unit.
_PLAIN = re.compile(r"[0-9]* ?[\w.:/*+%~\[\]-]*")
_SERVER = re.compile(r"[\w.+-]*://(?:[\w.-]+(?::[0-9]+)?(?:/|$))?")
_TELLING = re.compile(r"pass|pw\b|secret|token", re.IGNORECASE)  # behind such a word a secret may stand
_LONGEST_PLAIN = 40  # a longer word may be a token itself
_BEGINNING = 10
_MOST_ITEMS = 3
_MOST_BITS = 64


class SettingError(ValueError):
    """A setting is wrong. ``key`` is its dotted name; the text says what was found and what is accepted."""

    may_pass = False
    """Whether it may be right another time, with nothing changed."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, str]]:
        return type(self), (self.key, self.problem)


def shown(value: object) -> str:
    """Return *value* as it may be shown: a number or a word as it is, of anything else what cannot be a secret.

    A URL may have a password or a token, a query anything: what is left of them is the beginning.
    """
    if isinstance(value, str):
        return _shown_text(value)
    if isinstance(value, list | tuple):
        items = [shown(item) for item in value[:_MOST_ITEMS]] + ["..."] * (len(value) > _MOST_ITEMS)
        return f"[{', '.join(items)}]"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return "a very large number"  # repr() refuses some
    if value is None or isinstance(value, int | float):
        return repr(value)
    return "a table" if isinstance(value, dict) else f"a {type(value).__name__}"


def _shown_text(text: str) -> str:
    plain = _beginning(_PLAIN, text)
    if "//" in plain:
        plain = _beginning(_SERVER, text)
    elif "@" in text:
        plain = ""  # what stands before it may be user:password
    if not plain.startswith("/"):  # a path may be long, and that of a file with a password may say so
        if telling := _TELLING.search(plain):
            plain = plain[: telling.end()]
        if len(plain) > _LONGEST_PLAIN:
            plain = plain[:_BEGINNING]
    return repr(text if plain == text else f"{plain}...")


def _beginning(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.match(text)
    return match[0] if match else ""


def wrong(key: str, found: object, accepted: str) -> SettingError:
    """Return the error that says: *found* stands at *key*, but only *accepted* is accepted."""
    return SettingError(key, f"{shown(found)} is not accepted here; expected {accepted}")


def seconds(key: str, value: object) -> float:
    """Read a time: a number of seconds, or a Postfix time value such as ``"10s"``, ``"5m"``, ``"1h"``."""
    number = value
    if isinstance(value, str) and (match := _TIME.fullmatch(value)):
        number = int(match[1]) * _UNITS[match[2]]
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= _LONGEST:
        return float(number)
    raise wrong(key, value, f'a number of seconds from 0 to {_LONGEST}, or a time like "10s", "5m", "1h"')


def count(key: str, value: object, minimum: int = 0, maximum: int | None = None) -> int:
    """Read a whole number of at least *minimum* and, if given, at most *maximum*."""
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= (maximum or value):
        return value
    upper = f" and at most {maximum}" if maximum else ""
    raise wrong(key, value, f"a whole number of at least {minimum}{upper}")


def boolean(key: str, value: object) -> bool:
    """Read true or false."""
    if isinstance(value, bool):
        return value
    raise wrong(key, value, "true or false")


def text(key: str, value: object) -> str:
    """Read a string that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise wrong(key, value, "a string that is not empty")


def texts(key: str, value: object) -> tuple[str, ...]:
    """Read a list of strings, none of them empty."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise wrong(key, value, "a list of strings")


def choice(key: str, value: object, accepted: Collection[str]) -> str:
    """Read one of the words in *accepted*."""
    if isinstance(value, str) and value in accepted:
        return value
    raise wrong(key, value, "one of " + ", ".join(f'"{word}"' for word in accepted))


def table(key: str, value: object) -> Mapping[str, object]:
    """Read a table, in TOML's sense."""
    if isinstance(value, dict):
        return value
    raise wrong(key, value, "a table")


def reject_unknown(prefix: str, found: Collection[str], known: Collection[str]) -> None:
    """Raise a SettingError for the first name in *found* that is not *known*, naming the nearest one that is."""
    for name in found:
        if name not in known:
            import difflib  # for the rare case only

            near = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else "; known here: " + ", ".join(sorted(known))
            raise SettingError(f"{prefix}{name}", f"unknown key{hint}")
