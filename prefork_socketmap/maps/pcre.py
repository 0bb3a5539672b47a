"""The type ``pcre``: Perl compatible regular expressions, in the form of pcre_table(5).

The engine is PCRE2, which is Postfix's, too: patterns and results mean the same. A key that makes it try without end
meets the library's limit, so that no lookup hangs in a pattern. Its just-in-time compiler is left off: Postfix does
without, and it needs memory that is both writable and executable, which the systemd unit forbids.
"""

# pcre2 has no type hints.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence

import pcre2

from prefork_socketmap.maps.patterns import Flags, Pattern, PatternError, PatternMap

# <pcre2.h>.
_CASELESS = 0x8
_DOLLAR_ENDONLY = 0x10
_DOTALL = 0x20
_EXTENDED = 0x80
_MULTILINE = 0x400
_UNGREEDY = 0x40000
_ANCHORED = 0x80000000

# PCRE2's own default, and so Postfix's: about a tenth of a second. Some builds of the library have another one.
_LIMIT = b"(*LIMIT_MATCH=10000000)"


class PcrePattern:
    """A compiled pattern. Construction raises ValueError."""

    def __init__(self, pattern: bytes, options: int) -> None:
        try:
            pcre2.compile(pattern, options, jit=False)  # for its errors, which tell a position
            compiled = pcre2.compile(_LIMIT + pattern, options, jit=False)
        except pcre2.PatternError as error:
            raise ValueError(str(error)) from error
        self.groups: int = compiled.groups
        # The library's option, given to the compiler, is overruled by the module's search().
        self._match = compiled.match if options & _ANCHORED else compiled.search

    def match(self, text: bytes) -> Sequence[bytes | None] | None:
        """Return the groups, from the first, of the first match in *text*, or None."""
        try:
            match = self._match(text)
        except pcre2.LibraryError as error:
            raise PatternError(str(error)) from error
        return None if match is None else match.groups()


class PcreMap(PatternMap):
    """Answers with the result of the first Perl compatible regular expression that matches the key."""

    flags = Flags(
        {
            "i": _CASELESS,
            "m": _MULTILINE,
            "s": _DOTALL,
            "x": _EXTENDED,
            "A": _ANCHORED,
            "E": _DOLLAR_ENDONLY,
            "U": _UNGREEDY,
        },
        _CASELESS | _DOTALL,
    )

    def compile(self, pattern: bytes, options: int) -> Pattern:
        """Compile *pattern*."""
        return PcrePattern(pattern, options)
