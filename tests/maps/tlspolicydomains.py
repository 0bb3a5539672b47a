"""Domains that keep or break the rules of DANE (RFC 7672) and MTA-STS (RFC 8461), one each, and the right answers.

In the lines, ``{d}`` is the domain's name in its zone, ``{h}`` a digest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from prefork_socketmap.socketmap.messages import Status
from tests.integration.servers.policyhosts import ADDRESS, POLICY, PolicyHosts

SINK = "127.0.0.10"
DIGEST = "ab" * 32
SIGNED, PLAIN, BOGUS, DEAD = "signed.test", "plain.test", "bogus.test", "dead.test"

NONE, TEMP = Status.NOT_FOUND, Status.TEMP
Answer = str | Status


@dataclass
class Domain:
    name: str
    answer: Answer
    lines: Sequence[str] = ()
    zone: str = SIGNED
    policy: str | bytes | None = None
    site: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}.{self.zone}"

    @property
    def reply(self) -> str:
        """The answer; of one that fails its status."""
        if self.answer == "secure":
            return f"secure match=.mx.{self.key} servername=hostname"
        return self.answer if not isinstance(self.answer, Status) else self.answer.value


def host(tlsa: str = "3 1 1 {h}", name: str = "mx.{d}", preference: int = 10) -> list[str]:
    """An MX host with an address and a TLSA record, if any."""
    lines = [f"{{d}} MX {preference} {name}", f"{name} A {SINK}"]
    return [*lines, f"_25._tcp.{name} TLSA {tlsa}"] if tlsa else lines


BARE = host("")
STS = ['_mta-sts.{d} TXT "v=STSv1; id=1;"', f"mta-sts.{{d}} A {ADDRESS}"]


def by_dane() -> list[Domain]:
    elsewhere = f"good.{SIGNED}."
    return [
        Domain("good", "dane-only", host()),
        Domain("two-hosts", "dane-only", [*host(), *host(name="mx2.{d}", preference=20)]),
        Domain("one-of-two", "dane", [*host(), *host("", name="mx2.{d}")]),
        Domain("unprotected", NONE, BARE),
        Domain("trust-anchor", "dane-only", host("2 0 1 {h}")),
        Domain("sha512", "dane-only", host("2 1 2 {h}{h}")),
        Domain("full", "dane-only", host("3 1 0 3003020101")),
        Domain("full-long", "dane-only", host("3 0 0 308180" + "00" * 128)),
        Domain("pkix-ta", "dane", host("0 0 1 {h}")),
        Domain("pkix-ee", "dane", host("1 1 1 {h}")),
        Domain("selector-2", "dane", host("3 2 1 {h}")),
        Domain("matching-3", "dane", host("3 1 3 {h}")),
        Domain("short-sha256", "dane", host("3 1 1 abcd")),
        Domain("short-sha512", "dane", host("3 1 2 {h}")),
        Domain("full-is-no-der", "dane", host("3 1 0 abcdef")),
        Domain("full-cut-off", "dane", host("3 1 0 30820101ab")),
        Domain("usable-beside-unusable", "dane-only", [*host(), "_25._tcp.mx.{d} TLSA 1 1 1 {h}"]),
        Domain("unusable-host-beside-usable", "dane", [*host(), *host("1 1 1 {h}", name="mx2.{d}")]),
        Domain("only-ipv6", "dane-only", ["{d} MX 10 mx.{d}", "mx.{d} AAAA ::1", "_25._tcp.mx.{d} TLSA 3 1 1 {h}"]),
        Domain("host-without-address", "dane-only", [*host(), "{d} MX 20 nowhere.{d}"]),
        Domain("no-host-has-an-address", NONE, ["{d} MX 20 nowhere.{d}"]),
        Domain("no-mx", "dane-only", [f"{{d}} A {SINK}", "_25._tcp.{d} TLSA 3 1 1 {h}"]),
        Domain("no-mx-no-tlsa", NONE, [f"{{d}} A {SINK}"]),
        Domain("null-mx", NONE, ["{d} MX 0 .", f"{{d}} A {SINK}", "_25._tcp.{d} TLSA 3 1 1 {h}"]),
        Domain("other-port", NONE, [*BARE, "_26._tcp.mx.{d} TLSA 3 1 1 {h}"]),
        Domain("alias-of-domain", "dane-only", [f"{{d}} CNAME {elsewhere}"]),
        Domain("alias-of-host", "dane-only", ["{d} MX 10 a.{d}", f"a.{{d}} CNAME mx.{elsewhere}"]),
        Domain(
            "alias-with-tlsa", "dane-only",
            ["{d} MX 10 a.{d}", "a.{d} CNAME b.{d}", f"b.{{d}} A {SINK}", "_25._tcp.a.{d} TLSA 3 1 1 {h}"],
        ),
        Domain(
            "alias-to-unsigned-with-tlsa", "dane-only",
            ["{d} MX 10 a.{d}", f"a.{{d}} CNAME mx.tlsa.{PLAIN}.", "_25._tcp.a.{d} TLSA 3 1 1 {h}"],
        ),
        Domain("alias-to-unsigned", NONE, ["{d} MX 10 a.{d}", f"a.{{d}} CNAME mx.tlsa.{PLAIN}."]),
        Domain("tlsa-is-alias", "dane-only", [*BARE, f"_25._tcp.mx.{{d}} CNAME _25._tcp.mx.{elsewhere}"]),
        Domain("host-unsigned", NONE, [f"{{d}} MX 10 mx.tlsa.{PLAIN}."]),
        Domain("host-elsewhere", "dane-only", [f"{{d}} MX 10 mx.{elsewhere}"]),
        Domain("tlsa", NONE, host(), PLAIN),
        Domain("hosted", "dane", [f"{{d}} MX 10 mx.{elsewhere}"], PLAIN),
        Domain("many-hosts", "dane", [line for n in range(21) for line in host(name=f"mx{n}.{{d}}")]),
        Domain("bogus-domain", TEMP, BARE, BOGUS),
        Domain("host-bogus", TEMP, [f"{{d}} MX 10 mx.bogus-domain.{BOGUS}."]),
        Domain("host-bogus-beside-good", "dane", [*host(), f"{{d}} MX 10 mx.bogus-domain.{BOGUS}."]),
        Domain("host-bogus-beside-bare", "dane", [*BARE, f"{{d}} MX 10 mx.bogus-domain.{BOGUS}."]),
        Domain("tlsa-bogus", TEMP, [*BARE, f"_25._tcp.mx.{{d}} CNAME _25._tcp.mx.bogus-domain.{BOGUS}."]),
        Domain("tlsa-dead", TEMP, [*BARE, f"_25._tcp.mx.{{d}} CNAME x.{DEAD}."]),
        Domain("host-dead", TEMP, [f"{{d}} MX 10 mx.{DEAD}."]),
        Domain("host-dead-beside-bare", NONE, [*BARE, f"{{d}} MX 10 mx.{DEAD}."]),
        Domain("host-dead-beside-good", "dane", [*host(), f"{{d}} MX 10 mx.{DEAD}."]),
        Domain("both", "dane-only", [*host(), *STS], policy=POLICY),
        Domain("both-in-part", "dane", [*host(), *host("", name="mx2.{d}"), *STS], policy=POLICY),
        Domain("unusable-and-sts", "secure", [*host("1 1 1 {h}"), *STS], policy=POLICY),
        Domain("bogus-host-and-sts", TEMP, [*BARE, f"{{d}} MX 10 x.{BOGUS}.", *STS], policy=POLICY),
        Domain("bogus-tlsa-and-sts", TEMP, [*BARE, f"_25._tcp.mx.{{d}} CNAME x.{BOGUS}.", *STS], policy=POLICY),
    ]  # fmt: skip


def by_record() -> list[Domain]:
    texts: dict[str, tuple[Answer, str]] = {
        "record": ("secure", '"v=STSv1; id=1;"'),
        "no-last-delimiter": ("secure", '"v=STSv1; id=1"'),
        "no-spaces": ("secure", '"v=STSv1;id=1;"'),
        "spaces": ("secure", '"v=STSv1;  id=1 ; "'),
        "in-pieces": ("secure", '"v=STS" "v1; id=" "1;"'),
        "extension": ("secure", '"v=STSv1; id=1; foo=bar;"'),
        "extension-first": ("secure", '"v=STSv1; foo=bar; id=1;"'),
        "id-twice": ("secure", '"v=STSv1; id=1; id=2;"'),
        "id-of-32": ("secure", f'"v=STSv1; id={"a" * 32};"'),
        "id-of-33": (NONE, f'"v=STSv1; id={"a" * 33};"'),
        "id-with-sign": (NONE, '"v=STSv1; id=2026-01;"'),
        "id-empty": (NONE, '"v=STSv1; id=;"'),
        "no-id": (NONE, '"v=STSv1;"'),
        "only-version": (NONE, '"v=STSv1"'),
        "no-equals": (NONE, '"v=STSv1; id=1; foo;"'),
        "empty-field": (NONE, '"v=STSv1;; id=1;"'),
        "space-before-delimiter": (NONE, '"v=STSv1 ; id=1;"'),
        "space-before-version": (NONE, '" v=STSv1; id=1;"'),
        "space-around-equals": (NONE, '"v=STSv1; id = 1;"'),
        "version-last": (NONE, '"id=1; v=STSv1;"'),
        "version-in-capitals": (NONE, '"V=STSV1; id=1;"'),
        "version-2": (NONE, '"v=STSv2; id=1;"'),
        "long-name": (NONE, f'"v=STSv1; id=1; {"x" * 33}=1;"'),
    }
    domains = [
        Domain(name, answer, [*BARE, f"_mta-sts.{{d}} TXT {text}", STS[1]], PLAIN, POLICY)
        for name, (answer, text) in texts.items()
    ]
    alias = f"_mta-sts.{{d}} CNAME _mta-sts.record.{PLAIN}."
    host_alias = f"mta-sts.{{d}} CNAME mta-sts.record.{PLAIN}."
    again = '_mta-sts.{d} TXT "v=STSv1; id=2;"'
    spf = '_mta-sts.{d} TXT "v=spf1 -all"'
    return [
        *domains,
        Domain("record-twice", NONE, [*BARE, *STS, again], PLAIN, POLICY),
        Domain("record-beside-another", "secure", [*BARE, *STS, spf], PLAIN, POLICY),
        Domain("no-record", NONE, [*BARE, STS[1]], PLAIN, POLICY),
        Domain("record-is-alias", "secure", [*BARE, alias, STS[1]], PLAIN, POLICY),
        Domain("record-bogus", TEMP, [*BARE, f"_mta-sts.{{d}} CNAME x.{BOGUS}.", STS[1]], PLAIN, POLICY),
        Domain("record-dead", NONE, [*BARE, f"_mta-sts.{{d}} CNAME x.{DEAD}.", STS[1]], PLAIN, POLICY),
        Domain("no-policy-host", NONE, [*BARE, STS[0]], PLAIN),
        Domain("policy-host-refuses", NONE, [*BARE, STS[0], "mta-sts.{d} A 127.0.0.99"], PLAIN),
        Domain("policy-host-refuses-once", "secure", [*BARE, *STS, "mta-sts.{d} A 127.0.0.99"], PLAIN, POLICY),
        Domain("policy-host-is-alias", "secure", [*BARE, STS[0], host_alias], PLAIN, POLICY),
        Domain("policy-host-dead", NONE, [*BARE, STS[0], f"mta-sts.{{d}} CNAME x.{DEAD}."], PLAIN, POLICY),
        Domain("in-signed-zone", "secure", [*BARE, *STS], SIGNED, POLICY),
    ]  # fmt: skip


def _redirect(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(301)
    handler.send_header("Location", f"https://mta-sts.record.{PLAIN}/.well-known/mta-sts.txt")
    handler.send_header("Content-Type", "text/plain")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _drip(handler: BaseHTTPRequestHandler) -> None:
    """Send headers, a byte at a time: each comes within any time limit for one."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.1)


