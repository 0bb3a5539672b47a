"""What Postfix asks smtp_tls_policy_maps for: the next hop, in each form that it can have.

"smtp_tls_policy_maps" in postconf(5) and TLS_README, "Per-destination policies": a domain, ``[host]``,
``domain:port``, ``[host]:port``; and ``.parent`` for each parent of a domain. Without DNS: that is ``tlspolicy``'s.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from typing import NamedTuple

import idna

_NEXT_HOP = re.compile(r"(?:\[(?P<host>[^\[\]]+)\]|(?P<domain>[^\[\]:]+))(?::(?P<port>[^:\[\]]+))?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")  # with the underscore that Postfix lets pass
_LONGEST_NAME = 253  # RFC 1035, in characters and without the final dot
_LONGEST_KEY = 1000  # characters: of a name in Unicode, too, there is no more to be had
_SMTP = 25


class NextHop(NamedTuple):
    """Where mail is sent. ``domain`` is in A-labels, lower case, without a final dot."""

    domain: str
    port: int = _SMTP
    has_mx: bool = True
    """Whether Postfix asks for the domain's MX records; for ``[host]`` it does not."""

    def __str__(self) -> str:
        """The one form under which the next hop is remembered."""
        name = self.domain if self.has_mx else f"[{self.domain}]"
        return name if self.port == _SMTP else f"{name}:{self.port}"


@functools.lru_cache(maxsize=1024)  # it is most of what an answer that is remembered costs
def parse(key: str) -> NextHop | None:
    """Return the next hop that *key* is; None for what cannot have a policy.

    These are parents of domains (a policy is for its domain alone: RFC 8461, 3.4), IP addresses (the same section;
    RFC 7672, 2.2: DANE needs a name), and what is no domain name or no qualified one.
    """
    match = _NEXT_HOP.fullmatch(key) if len(key) <= _LONGEST_KEY else None
    if match is None:
        return None
    port = _port(match["port"])
    domain = domain_name(match["host"] or match["domain"])
    if domain is None or port is None:
        return None
    return NextHop(domain, port, has_mx=match["host"] is None)


def domain_name(text: str) -> str | None:
    """Return a domain name in A-labels, lower case, without the final dot; None for what is none."""
    text = text.removesuffix(".")
    if not text.isascii():
        try:
            # As Postfix's valid_utf8_hostname(3): IDNA 2008, with the mapping of UTS 46.
            text = idna.encode(text, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            return None
    text = text.lower()
    labels = text.split(".")
    if len(text) > _LONGEST_NAME or len(labels) == 1 or not all(map(_LABEL.fullmatch, labels)):
        return None
    return None if _is_address(text) else text


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # No top-level domain is a number, so that "1.2.3" is no name, either: RFC 3696, 2.
        return text.rpartition(".")[2].isdecimal()
    return True


def _port(text: str | None) -> int | None:
    if text is None:
        return _SMTP
    if text.isascii() and text.isdecimal():
        return int(text) if len(text) <= 5 and 0 < int(text) <= 65535 else None
    try:
        return socket.getservbyname(text, "tcp")
    except (OSError, ValueError, UnicodeError):
        return None
