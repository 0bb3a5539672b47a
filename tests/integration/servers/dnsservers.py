"""Private DNS: an authoritative server (nsd) with zones signed or not, behind a resolver that validates (unbound).

In a ``private_network``: the one is 127.0.0.2, the other 127.0.0.1, as /etc/resolv.conf would name it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.integration.servers.process import Server, program, running
from tests.waiting import eventually

RESOLVER = "127.0.0.1"
AUTHORITY = "127.0.0.2"
NOBODY = "127.0.0.99"

_ZONE = """\
$ORIGIN {origin}
$TTL {ttl}
@ SOA ns hostmaster {serial} 3600 600 86400 {ttl}
@ NS ns
ns A {address}
"""
_NSD = """\
server:
    ip-address: {address}
    username: ""
    zonesdir: "."
    pidfile: ""
    xfrdfile: ""
    zonelistfile: "zones"
    server-count: 1
    verbosity: 1
remote-control:
    control-enable: no
"""
_UNBOUND = """\
server:
    interface: {address}
    access-control: 127.0.0.0/8 allow
    username: ""
    chroot: ""
    directory: "{directory}"
    pidfile: ""
    use-syslog: no
    logfile: ""
    module-config: "validator iterator"
    do-not-query-localhost: no
    do-ip6: no
    local-zone: "test." nodefault
    # The authority's answers of now: nothing is cached.
    cache-max-ttl: 0
    cache-max-negative-ttl: 0
    neg-cache-size: 0
    val-bogus-ttl: 0
    infra-host-ttl: 0
    aggressive-nsec: no
"""


class Nsd(Server):
    """The authority. *zones* are lines of master files (RFC 1035), by zone; those in *signed* are signed.

    "." is the root.
    """

    def __init__(self, zones: Mapping[str, Iterable[str]], signed: Iterable[str], ttl: int = 600) -> None:
        super().__init__()
        self._ttl = ttl
        self._serial = 1
        self._keys: dict[str, str] = {}
        (self.directory / "nsd.conf").write_text(
            _NSD.format(address=AUTHORITY)
            + "".join(f'zone:\n    name: "{zone}"\n    zonefile: "{zone}.zone"\n' for zone in zones)
        )
        self._nsd = program("nsd", "nsd")
        self.lines = {zone: list(lines) for zone, lines in zones.items()}
        for zone in signed:
            self._keys[zone] = self._make_key(zone)
        for zone in zones:
            self._write(zone)

    def anchor(self, zone: str) -> Path:
        """Return the file with the key by which the zone's signatures can be validated."""
        return self.directory / f"{self._keys[zone]}.key"

    def new_anchor(self, zone: str) -> Path:
        """Return the same with another key: whoever trusts that finds all answers bogus."""
        return self.directory / f"{self._make_key(zone)}.key"

    def publish(self, zone: str, *lines: str, without: str = "\0") -> None:
        """Add *lines* to the zone, after those that begin with *without* are removed; it is served on return."""
        self.lines[zone] = [line for line in self.lines[zone] if not line.startswith(without)] + list(lines)
        self._serial += 1
        self._write(zone)
        eventually(lambda: self._serves_new(zone), 60, f"the new {zone} is served")
        # What the resolver has for no time at all it has until the end of the second.
        second = int(time.monotonic())
        eventually(lambda: int(time.monotonic()) > second + 1, 30, "the resolver has forgotten the old one")

    def _serves_new(self, zone: str) -> bool:
        # nsd loses a signal that comes while it is busy with the one before.
        assert self._process
        self._process.send_signal(signal.SIGHUP)
        try:
            return bool(eventually(lambda: f" {self._serial} " in dig(AUTHORITY, zone, "SOA"), 3))
        except AssertionError:
            return False

    def command(self) -> list[str]:
        return [self._nsd, "-d", "-c", str(self.directory / "nsd.conf")]

    def is_ready(self) -> bool:
        return all("ns." in dig(AUTHORITY, zone, "SOA") for zone in self.lines)

    def _make_key(self, zone: str) -> str:
        keygen = [program("ldns-keygen", "ldnsutils"), "-a", "ECDSAP256SHA256", "-k", zone]
        return subprocess.run(keygen, cwd=self.directory, capture_output=True, text=True, check=True).stdout.strip()

    def _write(self, zone: str) -> None:
        plain = self.directory / f"{zone}.plain"
        head = _ZONE.format(origin=zone.rstrip(".") + ".", serial=self._serial, address=AUTHORITY, ttl=self._ttl)
        plain.write_text(head + "".join(f"{line}\n" for line in self.lines[zone]))
        new = self.directory / f"{zone}.new"
        if zone in self._keys:
            self.run(program("ldns-signzone", "ldnsutils"), "-f", new.name, plain.name, self._keys[zone])
        else:
            new.write_bytes(plain.read_bytes())
        new.rename(self.directory / f"{zone}.zone")


class Unbound(Server):
    """The resolver. It asks *authority* for all of its zones, and validates those in *anchors*.

    For the zones in *dead* it asks where nobody is.
    """

    def __init__(self, authority: Nsd, anchors: Iterable[Path], dead: Iterable[str]) -> None:
        super().__init__()
        self._unbound = program("unbound", "unbound")
        self._zone = next(iter(authority.lines))
        config = _UNBOUND.format(address=RESOLVER, directory=self.directory)
        config += "".join(f'    trust-anchor-file: "{anchor}"\n' for anchor in anchors)
        for zone in authority.lines:
            config += f'stub-zone:\n    name: "{zone}"\n    stub-addr: {AUTHORITY}\n'
        for zone in dead:
            config += f'stub-zone:\n    name: "{zone}"\n    stub-addr: {NOBODY}\n'
        (self.directory / "unbound.conf").write_text(config)

    def command(self) -> list[str]:
        return [self._unbound, "-d", "-c", str(self.directory / "unbound.conf")]

    def is_ready(self) -> bool:
        return "ns." in dig(RESOLVER, self._zone, "SOA")


def dig(server: str, name: str, kind: str) -> str:
    """Ask *server* for records; return what it says, briefly."""
    command = [program("dig", "bind9-dnsutils"), f"@{server}", name, kind, "+short", "+time=2", "+tries=1"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@contextlib.contextmanager
def dns_servers(
    zones: Mapping[str, Iterable[str]], signed: Iterable[str], bogus: Iterable[str] = (), dead: Iterable[str] = ()
) -> Iterator[tuple[Nsd, Unbound]]:
    """Run both servers. The resolver trusts the keys of the *signed* zones, and wrong ones for those in *bogus*."""
    signed, bogus = list(signed), list(bogus)
    authority = Nsd(zones, [*signed, *bogus])
    anchors = [authority.anchor(zone) for zone in signed] + [authority.new_anchor(zone) for zone in bogus]
    with running(authority), running(Unbound(authority, anchors, dead)) as resolver:
        yield authority, resolver
