"""Files in the forms of Postfix, cidr, regexp, pcre, cdb, lmdb, asked by Postfix itself and by the maps of this
server: the answers are equal. And so are those of the types that put others together.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from prefork_socketmap.maps import registry
from prefork_socketmap.socketmap.messages import Status
from tests.integration.postfix import Postfix
from tests.integration.servers.process import program, unavailable
from tests.integration.test_native_databases import native, ours
from tests.integration.test_native_tables import KEYS, TEXT
from tests.maps.opening import OpenMap


def require_types(*kinds: str) -> None:
    known = subprocess.check_output([program("postconf", "postfix"), "-m"], text=True).split()
    for kind in kinds:
        if kind not in known:
            unavailable(f"Postfix has no {kind} tables: apt install postfix-{kind}")


ADDRESSES = [
    "192.0.2.1",
    "192.0.2.77",
    "192.0.2.128",
    "192.0.3.1",
    "198.51.100.7",
    "10.0.0.1",
    "10.1.2.3",
    "10.1.2.4",
    "10.255.255.255",
    "172.16.0.1",
    "127.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "2001:db8::1",
    "2001:DB8::1",
    "2001:0db8:0000::0001",
    "2001:db8:1::1",
    "2001:db8:1:2:3:4:5:6",
    "fe80::1",
    "fe80::1%lo",
    "::1",
    "::",
    "::ffff:192.0.2.1",
    "[192.0.2.1]",
    "192.0.2",
    "192.0.2.1 ",
    "192.0.2.01",
    "192.0.2.256",
    "1",
    "a.b.c.d",
    "user@example.com",
    "example.com",
    "192.0.2.0/24",
]
CIDR = [
    "192.0.2.1 one\n192.0.2.0/24 network\n192.0.0.0/16 large\n0.0.0.0/0 any\n",
    "0.0.0.0/0 any\n192.0.2.1 never\n",
    "2001:db8::1 one\n2001:db8::/32 network\n::/0 any\n",
    "[2001:db8::1] one\n[2001:db8::]/32 network\n[192.0.2.0/25] half\n[192.0.2.128]/25 other half\n",
    "!192.0.2.0/24 elsewhere\n192.0.2.1 one\n0.0.0.0/0 rest\n",
    "!!192.0.2.0/24 here\n!2001:db8::/32 elsewhere\n",
    "# comment\n\n192.0.2.1   one   \n  and more\n# comment\n\tand the rest\n10.0.0.0/8 ten\n",
    "if 10.0.0.0/8\n10.1.2.3 special\nif !10.1.0.0/16\n10.0.0.0/8 ordinary\nendif\nendif\n10.1.2.4 behind\n",
    "IF !10.0.0.0/8\n0.0.0.0/0 not ten\nENDIF\n::/0 six\n0.0.0.0/0 four\n",
    "10.0.0.0/8 a\n10.1.0.0/16 b\n!172.16.0.0/12 c\n192.0.2.0/24 d\n192.0.0.0/8 e\n",
    "::ffff:192.0.2.0/120 mapped\n::1 loopback\n",
    "10.1.2.3/32 one\n10.1.2.3/32 two\n10.0.0.0/8 three\n",
]


def compare(postfix: Postfix, open_map: OpenMap, path: Path, kind: str, text: str, keys: Iterable[str]) -> list[str]:
    """Assert that Postfix and the map of type *kind* answer alike from *text*; return what they answered."""
    path.write_text(text)
    # An empty value, which Postfix takes for a mistake in the table, is "not found" in every map here.
    expected = [line for line in native(postfix, f"{kind}:{path}", keys) if not line.endswith("\t")]
    assert ours(open_map(kind, path=str(path)), keys) == expected
    return expected


@pytest.mark.parametrize("text", CIDR)
def test_cidr_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, tmp_path: Path, text: str
) -> None:
    assert compare(unstarted_postfix, open_map, tmp_path / "table", "cidr", text, ADDRESSES)


SUBJECTS = [
    *KEYS,
    "Subject: Make Money Fast",
    "subject: MAKE   money fast",
    "Received: from [192.0.2.1]",
    "aaa",
    "aaab",
    "abab",
    "aabb",
    "ab\tcd",
    "12345",
    "x" * 2000,
    "user+ext+more@sub.example.com",
    "$dollar$",
    "/slash/",
    "a.b*c",
    "ümläut",
    "i",
    "I",
    "abcd",
    "abbcdd",
]
# What both types understand, and mean alike.
BOTH = [
    "/^user/ found\n",
    "/^user@example\\.com$/ anchored\n/@/ any address\n",
    "/^User/i case\n/^user/ other case\n/^USER/i capitals\n",
    "/^(.*)\\+.*@(.*)$/ $1@$2\n",
    "/^([^+@]*)(\\+[^@]*)?@(.*)$/ ${1}|$(2)|${3}\n",
    "/^(user)(\\+ext)?@/ $1: costs $$5$$ for ${2}x\n",
    "!/@/ no address\n/^[^@]*$/ never\n/(@.*)/ $1\n",
    "! /@/ no address\n!!/user/ user\n",
    "if /@example\\.com$/\n/^user/ user there\nif !/^[a-m]/\n/^/ late in the alphabet\nendif\nendif\n/./ rest\n",
    "IF !/@/\n/^[0-9]+$/ number\nENDIF\n/@(.*)/ $1\n",
    "|^user@| other delimiter\n,^[a-z],ii letters\n",
    "/user/\n    continued\n# comment\n    twice\n",
    "/a\\/b|\\/slash/ slash\n",
    "/^(a|ab)(c|bcd)?(d*)$/ $1.\n",
    "/[[:space:]]/ space\n/[[:digit:]]{3,}/ digits\n/[^[:ascii:]-~]/ other\n".replace("[^[:ascii:]-~]", "[^ -~]"),
    "/^.{6}$/ six\n/^.{8}$/ eight\n",
    "/é|ü/ letter\n",
    "/^(Subject): +(.*)$/ PREPEND $1: [spam] $2\n",
    "/x{200}/ long\n",
    "/([a-z])(.)([a-z])(.)(.)(.)([a-z])(.)(.)([a-z])([a-z])/ $11$10$1\n",
    "/[ab]*(b?)$/ <$1>\n",
    "/ user/ blank\n/a b/ blank within\n",
    "/^#/ hash\n/=(.)/ $1\n",
    "~^com~ tilde\n",
]
REGEXP = [
    "/^(a|ab)(b*)/ $1.$2\n",
    "/\\(user\\)/x basic $1\n/u\\{1\\}ser/x braces\n/(user)/x parentheses\n/a\\+/x plus\n",
    "/^user/!/example/ but not example\n/^(user)/!/\\+/ $1 without extension\n/^./!/./ never\n",
    "/^com$/m line\n/./m any\n",
    "/[[:alpha:]]+[[:punct:]][[:alnum:]]/ class\n/\\bexample\\b/ word\n/\\w+\\.\\w/ w\n/\\d/ d\n",
    "/(a*)(ab)*(b*)$/ $1.$2.$3\n",
    "/^(.)\\1/ doubled $1\n",
    "/a{2}|b{1,2}|^(c)?/ <$1>\n",
    "/()/ <$1>\n",
    "/^[]ab]+$/ bracket\n/[a-]/ dash\n/[\\]/ backslash\n",
]
PCRE = [
    "/^(?:user)(?=@)/ lookahead\n/(?<!b)user/ lookbehind\n",
    "/^(.+?)@(?<domain>.+)$/ $1 $2\n",
    "/\\d{3}/ digits\n/\\s/ space\n/\\w+@\\w+/ words\n/\\W/ others\n",
    '/^ user # comment /x extended\n/^\\ user/x escaped\n/^" user/ other\n',
    "/ser/A anchored\n/user/A at the start\n/./ rest\n",
    "/com$/E end\n/(.*)a/U <$1>\n/(.*?)m/U {$1}\n",
    "/^a.+$/s no newline\n/^b/m line\n",
    "/(a)|(b)|(u)/ <$1$2$3>\n",
    "/^(?i-i:User)/ inner case\n/^\\QUser+\\E/i quoted\n",
    "/^(?>a*)b/ atomic\n/a++b/ possessive\n/(.)\\1/ back-reference\n",
    "/\\x75ser/ hexadecimal\n/\\101/ octal\n/[\\w.]+\\z/ z\n",
    "/(*UTF)^.{6}$/ characters\n/^.{7}$/ bytes\n",
]


@pytest.mark.parametrize("text", BOTH + REGEXP)
def test_regexp_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, tmp_path: Path, text: str
) -> None:
    assert compare(unstarted_postfix, open_map, tmp_path / "table", "regexp", text, SUBJECTS)


@pytest.mark.parametrize("text", BOTH + PCRE)
def test_pcre_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, tmp_path: Path, text: str
) -> None:
    require_types("pcre")
    assert compare(unstarted_postfix, open_map, tmp_path / "table", "pcre", text, SUBJECTS)


EITHER = ["a", "b", ".", "[ab]", "[^a]", "(a)", "(b|ab)", "()", "^", "$", "\\.", "@", "x"]
ATOMS = {
    "regexp": [*EITHER, "(a*b)", "[[:alpha:]]"],
    "pcre": [*EITHER, "(a*?b)", "(?:ab)", "\\w"],
}
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}"]


def random_rules(source: random.Random, kind: str) -> str:
    """Return a table of random patterns, each with its own groups as result."""
    lines = []
    for number in range(source.randint(1, 4)):
        parts = []
        for _ in range(source.randint(1, 5)):
            atom = source.choice(ATOMS[kind])
            parts.append(atom + (source.choice(REPEATS) if atom not in "^$" else ""))
        pattern = "".join(parts[: len(parts) // 2]) + source.choice(["", "|"]) + "".join(parts[len(parts) // 2 :])
        groups = pattern.replace("(?", "").count("(")
        negated = source.random() < 0.1
        result = "no" if negated else "".join(f"<${group + 1}>" for group in range(groups)) or "yes"
        flags = source.choice(["", "", "i", "m"])
        lines.append(f"{'!' if negated else ''}/{pattern}/{flags} {number} {result}\n")
    return "".join(lines)


@pytest.mark.parametrize("kind", ATOMS)
def test_random_patterns_answer_as_they_do_in_postfix(
    unstarted_postfix: Postfix, open_map: OpenMap, tmp_path: Path, kind: str
) -> None:
    require_types(kind)
    source = random.Random(kind)
    keys = [*SUBJECTS, *("".join(source.choices("abAB.@x", k=source.randint(1, 8))) for _ in range(60))]
    keys = list(dict.fromkeys(keys))
    answers = 0
    for number in range(60):
        text = random_rules(source, kind)
        answers += len(compare(unstarted_postfix, open_map, tmp_path / str(number), kind, text, keys))
    assert answers > 1000


@pytest.mark.parametrize("kind", ["cdb", "lmdb"])
def test_a_database_file_of_postmap_answers_as_postfix_does(
    unstarted_postfix: Postfix, open_map: OpenMap, tmp_path: Path, kind: str
) -> None:
    require_types(kind)
    path = tmp_path / "table"
    path.write_text(TEXT + "\n" + "".join(f"key{number} value {number}\n" for number in range(5000)))
    done = unstarted_postfix.postmap(f"{kind}:{path}")
    assert done.returncode == 0, done.stderr.decode()
    keys = [*KEYS, "", "last", "key0", "key2500", "KEY4999", "key5000", "x" * 1000]
    expected = native(unstarted_postfix, f"{kind}:{path}", keys)
    assert len(expected) > 14
    assert ours(open_map(kind, path=f"{path}.{kind}"), keys) == expected


MEMBERS = {
    "first": "user@example.com one\nuser two@example.com\nkey next\nsame same\n",
    "second": "user@example.com three\ntwo@example.com four\nnext last\nother five\nsame again\nback key\n",
    "third": "last end\nfour done\nagain x\n",
}


@pytest.mark.parametrize("kind", ["unionmap", "pipemap"])
@pytest.mark.parametrize("names", [["first"], ["first", "second"], ["second", "first"], ["first", "second", "third"]])
def test_maps_are_put_together_as_by_postfix(
    unstarted_postfix: Postfix, tmp_path: Path, kind: str, names: list[str]
) -> None:
    tables: dict[str, dict[str, object]] = {"m": {"type": kind, "maps": names}}
    for name, text in MEMBERS.items():
        (tmp_path / name).write_text(text)
        tables[name] = {"type": "file", "path": name, "index_dir": str(tmp_path / "index")}
    table = registry.build(tables, tmp_path)["m"]
    table.open()
    keys = ["user@example.com", "user", "key", "same", "other", "two@example.com", "nobody", "a b", "back"]
    members = ", ".join(f"texthash:{tmp_path / name}" for name in names)
    expected = native(unstarted_postfix, f"{kind}:{{{members}}}", keys)
    assert expected
    assert ours(table, keys) == expected
    table.close()


def test_randmap_draws_the_values_that_postfix_draws(unstarted_postfix: Postfix, open_map: OpenMap) -> None:
    results = ["smtp:[192.0.2.1]", "smtp:[192.0.2.2]", "smtp:[192.0.2.3]"]
    keys = [f"key{number}" for number in range(100)]
    drawn = native(unstarted_postfix, "randmap:{" + ",".join(results) + "}", keys)
    assert {line.partition("\t")[2] for line in drawn} == set(results)
    table = open_map("randmap", results=results)
    replies = [table.lookup(key) for key in keys]
    assert {reply.text for reply in replies} == set(results)
    assert {reply.status for reply in replies} == {Status.OK}


def test_inline_is_the_type_static(unstarted_postfix: Postfix, open_map: OpenMap) -> None:
    entries = {"user@example.com": "one", "Other": "two words", "example.com": "a, b"}
    members = ", ".join(f"{{ {key} = {value} }}" for key, value in entries.items())
    keys = [*KEYS, "other", "OTHER"]
    expected = native(unstarted_postfix, f"inline:{{{members}}}", keys)
    assert expected
    assert ours(open_map("static", entries=entries), keys) == expected
