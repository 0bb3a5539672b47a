"""The text form of tables, as postmap(1) reads it."""

from __future__ import annotations

import pytest

from prefork_socketmap.maps.textfile import TextFileError, entries


def read(text: bytes) -> list[tuple[bytes, bytes]]:
    return list(entries(text.splitlines(keepends=True)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"key value\n", [(b"key", b"value")]),
        (b"key\tvalue with blanks  \n", [(b"key", b"value with blanks")]),
        (b"key value", [(b"key", b"value")]),
        (b"key value\r\n", [(b"key", b"value")]),
        (b"", []),
        (b"# comment\n\n  \n  # comment\na 1\n", [(b"a", b"1")]),
        (b"a 1 # no comment\n", [(b"a", b"1 # no comment")]),
        (b"a 1\n  2\n\t3\nb 4\n", [(b"a", b"1  2\t3"), (b"b", b"4")]),
        # Comments and empty lines do not end an entry.
        (b"a\n  1\n# comment\n\n  2\n", [(b"a", b"1  2")]),
        # The key keeps its quotes and backslashes.
        (b'"a b"@d  1\n', [(b'"a b"@d', b"1")]),
        (b'"a\\" b" 1\n', [(b'"a\\" b"', b"1")]),
        (b"a\\ b c\n", [(b"a\\ b", b"c")]),
        (b'a "x y" z\n', [(b"a", b'"x y" z')]),
        ("ü@d wért\n".encode(), [("ü@d".encode(), "wért".encode())]),
        # No-break space is no blank.
        ("a\u00a0b c\n".encode(), [("a\u00a0b".encode(), b"c")]),
        (b"a 1\na 2\n", [(b"a", b"1"), (b"a", b"2")]),
    ],
)
def test_entries_are_read_as_postmap_reads_them(text: bytes, expected: list[tuple[bytes, bytes]]) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a 1\nb\n", "line 2: 'b' is not an entry; expected: key, blank, value"),
        (b"a 1\n\nb\n  # c\nc 1\n", "line 3: 'b' is not an entry"),
        (b'a 1\n"b c\n', "line 2: '...' is not an entry"),
        (b"# c\n  a 1\n", "line 2 continues nothing: it begins with a blank"),
        (b"a 1\nb \xff\n", "line 2: 'b...' is not UTF-8"),
        (b"a 1\nb x\0y\n", "line 2: 'b...' has a NUL byte"),
        (b"x" * 100, "line 1: '" + "x" * 10 + "...' is not an entry"),
    ],
)
def test_a_line_that_is_no_entry_is_an_error_with_its_number(text: bytes, problem: str) -> None:
    with pytest.raises(TextFileError) as error:
        read(text)
    assert str(error.value).startswith(problem)
