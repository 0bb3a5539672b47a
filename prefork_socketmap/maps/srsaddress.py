"""Addresses of the Sender Rewriting Scheme: made of a sender's, and undone.

The scheme is that of Shevek's paper, as Mail::SRS ("Guarded") and PostSRSd have it, byte for byte: whoever has the
same secret undoes the other's addresses. ``SRS0=hash=day=host=user`` holds a sender; the address of another forwarder
becomes ``SRS1=hash=host=...``, which holds the first one's, so that addresses do not grow with each forwarder.

Pure: knows neither files nor the time. Local parts are handled without their quotes; ``split`` and ``join`` are for
what stands in a lookup and in its answer.
"""

from __future__ import annotations

import base64
import enum
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

SEPARATORS = ("=", "+", "-")
LONGEST_HASH = 27
"""Characters of a SHA-1 in base64."""
LONGEST_LOCAL_PART = 64
"""Octets that every server accepts; RFC 5321, 4.5.3.1.1."""
CYCLE = 1024
"""Days until a day has the same name again."""

_TAG = re.compile(r"SRS([01])[-+=]", re.IGNORECASE)
_DAYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_DAY_NAME = re.compile("[a-zA-Z2-7]{2}")
# PostSRSd 2.2.6 and newer writes hashes in the alphabet for URLs.
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")

_LONGEST_DOMAIN = 255
# What separates the parts of an SRS address cannot be in a domain.
_DOMAIN = re.compile(r"""[^\s@=<>()\[\]"\\,;:\x00-\x20\x7f]+|\[[^\s@=\[\]\\\x00-\x20\x7f]+\]""")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ATOM = r"[\w!#$%&'*+/=?^`{|}~\x80-\U0010ffff-]+"
_DOT_STRING = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
_WORDS = re.compile(r'[^"\\]*(?:(?:"[^"\\]*(?:\\.[^"\\]*)*"|\\.)[^"\\]*)*', re.DOTALL)
_QUOTING = re.compile(r'\\(.)|"', re.DOTALL)


class Flaw(enum.Enum):
    """What may be wrong with an address."""

    FORGED = "forged"
    """The hash is none of ours: made up, cut off, or changed on its way."""
    EXPIRED = "expired"
    """It was made too long ago, or is in no database any more."""
    MALFORMED = "malformed"
    """Parts are missing, or cannot be what they should be."""
    FOREIGN = "foreign"
    """The hash is none of ours, nor is the domain: somebody else can undo it."""
    LONG = "long"
    """It is rewritten, but to a local part that some servers may refuse."""


class FlawedAddressError(Exception):
    """An SRS address cannot be undone, or made into another; ``flaw`` and the text tell why."""

    def __init__(self, flaw: Flaw, problem: str) -> None:
        super().__init__(problem)
        self.flaw = flaw


def split(address: str) -> tuple[str, str] | None:
    """Return local part, without quotes, and domain of *address*; None if it is none that mail could come from."""
    local, _, domain = address.rpartition("@")
    if not local or len(domain) > _LONGEST_DOMAIN or not _DOMAIN.fullmatch(domain):
        return None
    local = _unquoted(local)
    return (local, domain) if local and not _CONTROL.search(local) else None


def join(local: str, domain: str) -> str:
    """Return the address, its local part in quotes if it needs them."""
    return f"{quoted(local)}@{domain}"


