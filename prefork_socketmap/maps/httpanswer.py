"""What an HTTP answer says of a key: the values in its body, and how long the server wants to be left alone.

Without connections: ``http`` gets the answers. RFC 9110 is HTTP, RFC 6585 the status 429.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

from prefork_socketmap import settings
from prefork_socketmap.socketmap.messages import to_text

NOT_FOUND = "NOTFOUND"
"""What tells that a 404 speaks of the key, and not of a route that is not there: the word of the socketmap protocol,
as the body or in the header ``HEADER``."""
HEADER = "Socketmap-Status"

_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^";\s]+)', re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,9}")
_UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")
# One byte a character; what else Python can decode has pitfalls, and nobody sends it.
_SINGLE_BYTE = re.compile(r"iso-8859-\d{1,2}|latin-?1|windows-125\d")


class AnswerError(Exception):
    """The answer is none to the question; the text says why, without what the server sent."""


class MediaType(NamedTuple):
    """The content type of an answer."""

    name: str
    charset: str

    @property
    def is_json(self) -> bool:
        """Whether it is JSON, by the rules of RFC 6839."""
        return self.name == "application/json" or self.name.endswith("+json")

    def is_one_of(self, accepted: Sequence[str]) -> bool:
        """Whether *accepted* has it, or a range of types that it is in."""
        return any(self.name == each or each == "*/*" or self._is_in(each) for each in accepted)

    def _is_in(self, accepted: str) -> bool:
        return accepted.endswith("/*") and self.name.startswith(accepted[:-1])


def media_type(header: str | None) -> MediaType:
    """Read the header Content-Type; without one the name is empty."""
    text = header or ""
    charset = _CHARSET.search(text)
    return MediaType(text.partition(";")[0].strip().lower(), charset[1].lower() if charset else "utf-8")


class Path:
    """Where the result stands in a JSON document: names and, in lists, numbers, joined by dots."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._steps = text.split(".") if text else []
        if "" in self._steps:
            raise ValueError(
                f"{settings.shown(text)} has an empty step; expected names and numbers such as data.0.address"
            )

    def values(self, document: object) -> list[str]:
        """Return the values there; none where there is null, false, an empty list, or a list that ends earlier.

        Raises AnswerError when *document* has another form.
        """
        for step in self._steps:
            if document is None:
                return []
            if isinstance(document, dict) and step in document:
                document = document[step]
            elif isinstance(document, list) and _NUMBER.fullmatch(step):
                document = document[int(step)] if int(step) < len(document) else None
            else:
                raise AnswerError(f"the JSON has no {settings.shown(step)} of {settings.shown(self.text)}")
        return [value for each in (document if isinstance(document, list) else [document]) for value in _value(each)]


def path(key: str, value: object) -> Path:
    """Read a setting: a path in JSON."""
    text = settings.text(key, value)
    try:
        return Path(text)
    except ValueError as error:
        raise settings.SettingError(key, str(error)) from error


def _value(value: object) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return ["true"]
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise AnswerError("the JSON has half a character")
        return [value]
    raise AnswerError("the JSON has a table or a list where a text is expected; see the setting result")


def values(body: bytes, kind: MediaType, result: Path | None) -> list[str]:
    """Return the values in *body*: its lines or, with *result* or when it is JSON, what stands there.

    Raises AnswerError.
    """
    text = _decode(body, kind.charset)
    if result is None and not kind.is_json:
        return text.splitlines() or [""]
    try:
        # Numbers stay as they are written.
        document = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise AnswerError("the body is no JSON") from error
    return (result or Path("")).values(document)


def says_not_found(body: bytes, header: str | None) -> bool:
    """Whether an answer says of the key that it is not there."""
    return header == NOT_FOUND or body.strip().strip(b'"') == NOT_FOUND.encode()


def retry_after(header: str | None) -> float:
    """Return the seconds that the header Retry-After asks for, 0 for none."""
    if header is None:
        return 0.0
    if header.isascii() and header.isdecimal():
        return float(header[:9])
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _decode(body: bytes, charset: str) -> str:
    if charset in _UTF8:
        return to_text(body)
    if not _SINGLE_BYTE.fullmatch(charset):
        raise AnswerError(f"the character set {charset[:40]!r} is not known here")
    try:
        return body.decode(charset)
    except (LookupError, ValueError) as error:
        raise AnswerError(f"the body is not in the character set {charset!r}") from error
