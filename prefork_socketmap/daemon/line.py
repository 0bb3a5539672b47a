"""What a log line looks like: as Postfix's do, and such that nobody who gets a word into it can forge one.

``warning: text``; a traceback is more lines, indented. Whatever a client or a database puts into the text stays in
its line, is printable, and leaves room for the rest; where the server writes ``<%s>``, it stays inside the brackets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from prefork_socketmap.socketmap.messages import printable

MAX_LENGTH = 2000
"""Bytes: syslog daemons cut longer lines, and so does Postfix."""
_MAX_TRACEBACK = 40, 1000
"""Lines of a traceback, and bytes of each of them: the text of an exception may be a client's key."""
# Postfix writes no prefix for what is merely told.
_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "fatal: "}
_UTF8_MOST = 4  # bytes of a character
_LONGEST_ESCAPE = 10  # \U0010ffff
_ELLIPSIS = "..."
_AROUND = len(f"'{_ELLIPSIS}'")


def message(record: logging.LogRecord, size: int = MAX_LENGTH) -> str:
    """Return the text of *record*, printable and of at most *size* bytes.

    If it would be longer, its arguments are cut rather than what the server says about them. A record that cannot be
    formatted is told as it is: where a log is written is no place to fail.
    """
    template = str(record.msg)
    try:
        text = record.getMessage()
        if len(text) * _UTF8_MOST <= size and text.isprintable() and text.count(">") == template.count(">"):
            return text  # as nearly all are: a line per lookup has to be cheap
        text = _fill(record, template, size)
        if record.args and len(text.encode()) > size:
            room = (size - len(template.encode())) // len(record.args) - _AROUND
            text = _fill(record, template, max(room // _LONGEST_ESCAPE, 0))
    except Exception as error:  # noqa: BLE001 - an object's own way to become a text
        text = printable(f"{template[:size]} (not formatted: {type(error).__name__})")
    return _cut(text, size)


def _fill(record: logging.LogRecord, template: str, most: int) -> str:
    """Return *template* with the arguments in it, each cut to *most* characters."""
    if not record.args:
        return printable(template[:MAX_LENGTH])
    in_brackets = "<%s>" in template
    if isinstance(record.args, Mapping):
        return printable(template % {key: _fit(each, most, in_brackets) for key, each in record.args.items()})
    return printable(template % tuple(_fit(each, most, in_brackets) for each in record.args))


def _fit(argument: object, most: int, in_brackets: bool) -> object:
    if argument is None or isinstance(argument, int | float):
        return argument
    text = str(argument)
    if len(text) > most:
        argument = text = text[:most] + _ELLIPSIS
    return text.replace(">", r"\x3e") if in_brackets else argument


def _cut(text: str, size: int) -> str:
    data = text.encode()
    return text if len(data) <= size else data[:size].decode(errors="ignore")


class LineFormatter(logging.Formatter):
    """Makes of a record one printable line, and one more, indented, for each line of a traceback."""

    def lines(self, record: logging.LogRecord) -> list[str]:
        """Return the lines of *record*."""
        prefix = _PREFIXES.get(record.levelno, "")
        first = prefix + message(record, MAX_LENGTH - len(prefix))
        return [first, *_indented(self.formatException(record.exc_info))] if record.exc_info else [first]

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of *record*, joined."""
        return "\n".join(self.lines(record))


def _indented(traceback: str) -> list[str]:
    """Return the lines of *traceback*: few enough, and told by their indent from lines of their own."""
    most, size = _MAX_TRACEBACK
    lines = traceback.splitlines()
    if len(lines) > most:
        half = most // 2  # where it began, and where it failed, which stands at the end
        lines[half:-half] = [f"... {len(lines) - 2 * half} lines more ..."]
    return [f"  {_cut(printable(line[:size]), size)}" for line in lines]
