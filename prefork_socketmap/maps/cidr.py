"""The type ``cidr``: networks, in the form of cidr_table(5).

Not with ``ipaddress``: its addresses know zones, and take longer to make than a lookup.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from prefork_socketmap import settings
from prefork_socketmap.maps import rules
from prefork_socketmap.maps.rules import Block, Rule
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.watched import WatchedFileMap
from prefork_socketmap.socketmap.messages import to_text

_ACCEPTED = "expected an address, or network/length, with or without [ ] around it"


class Address(NamedTuple):
    """An address: how many bits it has, and their value."""

    bits: int
    value: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read *text*, as inet_pton(3) does. Raises ValueError."""
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        try:
            packed = socket.inet_pton(family, text)
        except OSError:
            raise ValueError(f"{settings.shown(text)} is no address") from None
        return cls(8 * len(packed), int.from_bytes(packed))


class Network(NamedTuple):
    """The addresses of *bits* bits whose value, but for the last *rest* bits, is *prefix*."""

    bits: int
    rest: int
    prefix: int

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read an address or network/length. Raises ValueError."""
        address, slash, length = _unwrapped(text).partition("/")
        try:
            bits, value = Address.parse(address)
        except ValueError:
            raise ValueError(f"{settings.shown(text)} is no network; {_ACCEPTED}") from None
        if not slash:
            return cls(bits, 0, value)
        if not (length.isascii() and length.isdecimal() and int(length[:4]) <= bits):
            raise ValueError(f"{settings.shown(text)} is no network; {_ACCEPTED}")
        rest = bits - int(length[:4])
        if value != value >> rest << rest:
            raise ValueError(f"{settings.shown(text)} has bits set behind the network's length")
        return cls(bits, rest, value >> rest)

    def contains(self, address: Address) -> bool:
        """Whether *address* lies in it."""
        return address.bits == self.bits and address.value >> self.rest == self.prefix


def _unwrapped(text: str) -> str:
    """Return *text* without brackets around the address or all of it."""
    if not text.startswith("["):
        return text
    inner, bracket, behind = text[1:].partition("]")
    if not bracket or (behind and ("/" in inner or not behind.startswith("/"))):
        raise ValueError(f"{settings.shown(text)} is no network; {_ACCEPTED}")
    return inner + behind


class _Pattern(NamedTuple):
    """A network, or with ``!`` all other addresses of its family."""

    network: Network
    is_negated: bool

    @classmethod
    def parse(cls, text: bytes) -> _Pattern:
        word = to_text(text)
        bare = word.lstrip("!")
        return cls(Network.parse(bare), (len(word) - len(bare)) % 2 == 1)

    def holds(self, address: Address) -> bool:
        return address.bits == self.network.bits and self.network.contains(address) != self.is_negated


class _NetworkRule(NamedTuple):
    """One line."""

    pattern: _Pattern
    result: bytes

    def find(self, key: Address) -> bytes | None:
        return self.result if self.pattern.holds(key) else None


class _Syntax:
    def rule(self, line: bytes) -> Rule[Address]:
        pattern, *rest = line.split(None, 1)
        return _NetworkRule(_Pattern.parse(pattern), rules.result(rest[0] if rest else b""))

    def condition(self, text: bytes) -> Callable[[Address], bool]:
        return _Pattern.parse(text).holds


class _Networks:
    """Consecutive lines without ``!``, as a table: who blocks a hundred thousand networks asks for each client."""

    def __init__(self) -> None:
        # By bits and rest, which are few, and then by prefix: which line, and its result.
        self._tables: dict[tuple[int, int], dict[int, tuple[int, bytes]]] = {}
        self._length = 0

    def add(self, line: _NetworkRule) -> None:
        bits, rest, prefix = line.pattern.network
        self._tables.setdefault((bits, rest), {}).setdefault(prefix, (self._length, line.result))
        self._length += 1

    def find(self, key: Address) -> bytes | None:
        found = min(self._matches(key), default=None)
        return None if found is None else found[1]

    def _matches(self, key: Address) -> Iterator[tuple[int, bytes]]:
        for (bits, rest), table in self._tables.items():
            if bits == key.bits and (match := table.get(key.value >> rest)) is not None:
                yield match


def _with_tables(lines: Sequence[Rule[Address]]) -> list[Rule[Address]]:
    """Return *lines* with tables in the place of those that can be in one."""
    found: list[Rule[Address]] = []
    table: _Networks | None = None
    for each in lines:
        if isinstance(each, _NetworkRule) and not each.pattern.is_negated:
            if table is None:
                table = _Networks()
                found.append(table)
            table.add(each)
        else:
            table = None
            found.append(Block(each.condition, _with_tables(each.rules)) if isinstance(each, Block) else each)
    return found


class CidrMap(WatchedFileMap["Sequence[Rule[Address]]"]):
    """Answers with the result of the first network that the key, an IP address, lies in."""

    fold = setting(settings.boolean, False)
    """Off: an address has no case."""

    def read(self, file: BinaryIO) -> Sequence[Rule[Address]]:
        """Read the rules."""
        return _with_tables(rules.parse(file, _Syntax()))

    def find(self, key: str) -> Sequence[str] | None:
        """Return the result of the first rule that matches *key*; what is no address is not found."""
        lines = self.content()
        try:
            address = Address.parse(key)
        except ValueError:
            return None
        result = rules.find(lines, address)
        return None if result is None else (to_text(result),)
