"""What RFC 8461 (MTA-STS) says of the texts that a domain publishes: the TXT record and the policy.

Pure: how they are had is the business of ``tlspolicy`` and ``policyhost``. Section numbers are those of the RFC.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prefork_socketmap.maps.nexthop import domain_name

LONGEST_AGE = 31_557_600
"""Seconds, about a year: the greatest ``max_age`` (3.2)."""

_VERSION = "v=STSv1"
_WSP = " \t"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_ID = re.compile(r"[A-Za-z0-9]{1,32}")
_RECORD_VALUE = re.compile(r"[\x21-\x3a\x3c\x3e-\x7e]+")
# "sts-policy-ext-value": visible characters and those beyond ASCII, with spaces between them.
_POLICY_VALUE = re.compile(r"[^\x00-\x20\x7f-\x9f](?:[^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\x9f])?")
_MAX_AGE = re.compile(r"[0-9]{1,10}")
_MODES = ("enforce", "testing", "none")


class PolicyError(ValueError):
    """A record or a policy breaks a rule; the text says which, without what a stranger wrote."""


class Policy(NamedTuple):
    """A policy (3.2)."""

    mode: str
    """``enforce``, ``testing`` or ``none``."""
    max_age: int
    """Seconds."""
    mx: Sequence[str]
    """Patterns: host names, in A-labels; the first label may be ``*``."""
    lines: Sequence[str]
    """The policy's lines, as they are reported (RFC 8460, 4.4)."""


def record_id(records: Iterable[str]) -> str | None:
    """Return the id in the TXT records of ``_mta-sts.DOMAIN``; None if no record is one of MTA-STS (3.1).

    Raises PolicyError when there is more than one, or the one is wrong.
    """
    # Exactly so: a space before the first semicolon is not forgiven.
    found = [record for record in records if record.startswith(f"{_VERSION};")]
    if not found:
        return None
    if len(found) > 1:
        raise PolicyError(f"{len(found)} records begin with {_VERSION}")
    fields: dict[str, str] = {}
    _, *pairs = found[0].split(";")
    for number, pair in enumerate(pairs, 1):
        if not pair.strip(_WSP) and number == len(pairs):
            break  # the last delimiter
        name, equals, value = pair.strip(_WSP).partition("=")
        if not equals or not _NAME.fullmatch(name) or not _RECORD_VALUE.fullmatch(value):
            raise PolicyError("the record has a field that is no NAME=VALUE")
        fields.setdefault(name, value)
    if "id" not in fields:
        raise PolicyError("the record has no id")
    if not _ID.fullmatch(fields["id"]):
        raise PolicyError("the record's id is not 1 to 32 letters and digits")
    return fields["id"]


def policy(body: bytes) -> Policy:
    """Read a policy (3.2). Raises PolicyError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError("the policy is not UTF-8") from None
    fields: dict[str, str] = {}
    mx: list[str] = []
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip(_WSP):
        lines.pop()  # one end of line is right; more of them, which editors leave, harm nobody
    for line in lines:
        name, value = _field(line)
        if name == "mx":
            mx.append(_pattern(value))
        else:
            fields.setdefault(name, value)  # of a field that is repeated the first one counts
    _require(fields)
    if not mx and fields["mode"] != "none":
        raise PolicyError("the policy names no mx")
    max_age = min(int(fields["max_age"]), LONGEST_AGE)
    return Policy(fields["mode"], max_age, tuple(dict.fromkeys(mx)), tuple(line.rstrip(_WSP) for line in lines))


def _field(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    value = value.strip(_WSP)
    if not colon or not _NAME.fullmatch(name) or not _POLICY_VALUE.fullmatch(value):
        raise PolicyError("the policy has a line that is no NAME: VALUE")
    return name, value


def _require(fields: dict[str, str]) -> None:
    for name in ("version", "mode", "max_age"):
        if name not in fields:
            raise PolicyError(f"the policy has no {name}")
    if fields["version"] != "STSv1":
        raise PolicyError("the policy's version is not STSv1")
    if fields["mode"] not in _MODES:
        raise PolicyError("the policy's mode is not one of " + ", ".join(_MODES))
    if not _MAX_AGE.fullmatch(fields["max_age"]):
        raise PolicyError("the policy's max_age is not a number of up to ten digits")


def _pattern(value: str) -> str:
    """Return an mx pattern, normalized: it goes into an answer of which a stranger shall write no other part."""
    wildcard, name = ("*.", value[2:]) if value.startswith("*.") else ("", value)
    host = domain_name(name) if name.isascii() else None  # A-labels (3.2)
    if host is None:
        raise PolicyError("the policy has an mx that is no host name, with or without *. before it")
    return wildcard + host