def _flood(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    while True:
        handler.wfile.write(b"version: STSv1\n" * 4096)


def _cut_off(handler: BaseHTTPRequestHandler) -> None:
    """Send a policy whose last digits may be missing: its length is told nowhere, nor its end by TLS."""
    domain = handler.headers["Host"].removeprefix("mta-sts.")
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + POLICY.format(domain=domain).encode()
    )


def _too_short(handler: BaseHTTPRequestHandler) -> None:
    domain = handler.headers["Host"].removeprefix("mta-sts.")
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 500\r\n\r\n")
    handler.wfile.write(POLICY.format(domain=domain).encode())


def _headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(90):
        handler.wfile.write(b"X-%d: %s\r\n" % (number, b"x" * 60_000))


def by_policy_host(hosts: PolicyHosts) -> list[Domain]:
    def typed(*values: str) -> dict[str, object]:
        return {"headers": [("Content-Type", value) for value in values]}

    def certified(*names: str, days: int = 2, common_name: str = "leaf") -> dict[str, object]:
        return {"certificate": hosts.authority.certify(*names, days=days, common_name=common_name)}

    def host_of(name: str) -> str:
        return f"mta-sts.{name}.{PLAIN}"

    unbelieved: dict[str, object] = {"certificate": hosts.stranger.certify(host_of("certificate-of-stranger"))}
    sites: dict[str, tuple[Answer, dict[str, object]]] = {
        "status-404": (NONE, {"status": 404}),
        "status-500": (NONE, {"status": 500}),
        "status-203": (NONE, {"status": 203}),
        "redirected": (NONE, {"speak": _redirect}),
        "type-html": (NONE, typed("text/html")),
        "type-none": (NONE, typed()),
        "type-with-charset": ("secure", typed("text/plain; charset=utf-8")),
        "type-in-capitals": ("secure", typed("Text/PLAIN")),
        "compressed": (NONE, {"headers": [("Content-Type", "text/plain"), ("Content-Encoding", "gzip")]}),
        "drips": (NONE, {"speak": _drip}),
        "floods": (NONE, {"speak": _flood}),
        "cut-off": (NONE, {"speak": _cut_off}),
        "too-short": (NONE, {"speak": _too_short}),
        "many-headers": (NONE, {"speak": _headers}),
        "certificate-of-another": (NONE, certified(host_of("record"))),
        "certificate-expired": (NONE, certified(host_of("certificate-expired"), days=-1)),
        "certificate-with-common-name": (NONE, certified(common_name=host_of("certificate-with-common-name"))),
        "certificate-with-wildcard": ("secure", certified(f"*.certificate-with-wildcard.{PLAIN}")),
        "certificate-with-high-wildcard": (NONE, certified(f"*.{PLAIN}")),
        "certificate-of-stranger": (NONE, unbelieved),
    }  # fmt: skip
    return [Domain(name, answer, [*BARE, *STS], PLAIN, POLICY, site) for name, (answer, site) in sites.items()]


