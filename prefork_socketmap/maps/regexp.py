"""The type ``regexp``: POSIX regular expressions, in the form of regexp_table(5), by the C library's regcomp(3).

Through ctypes, since Python's ``re`` and other engines speak another language than the library that Postfix uses: the
longest match counts, ``\\d`` is a d, and there are classes such as ``[[:alpha:]]``. The library keeps sets of states,
so that its time is bounded by the lengths of key and pattern; except for back-references, which have no such bound in
any engine.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from prefork_socketmap.maps.patterns import Flags, Pattern, PatternError, PatternMap

# <regex.h> and <locale.h> of the GNU C library.
_EXTENDED = 1
_ICASE = 2
_NEWLINE = 4
_NO_MATCH = 1
_ALL_CATEGORIES = 0x1FBF
# regex_t has six members of a pointer's size before the number of groups, and not as many behind it.
_GROUPS_AT = 6 * ctypes.sizeof(ctypes.c_void_p)
_SIZE = 2 * _GROUPS_AT


class _Match(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_int), ("end", ctypes.c_int))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        raise ValueError("the type regexp needs the GNU C library")
    library.newlocale.restype = library.uselocale.restype = ctypes.c_void_p
    library.newlocale.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    library.uselocale.argtypes = (ctypes.c_void_p,)
    return library


@functools.cache
def _c_locale() -> int:
    locale: int = _library().newlocale(_ALL_CATEGORIES, b"C", None)
    return locale


class PosixRegex:
    """A compiled expression. Construction raises ValueError."""

    def __init__(self, pattern: bytes, options: int) -> None:
        library = _library()
        self._compiled = ctypes.create_string_buffer(_SIZE)
        # Postfix's programs run in the locale "C", where a character is a byte.
        before = library.uselocale(_c_locale())
        try:
            error = library.regcomp(self._compiled, pattern, options)
        finally:
            library.uselocale(before)
        if error:
            raise ValueError(self._message(error))
        self.groups = ctypes.c_size_t.from_buffer(self._compiled, _GROUPS_AT).value
        self._matches = (_Match * (self.groups + 1))()

    def __del__(self) -> None:
        if hasattr(self, "groups"):
            _library().regfree(self._compiled)

    def match(self, text: bytes) -> Sequence[bytes | None] | None:
        """Return the groups, from the first, of the leftmost and longest match in *text*, or None."""
        error = _library().regexec(self._compiled, text, len(self._matches), self._matches, 0)
        if error == _NO_MATCH:
            return None
        if error:
            raise PatternError(self._message(error))
        return [None if each.begin < 0 else text[each.begin : each.end] for each in self._matches[1:]]

    def _message(self, error: int) -> str:
        text = ctypes.create_string_buffer(256)
        _library().regerror(error, self._compiled, text, len(text))
        return text.value.decode("utf-8", "replace")


class RegexpMap(PatternMap):
    """Answers with the result of the first POSIX regular expression that matches the key."""

    flags = Flags({"i": _ICASE, "m": _NEWLINE, "x": _EXTENDED}, _ICASE | _EXTENDED)
    takes_second = True

    def compile(self, pattern: bytes, options: int) -> Pattern:
        """Compile *pattern*."""
        return PosixRegex(pattern, options)