def quoted(local: str) -> str:
    """Return *local* as it stands in an address: RFC 5321, 4.1.2."""
    if _DOT_STRING.fullmatch(local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unquoted(local: str) -> str:
    if ('"' not in local and "\\" not in local) or not _WORDS.fullmatch(local):
        return local
    return _QUOTING.sub(lambda match: match[1] or "", local)


def is_srs(local: str) -> bool:
    """Whether *local* is that of an SRS address, right or wrong."""
    return _TAG.match(local) is not None


def day_name(day: int) -> str:
    """Return the two letters for the day *day* since 1970-01-01 (UTC)."""
    return _DAYS[day // 32 % 32] + _DAYS[day % 32]


def _age(name: str, today: int) -> int:
    """Return how many days ago a day called *name* was. Raises FlawedAddressError."""
    if not _DAY_NAME.fullmatch(name):
        raise FlawedAddressError(Flaw.MALFORMED, f"{name!r} is no day")
    number = _DAYS.index(name[0].upper()) * 32 + _DAYS.index(name[1].upper())
    return (today - number) % CYCLE


@dataclass(frozen=True)
class Original:
    """What an SRS address was made of, and what vouches for it."""

    local: str
    domain: str
    secret: int
    """The index of the secret with which it is signed."""
    age: int | None
    """How many days ago it was made; an SRS1 address does not tell."""


@dataclass(frozen=True)
class Scheme:
    """How addresses are made, and which are accepted."""

    separator: str = "="
    """What follows the tag; between the other parts it is always ``=``."""
    hash_length: int = 4
    hash_minimum: int = 4
    max_age: int = 21
    """Days."""

    def rewrite(self, local: str, domain: str, secret: bytes, today: int) -> str:
        """Return the local part that holds the address. Raises FlawedAddressError."""
        tag = _TAG.match(local)
        if tag is None:
            day = day_name(today)
            return f"SRS0{self.separator}{self._sign(secret, day, domain, local)}={day}={domain}={local}"
        if tag[1] == "0":
            # What is behind the tag is the business of who has made it, its separator included.
            host, rest = domain, local[4:]
        else:
            _, host, rest = _parts(local, 3)
        return f"SRS1{self.separator}{self._sign(secret, host, rest)}={host}={rest}"

    def undo(self, local: str, secrets: Sequence[bytes], today: int) -> Original:
        """Return what the SRS address with this local part was made of. Raises FlawedAddressError."""
        if local[3] == "1":
            given, host, rest = _parts(local, 3)
            return Original(f"SRS0{rest}", host, self._signer(given, secrets, [(host, rest)]), None)
        given, day, host, user = _parts(local, 4)
        # Behind Postfix, what PostSRSd has signed with quotes comes back without.
        forms = [user] if quoted(user) == user else [user, quoted(user)]
        secret = self._signer(given, secrets, [(day, host, form) for form in forms])
        age = _age(day, today)
        if age > self.max_age:
            raise FlawedAddressError(Flaw.EXPIRED, f"made {age} days ago, more than {self.max_age}")
        return Original(user, host, secret, age)

    def _sign(self, secret: bytes, *data: str) -> str:
        return _hash(secret, data)[: self.hash_length].decode()

    def _signer(self, given: str, secrets: Sequence[bytes], data: Sequence[Sequence[str]]) -> int:
        """Return the index of the secret with which *given* is the hash of one of *data*.

        Raises FlawedAddressError.
        """
        # On their way addresses may lose their case; so the hash is compared without it, as everybody does.
        found = given.encode("utf-8", "surrogateescape").translate(_STANDARD_ALPHABET).lower()
        if not self.hash_minimum <= len(found) <= LONGEST_HASH:
            problem = f"its hash has {len(found)} characters, not {self.hash_minimum} to {LONGEST_HASH}"
            raise FlawedAddressError(Flaw.FORGED, problem)
        for index, secret in enumerate(secrets):
            for each in data:
                if hmac.compare_digest(found, _hash(secret, each)[: len(found)].lower()):
                    return index
        raise FlawedAddressError(Flaw.FORGED, f"its hash is made with none of the {len(secrets)} secrets")


def _hash(secret: bytes, data: Sequence[str]) -> bytes:
    # bytes.lower() leaves alone what is not ASCII, as the others do.
    text = "".join(data).encode("utf-8", "surrogateescape").lower()
    return base64.b64encode(hmac.digest(secret, text, "sha1"))[:LONGEST_HASH]


def _parts(local: str, number: int) -> list[str]:
    """Return the parts behind the tag. Raises FlawedAddressError if there are less than *number*."""
    parts = local[5:].split("=", number - 1)
    if len(parts) < number or not all(parts):
        raise FlawedAddressError(Flaw.MALFORMED, "parts of it are missing")
    return parts