def by_policy() -> list[Domain]:
    def but(old: str, new: str) -> str:
        assert old in POLICY
        return POLICY.replace(old, new)

    match = "secure"
    texts: dict[str, tuple[Answer, str | bytes]] = {
        "policy": (match, POLICY),
        "crlf": (match, POLICY.replace("\n", "\r\n")),
        "no-end-of-last-line": (match, POLICY.rstrip()),
        "blank-lines-at-end": (match, POLICY + "\n\n"),
        "blank-line-between": (NONE, but("mode:", "\nmode:")),
        "no-space-behind-colon": (match, but("mode: ", "mode:")),
        "space-at-end": (match, but("enforce", "enforce  ")),
        "space-at-begin": (NONE, but("mode:", " mode:")),
        "space-before-colon": (NONE, but("mode:", "mode :")),
        "other-order": (match, "max_age: 86400\nmx: *.mx.{domain}\nmode: enforce\nversion: STSv1\n"),
        "host-and-wildcard": (
            f"secure match=a.{PLAIN}:.mx.host-and-wildcard.{PLAIN} servername=hostname",
            but("mx:", f"mx: A.{PLAIN}\nmx:"),
        ),
        "mx-twice": (match, POLICY + "mx: *.mx.{domain}\n"),
        "mode-testing": (NONE, but("enforce", "testing")),
        "mode-none": (NONE, "version: STSv1\nmode: none\nmax_age: 86400\n"),
        "mode-unknown": (NONE, but("enforce", "strict")),
        "mode-in-capitals": (NONE, but("enforce", "Enforce")),
        "mode-twice": (match, POLICY + "mode: none\n"),
        "without-version": (NONE, but("version: STSv1\n", "")),
        "without-mode": (NONE, but("mode: enforce\n", "")),
        "without-mx": (NONE, but("mx: *.mx.{domain}\n", "")),
        "without-max-age": (NONE, but("max_age: 604800\n", "")),
        "other-version": (NONE, but("STSv1", "STSv2")),
        "max-age-no-number": (NONE, but("604800", "1w")),
        "max-age-negative": (NONE, but("604800", "-1")),
        "max-age-too-long": (NONE, but("604800", "1" * 11)),
        "max-age-beyond-a-year": (match, but("604800", "9999999999")),
        "max-age-zero": (match, but("604800", "0")),
        "extension-in-policy": (match, POLICY + "x-note: all's well = fine\n"),
        "line-without-colon": (NONE, POLICY + "hello\n"),
        "value-empty": (NONE, POLICY + "note:\n"),
        "wildcard-inside": (NONE, but("*.mx", "mx.*")),
        "wildcard-twice": (NONE, but("*.mx", "*.*.mx")),
        "wildcard-of-part": (NONE, but("*.mx", "m*.mx")),
        "wildcard-alone": (NONE, but("*.mx.{domain}", "*")),
        "mx-address": (NONE, but("*.mx.{domain}", "127.0.0.10")),
        "mx-injects": (NONE, but("*.mx.{domain}", "a.test:b.test tafile=/etc/passwd")),
        "mx-in-unicode": (NONE, but("*.mx", "bücher")),
        "not-utf-8": (NONE, POLICY.encode() + b"x: \xff\n"),
        "byte-order-mark": (NONE, "\ufeff" + POLICY),
        "control-character": (NONE, POLICY + "x: a\x00b\n"),
        "html": (NONE, "<html>parked</html>"),
        "empty": (NONE, ""),
        "largest": (
            match,
            POLICY + "x: " + "x" * (65536 - len(POLICY.replace("{domain}", "largest.plain.test")) - 3),
        ),
        "too-large": (NONE, POLICY + "x: " + "x" * 65536),
    }
    return [Domain(name, answer, [*BARE, *STS], PLAIN, text) for name, (answer, text) in texts.items()]


def zones(domains: Sequence[Domain]) -> dict[str, list[str]]:
    """Return the lines of the zones."""
    found: dict[str, list[str]] = {zone: [] for zone in (SIGNED, PLAIN, BOGUS)}
    for domain in domains:
        found[domain.zone] += [line.replace("{d}", domain.name).replace("{h}", DIGEST) for line in domain.lines]
    return found
