"""The type ``srs``: the Sender Rewriting Scheme, for ``sender_canonical_maps`` and ``recipient_canonical_maps``.

Who forwards mail may not send with the addresses of its sender's domain (SPF); with one of his own he may, and what
bounces comes back to him. What such an address looks like is the business of ``srsaddress``; here it is decided whose
addresses are rewritten, which secret is used, and what is told when an address is not undone.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from prefork_socketmap import settings
from prefork_socketmap.maps import envelopes, srsaddress
from prefork_socketmap.maps.base import Map, log, reason
from prefork_socketmap.maps.envelopes import Envelopes
from prefork_socketmap.maps.secret import secret
from prefork_socketmap.maps.setting import removed, setting
from prefork_socketmap.maps.srsaddress import Flaw, FlawedAddressError, Scheme
from prefork_socketmap.maps.watched import FollowedFile
from prefork_socketmap.socketmap.messages import printable

if TYPE_CHECKING:
    from prefork_socketmap.maps.backend import Links

_DAY = 86400
_INDEX = {flaw: index for index, flaw in enumerate(Flaw)}
_ACCEPTED_DOMAIN = "a domain, such as example.com"
_ACCEPTED_PATTERN = f"{_ACCEPTED_DOMAIN}, or .example.com for all below it"


class Domains:
    """A set of domains; ``.example.com`` stands for all domains below example.com."""

    def __init__(self, patterns: Sequence[str]) -> None:
        folded = [pattern.casefold() for pattern in patterns]
        self._names = frozenset(each for each in folded if not each.startswith("."))
        self._parents = frozenset(each for each in folded if each.startswith("."))

    def __contains__(self, domain: str) -> bool:
        folded = domain.casefold()
        if folded in self._names:
            return True
        # A domain has 255 octets at most (``srsaddress.split``), so this ends soon.
        return any(
            folded[place:] in self._parents for place, letter in enumerate(folded) if letter == "." and place > 0
        )


def _is_domain(text: str) -> bool:
    return srsaddress.split(f"x@{text}") is not None and text[0] not in "[."


def _is_pattern(text: str) -> bool:
    return _is_domain(text.removeprefix("."))


def _domain(key: str, value: object) -> str:
    if isinstance(value, str) and _is_domain(value):
        return value
    raise settings.wrong(key, value, _ACCEPTED_DOMAIN)


def _local_domains(key: str, value: object) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple):
        raise settings.wrong(key, value, "a list of domains, or the name of a file of them")
    for item in value:
        if not isinstance(item, str) or not _is_pattern(item):
            raise settings.wrong(key, item, _ACCEPTED_PATTERN)
    return tuple(value)


def _direction(key: str, value: object) -> str:
    return settings.choice(key, value, ("forward", "reverse"))


def _separator(key: str, value: object) -> str:
    return settings.choice(key, value, srsaddress.SEPARATORS)


def _original_envelope(key: str, value: object) -> str:
    return settings.choice(key, value, ("embedded", "database"))


def _hash_length(key: str, value: object) -> int:
    return settings.count(key, value, 4, srsaddress.LONGEST_HASH)


def _max_age(key: str, value: object) -> int:
    """Read a time; return whole days."""
    days = int(settings.seconds(key, value)) // _DAY
    if not 0 < days < srsaddress.CYCLE:
        accepted = f"a time from 1d to {srsaddress.CYCLE - 1}d: addresses tell the day of {srsaddress.CYCLE}"
        raise settings.wrong(key, value, accepted)
    return days


class SrsMap(Map):
    """Answers with the address to use in the place of the key; not found, if it is to stay as it is.

    The keys are named as in postsrsd.conf. A direction that has no use for one of them checks it all the same, so
    that the tables of both can be alike.
    """

    is_table = False
    # An address is the whole key, and its case is kept.
    fold = removed(False)
    search = removed("exact")
    max_key_size = removed(0)
    recipient_delimiter = removed("")
    propagate_extension = removed(False)

    direction = setting(_direction)
    """``"forward"`` makes addresses of ``domain`` of those of senders; ``"reverse"`` undoes that."""
    domain = setting(_domain, "")  # type: ignore[assignment]  # see is_table
    """The domain of the addresses that are made."""
    local_domains = setting(_local_domains, ())  # type: ignore[assignment]
    """Domains whose senders stay as they are; ``domain`` is one of them. A string names a file of them, one in each
    line, which is read again when it changes."""
    secret_file = setting(secret)
    """A file with a secret in each line. The first signs, all verify. It is read again when it changes."""
    hash_length = setting(_hash_length, 4)
    """Characters of the hash in an address."""
    hash_minimum = setting(_hash_length, None)
    """The least characters of a hash that are accepted. Default: ``hash_length``."""
    max_age = setting(_max_age, 21)
    """How long after its making an address is undone, in whole days."""
    separator = setting(_separator, "=")
    """What follows the tag, SRS0 or SRS1, of an address that is made."""
    always_rewrite = setting(settings.boolean, False)
    """Whether senders in ``local_domains`` are rewritten, too."""
    original_envelope = setting(_original_envelope, "embedded")
    """Whether the sender stands in the address, or in a database."""
    envelope_database = setting(settings.table, None)
    """That database: ``type`` is "sqlite", "redis", "postgresql" or "mysql", the rest is as in a map of the type."""

    _secrets: FollowedFile[Sequence[bytes]]
    _local: FollowedFile[Domains] | None = None

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        minimum = self.hash_length if self.hash_minimum is None else self.hash_minimum
        if minimum > self.hash_length:
            problem = f"is {minimum}, more than hash_length, which is {self.hash_length}"
            raise settings.SettingError(f"maps.{name}.hash_minimum", problem)
        self._forwards = self.direction == "forward"
        if self._forwards and not self.domain:
            raise settings.SettingError(f"maps.{name}.domain", "is missing")
        self._scheme = Scheme(self.separator, self.hash_length, minimum, self.max_age)
        self._local_domains = Domains(() if isinstance(self.local_domains, str) else self.local_domains)
        self._own = self.domain.casefold()
        self._envelopes = self._make_envelopes()
        self._counts: MutableSequence[int] = [0] * len(Flaw)

    def _make_envelopes(self) -> Envelopes | None:
        if self.original_envelope == "database":
            table = envelopes.DEFAULT if self.envelope_database is None else self.envelope_database
            return envelopes.make(f"{self.name}.envelope_database", table, self.base)
        if self.envelope_database is not None:
            problem = 'goes with original_envelope = "database" only'
            raise settings.SettingError(f"maps.{self.name}.envelope_database", problem)
        return None

    def share(self, links: Callable[[], Links]) -> None:
        """Take the connections of the database, if there is one, from those that the maps of this process share."""
        if self._envelopes is not None:
            self._envelopes.share(links)

    def prepare(self) -> None:
        """Read the files, and open the database if there is one. Raises SettingError when that is not possible."""
        # Not its name in an error: see secret.Secret.
        self._secrets = FollowedFile(
            self.base, self.secret_file, _read_secrets, self.complaints, outcome="the secrets stay as they were"
        )
        try:
            self._secrets.open()
        except (OSError, ValueError) as error:
            problem = f"cannot use the file: {reason(error)}"
            raise settings.SettingError(f"maps.{self.name}.secret_file", problem) from None
        if isinstance(self.local_domains, str):
            self._local = FollowedFile(
                self.base,
                self.local_domains,
                _read_domains,
                self.complaints,
                outcome="the local domains stay as they were",
            )
            try:
                self._local.open()
            except (OSError, ValueError) as error:
                problem = f"{settings.shown(self.local_domains)}: {reason(error)}"
                raise settings.SettingError(f"maps.{self.name}.local_domains", problem) from None
        if self._envelopes is not None:
            self._envelopes.open()

    def release(self) -> None:
        """Let go of the files and the database."""
        self._secrets.close()
        if self._local is not None:
            self._local.close()
        if self._envelopes is not None:
            self._envelopes.close()

    def verify(self) -> None:
        """Ask the database, if there is one, whether it has the table."""
        if self._envelopes is not None:
            self._envelopes.verify()

    def count_in(self, cells: MutableSequence[int]) -> None:
        """Count in *cells*, on from what stands there, how many addresses there are with each flaw."""
        self._counts = cells

    @property
    def flaws(self) -> Mapping[Flaw, int]:
        """How many addresses there were with each flaw."""
        return dict(zip(Flaw, self._counts, strict=True))

    def find(self, key: str) -> Sequence[str] | None:
        """Return the address to use in the place of *key*."""
        found = srsaddress.split(key)
        if found is None:
            self._tell(key, "it is no address with a local part and a domain")
            return None
        local, domain = found
        try:
            answer = self._forward(key, local, domain) if self._forwards else self._reverse(key, local)
        except FlawedAddressError as error:
            self._count(error.flaw, key, domain, str(error))
            return None
        return None if answer is None else (answer,)

    # Forward.

    def _forward(self, key: str, local: str, domain: str) -> str | None:
        if not self.always_rewrite and self._is_local(domain):
            self._tell(key, "its domain is local")
            return None
        if domain == envelopes.DOMAIN:
            raise FlawedAddressError(Flaw.MALFORMED, "its domain is none")
        if self._envelopes is not None and not srsaddress.is_srs(local):
            return self._stored(key, self._envelopes, local, domain)
        new = self._rewritten(key, local, domain)
        if self._envelopes is not None and _octets(new) > srsaddress.LONGEST_LOCAL_PART:
            return self._stored(key, self._envelopes, local, domain)
        return self._address(key, new)

    def _stored(self, key: str, database: Envelopes, local: str, domain: str) -> str:
        """Return the address for a sender that is kept in *database*."""
        sender = srsaddress.join(local, domain)
        alias = envelopes.alias_of(sender)
        # The last day of an address counts whole.
        database.put(alias, sender, (self.max_age + 1) * _DAY)
        self._tell(key, "it is in the database, as %s", alias)
        return self._address(key, self._rewritten(key, alias, envelopes.DOMAIN))

    def _rewritten(self, key: str, local: str, domain: str) -> str:
        """Return the local part that holds the sender, in quotes if it needs them."""
        secrets = self._secrets.content()
        today = _today()
        new = self._scheme.rewrite(local, domain, secrets[0], today)
        self._tell(key, "signed with secret 1 of %d, on day %s", len(secrets), srsaddress.day_name(today))
        return srsaddress.quoted(new)

    def _address(self, key: str, local: str) -> str:
        if (octets := _octets(local)) > srsaddress.LONGEST_LOCAL_PART:
            self._counts[_INDEX[Flaw.LONG]] += 1
            text = (
                "%r is rewritten to a local part of %d octets, more than the %d that every server takes; "
                'original_envelope = "database" and a hash_length of 4 make short ones'
            )
            self.complaints.log(logging.WARNING, text, printable(key), octets, srsaddress.LONGEST_LOCAL_PART)
        return f"{local}@{self.domain}"

    def _is_local(self, domain: str) -> bool:
        if domain.casefold() == self._own:
            return True
        return domain in (self._local_domains if self._local is None else self._local.content())

    # Reverse.

    def _reverse(self, key: str, local: str) -> str | None:
        if not srsaddress.is_srs(local):
            self._tell(key, "it is no SRS address")
            return None
        secrets = self._secrets.content()
        original = self._scheme.undo(local, secrets, _today())
        age = "" if original.age is None else f", {original.age} days ago"
        self._tell(key, "signed with secret %d of %d%s", original.secret + 1, len(secrets), age)
        if original.domain != envelopes.DOMAIN:
            return srsaddress.join(original.local, original.domain)
        if self._envelopes is None:
            raise FlawedAddressError(Flaw.EXPIRED, 'its sender is in a database; original_envelope is "embedded"')
        sender = self._envelopes.get(original.local.upper())
        if sender is None:
            raise FlawedAddressError(Flaw.EXPIRED, "its sender is not in the database any more")
        self._tell(key, "its sender is in the database")
        return sender

    # What is told.

    def _count(self, flaw: Flaw, key: str, domain: str, problem: str) -> None:
        # The addresses of other forwarders may pass here. One comes out of each SRS1 address, and Postfix asks again.
        if flaw is Flaw.FORGED and self._own and not self._is_local(domain):
            flaw = Flaw.FOREIGN
        self._counts[_INDEX[flaw]] += 1
        self._tell(key, "%s: %s", flaw.value, problem)

    def _tell(self, key: str, text: str, *arguments: object) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("map %s: %r: %s", self.name, key, text % arguments if arguments else text)


def _octets(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _today() -> int:
    return int(time.time()) // _DAY


def _read_secrets(file: BinaryIO) -> Sequence[bytes]:
    if os.fstat(file.fileno()).st_mode & (stat.S_IROTH | stat.S_IWOTH):
        # Not a ValueError: the file's tag does not tell when this is mended.
        raise PermissionError("everybody may read or write it; chmod o= it")
    secrets = [secret for line in file if (secret := line.rstrip(b"\r\n"))]
    if not secrets:
        raise ValueError("there is no secret in it")
    return secrets


def _read_domains(file: BinaryIO) -> Domains:
    return Domains([pattern for number, line in enumerate(file, 1) if (pattern := _pattern(number, line))])


def _pattern(number: int, line: bytes) -> str:
    """Return the pattern in a line of a file, "" if there is none. Raises ValueError."""
    try:
        text = line.partition(b"#")[0].decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"line {number}: not UTF-8") from None
    if text and not _is_pattern(text):
        raise ValueError(f"line {number}: {settings.shown(text)} is not accepted here; expected {_ACCEPTED_PATTERN}")
    return text
