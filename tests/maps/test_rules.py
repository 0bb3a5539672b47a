"""The form of pattern tables, with the types ``cidr``, ``regexp`` and ``pcre``: what is refused, and how it is told.

What they answer is compared with Postfix in ``tests/integration/test_native_files.py``.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.maps.opening import OpenMap


def lookup(open_map: OpenMap, tmp_path: Path, kind: str, text: str | bytes, key: str, **table: object) -> Reply:
    path = tmp_path / "table"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return open_map(kind, path="table", **table).lookup(key)


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("cidr", "10.0.0.0/8\n", r"line 1: '10\.0\.0\.0/8': there is no result"),
        ("cidr", "# x\n\n10.0.0.0/8 a\n10.0.0.1/8 b\n", r"line 4: .*'10\.0\.0\.1/8' has bits set behind"),
        ("cidr", "10.0.0.0/33 a\n", r"'10\.0\.0\.0/33' is no network; expected an address"),
        ("cidr", "10.0.0.0/ a\n", r"'10\.0\.0\.0/' is no network"),
        ("cidr", "10.0.0.0/-1 a\n", r"'10\.0\.0\.0/-1' is no network"),
        ("cidr", f"10.0.0.0/{'1' * 5000} a\n", r"is no network"),
        ("cidr", "10.0.0 a\n", r"'10\.0\.0' is no network"),
        ("cidr", "[10.0.0.0 a\n", r"'\[10\.0\.0\.0' is no network"),
        ("cidr", "[10.0.0.0/8]/8 a\n", r"is no network"),
        ("cidr", "[10.0.0.0]x a\n", r"is no network"),
        ("cidr", "example.com a\n", r"'example\.com' is no network"),
        ("cidr", "! 10.0.0.0/8 a\n", r"'' is no network"),
        ("cidr", "if 10.0.0.0/8 a\nendif\n", r"is no network"),
        ("cidr", "if 10.0.0.0/8\n10.0.0.0/8 a\n", r"line 1: the block has no endif"),
        ("cidr", "endif\n", r"line 1: 'endif': there is no if that this endif ends"),
        ("cidr", "if ::/0\nendif x\n", r"line 2: 'endif...': text behind endif"),
        ("cidr", "if ::/0\n" * 60 + "endif\n" * 60, r"line 50: .*more than 49 nested blocks"),
        ("regexp", " /a/ b\n", r"line 1 continues nothing"),
        ("regexp", "abc def\n", r"'abc...': is no rule; expected: /pattern/flags, blank, result"),
        ("regexp", "/abc\n", r"the pattern has no second '/' that ends it"),
        ("regexp", "/abc\\/ x\n", r"the pattern has no second '/' that ends it"),
        ("regexp", "/abc\\\n", r"the pattern has no second '/' that ends it"),
        ("regexp", "\\abc\\ x\n", r"the pattern has no second '\\\\' that ends it"),
        ("regexp", "!\n", r"is no rule"),
        ("regexp", "/a/\n", r"there is no result"),
        ("regexp", "/a/q b\n", r"there is no flag 'q'; accepted are i m x"),
        ("regexp", "/a/1 b\n", r"'1' is no flag"),
        ("pcre", "/a/!/b/ c\n", r"'!' is no flag"),
        ("pcre", "/a/X b\n", r"there is no flag 'X'; accepted are i m s x A E U"),
        ("regexp", "/(a/ b\n", r"line 1: .*Unmatched \( or"),
        ("pcre", "/ab(c/ b\n", r"line 1: .*compilation failed at position 4; missing closing parenthesis"),
        ("regexp", "/(a)/ $2\n", r"the pattern has no group \$2"),
        ("pcre", "/(a)/ $2\n", r"the pattern has no group \$2"),
        ("pcre", "/(a)/ $99999999999\n", r"the pattern has no group \$999999999"),
        ("pcre", "!/(a)/ $1\n", r"a pattern that does not match has no groups"),
        ("pcre", "/(a)/ $0\n", r"a \$ in the result is no \$1"),
        ("pcre", "/(a)/ $1x\n", r"a \$ in the result is no \$1"),
        ("pcre", "/(a)/ ${1\n", r"a \$ in the result is no \$1"),
        ("pcre", "/(a)/ 5$\n", r"write \$\$ for a dollar sign"),
        ("pcre", "if /a/ b\nendif\n", r"text behind the pattern of if"),
        ("pcre", b"/a/ \xff\n", r"the result is not UTF-8"),
        ("pcre", b"/a/ b\0\n", r"has a NUL byte"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(
    open_map: OpenMap, tmp_path: Path, kind: str, text: str | bytes, problem: str
) -> None:
    with pytest.raises(SettingError, match=r"maps\.m\.path: ") as caught:
        lookup(open_map, tmp_path, kind, text, "x")
    assert caught.match(problem)
    assert caught.match("'table': ")


def test_a_missing_file_is_told(open_map: OpenMap, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"maps\.m\.path: 'none': No such file or directory"):
        open_map("cidr", path="none")


def test_an_empty_table_finds_nothing(open_map: OpenMap, tmp_path: Path) -> None:
    for kind in ("cidr", "regexp", "pcre"):
        assert lookup(open_map, tmp_path, kind, "# nothing\n", "192.0.2.1") == Reply.not_found()


def test_keys_keep_their_case_unless_they_are_folded(open_map: OpenMap, tmp_path: Path) -> None:
    for kind in ("regexp", "pcre"):
        assert lookup(open_map, tmp_path, kind, "/^(U.*)$/i $1\n", "User") == Reply.ok("User")
        assert lookup(open_map, tmp_path, kind, "/^(u.*)$/i $1\n", "User", fold=True) == Reply.ok("user")


def test_a_pattern_that_tries_without_end_is_a_temporary_failure(
    open_map: OpenMap, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin = time.monotonic()
    reply = lookup(open_map, tmp_path, "pcre", "!/(a+)+$/ no\n/^/ other\n", "a" * 60 + "b")
    assert reply == Reply.temp_fail("map m: match limit exceeded")
    assert "match limit exceeded" in caplog.text
    # It is a tenth of a second; without the limit it would be years.
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(.*)(.*)(.*)(.*)x", "(a*)*b", "^(a?){50}a{50}$"])
def test_the_patterns_that_hang_other_engines_do_not_hang_regexp(
    open_map: OpenMap, tmp_path: Path, pattern: str
) -> None:
    begin = time.monotonic()
    assert lookup(open_map, tmp_path, "regexp", f"/{pattern}/ yes\n", "a" * 200 + "b").status in Status
    assert time.monotonic() - begin < 60


def test_a_key_of_the_longest_request_is_no_trouble(open_map: OpenMap, tmp_path: Path) -> None:
    for kind in ("regexp", "pcre"):
        assert lookup(open_map, tmp_path, kind, "/^(.).*(.)$/ $1$2\n", "x" + "y" * 100_000 + "z") == Reply.ok("xz")


def test_many_networks_are_a_table(open_map: OpenMap, tmp_path: Path) -> None:
    networks = "".join(f"10.{high}.{low}.0/24 {high} {low}\n" for high in range(200) for low in range(250))
    table = "10.199.249.7 first\n" + networks + "10.0.0.0/8 rest\n"
    assert lookup(open_map, tmp_path, "cidr", table, "10.199.249.7") == Reply.ok("first")
    assert lookup(open_map, tmp_path, "cidr", table, "10.199.249.8") == Reply.ok("199 249")
    assert lookup(open_map, tmp_path, "cidr", table, "10.255.0.1") == Reply.ok("rest")
    assert lookup(open_map, tmp_path, "cidr", table, "11.0.0.1") == Reply.not_found()


def test_patterns_match_where_no_memory_is_both_writable_and_executable() -> None:
    """The systemd unit has MemoryDenyWriteExecute=yes; prctl(2), PR_SET_MDWE, denies the same."""
    script = (
        "import ctypes, mmap\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): raise SystemExit('not known to this kernel')\n"
        "from prefork_socketmap.maps.pcre import PcrePattern\n"
        "from prefork_socketmap.maps.regexp import PosixRegex\n"
        "try: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "except PermissionError: print(*PcrePattern(b'(a)', 0).match(b'a'), *PosixRegex(b'(b)', 1).match(b'b'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if "not known" in done.stderr:
        pytest.skip("the kernel is older than 6.3")
    assert done.stdout == "b'a' b'b'\n", done.stderr
