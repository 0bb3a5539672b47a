"""A real Postfix delivers over TLS as ``tls-policy`` says, to servers with right certificates and with wrong ones."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prefork_socketmap.maps.dane import Dane
from tests.integration.daemon import Daemon
from tests.integration.postfix import Postfix
from tests.integration.servers.dnsservers import RESOLVER, Nsd, dns_servers
from tests.integration.servers.namespace import private_network
from tests.integration.servers.policyhosts import ADDRESS, PolicyHosts
from tests.integration.servers.smtpsink import Sink
from tests.waiting import eventually

RIGHT, WRONG, BARE = "127.0.1.1", "127.0.1.2", "127.0.1.3"
OTHER = "ab" * 32
DAY = 86400
DISTRUSTED = "status=deferred (Server certificate not "


@dataclass
class Mail:
    """Postfix, the daemon that it asks, and where it delivers."""

    authority: Nsd
    hosts: PolicyHosts
    daemon: Daemon
    postfix: Postfix
    sinks: dict[str, Sink] = field(default_factory=dict)

    def send(self, domain: str) -> str:
        """Send a mail to *domain*; return Postfix's line about its delivery."""
        with self.postfix.transaction() as session:
            queue_id = session.deliver(f"user@{domain}")
        return self.postfix.logged(queue_id, "status=", within=60)

    def age(self, seconds: float) -> None:
        """Let what the daemon remembers be so much older."""
        with contextlib.closing(
            sqlite3.connect(self.daemon.directory / "cache/policies.sqlite", timeout=30)
        ) as store:
            for column in ("stored", "refresh_after", "usable_until", "kept_until"):
                store.execute(f"UPDATE policies SET {column} = {column} - ?", (seconds,))
            # In the details, too, there are times; the policy's is the second.
            store.execute(
                "UPDATE policies SET details = json_set(details, '$[1]', json_extract(details, '$[1]') - ?) "
                "WHERE details IS NOT NULL",
                (seconds,),
            )
            store.commit()
        # smtp(8) remembers what it was told, for as long as it lives.
        self.postfix.reload()

    def publish_policy(self, name: str, mode: str = "enforce", record_id: str = "1", **site: object) -> None:
        """Publish an MTA-STS policy for *name*.plain.test that allows the host of that name."""
        domain = f"{name}.plain.test"
        text = f"version: STSv1\nmode: {mode}\nmx: mx.{domain}\nmax_age: 604800\n"
        self.hosts.add(domain, text, **{"certificate": self.hosts.authority.certify(f"mta-sts.{domain}"), **site})
        record = f'_mta-sts.{name} TXT "v=STSv1; id={record_id};"'
        self.authority.publish("plain.test", record, without=f"_mta-sts.{name} ")


def digest(certificate: Path) -> str:
    """Return the SHA-256 of a certificate: TLSA 3 0 1."""
    text = certificate.read_text()
    pem = text[: text.index("-----END CERTIFICATE-----") + 25]
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


PLAIN = ("sts-right", "sts-wrong", "sts-bare", "no-policy", "testing", "dropped", "forged", "withdrawn", "expired")


@pytest.fixture(scope="module")
def mail() -> Iterator[Mail]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(private_network())
        hosts = stack.enter_context(PolicyHosts())
        right = hosts.authority.certify(*(f"mx.{name}.plain.test" for name in PLAIN), "mx.dane.signed.test")
        wrong = hosts.stranger.certify(*(f"mx.{name}.plain.test" for name in PLAIN))
        sinks = {
            RIGHT: stack.enter_context(Sink(RIGHT, "right", right)),
            WRONG: stack.enter_context(Sink(WRONG, "wrong", wrong)),
            BARE: stack.enter_context(Sink(BARE, "bare", None)),
        }
        where = {"sts-wrong": WRONG, "sts-bare": BARE, "no-policy": WRONG, "testing": WRONG}
        zones = {
            "signed.test": [
                *("match MX 10 mx.match", f"mx.match A {RIGHT}", f"_25._tcp.mx.match TLSA 3 0 1 {digest(right)}"),
                *("mismatch MX 10 mx.mismatch", f"mx.mismatch A {RIGHT}", f"_25._tcp.mx.mismatch TLSA 3 0 1 {OTHER}"),
                *("stripped MX 10 mx.stripped", f"mx.stripped A {BARE}", f"_25._tcp.mx.stripped TLSA 3 0 1 {OTHER}"),
                *("half MX 10 mx.half", "half MX 5 mx.mismatch", f"mx.half A {WRONG}"),
                *("none MX 10 mx.none", f"mx.none A {WRONG}"),
            ],
            "plain.test": [
                *(line for name in PLAIN for line in (f"{name} MX 10 mx.{name}", f"mta-sts.{name} A {ADDRESS}")),
                *(f"mx.{name} A {where.get(name, RIGHT)}" for name in PLAIN),
                "hosted MX 10 mx.mismatch.signed.test.",
            ],
            "bogus.test": ["x MX 10 mx.x", f"mx.x A {RIGHT}"],
        }
        authority, _ = stack.enter_context(dns_servers(zones, ["signed.test"], ["bogus.test"]))
        daemon = stack.enter_context(
            contextlib.closing(
                Daemon(
                    f"""
                    log.level = "debug"

                    [maps.tls]
                    type = "tls-policy"
                    resolver = ["{RESOLVER}"]
                    tls_CAfile = "{hosts.authority.file}"
                    policy_cache = "cache/policies.sqlite"
                    """
                )
            )
        )
        (daemon.directory / "cache").mkdir(mode=0o700)
        daemon.start()
        postfix = stack.enter_context(
            Postfix(
                {
                    "disable_dns_lookups": "no",
                    "mynetworks": "127.0.0.0/8",
                    "smtp_dns_support_level": "dnssec",
                    "smtp_host_lookup": "dns",
                    "smtp_tls_security_level": "may",
                    "smtp_tls_dane_insecure_mx_policy": "dane",
                    "smtp_tls_policy_maps": daemon.table("inet", "tls"),
                    "smtp_tls_CAfile": str(hosts.authority.file),
                    "smtp_tls_loglevel": "1",
                    "minimal_backoff_time": "1h",
                },
                chroot=True,
            )
        )
        # A chrooted smtp(8) finds here which resolver to ask.
        (postfix.queue_directory / "etc").mkdir()
        (postfix.queue_directory / "etc/resolv.conf").write_text(f"nameserver {RESOLVER}\n")
        postfix.start()
        stack.callback(lambda: print(postfix.log(), daemon.log()))
        yield Mail(authority, hosts, daemon, postfix, sinks)


# DANE.


def test_mail_goes_to_a_server_whose_certificate_matches_its_tlsa_record(mail: Mail) -> None:
    assert "status=sent" in mail.send("match.signed.test")
    assert ("user@match.signed.test", True) in mail.sinks[RIGHT].mails
    mail.postfix.logged("Verified TLS connection established to mx.match.signed.test")


def test_mail_waits_for_a_server_whose_certificate_does_not_match_its_tlsa_record(mail: Mail) -> None:
    assert DISTRUSTED in mail.send("mismatch.signed.test")


def test_mail_waits_for_a_server_with_tlsa_records_that_offers_no_tls(mail: Mail) -> None:
    assert "status=deferred (TLS is required, but was not offered" in mail.send("stripped.signed.test")


def test_of_two_servers_mail_goes_to_the_one_without_tlsa_records_if_the_other_fails(mail: Mail) -> None:
    assert "status=sent" in mail.send("half.signed.test")


def test_mail_to_a_domain_that_is_not_signed_is_protected_by_its_provider_s_records(mail: Mail) -> None:
    assert DISTRUSTED in mail.send("hosted.plain.test")


def test_mail_goes_where_nothing_is_published(mail: Mail) -> None:
    assert "status=sent" in mail.send("none.signed.test")
    assert "status=sent" in mail.send("no-policy.plain.test")


def test_mail_waits_while_dnssec_is_broken(mail: Mail) -> None:
    assert "status=deferred" in mail.send("x.bogus.test")


# MTA-STS.


def test_mail_goes_to_a_server_whose_certificate_is_what_the_policy_asks(mail: Mail) -> None:
    mail.publish_policy("sts-right")
    assert "status=sent" in mail.send("sts-right.plain.test")
    mail.postfix.logged("Verified TLS connection established to mx.sts-right.plain.test")


def test_mail_waits_for_a_server_whose_certificate_is_not_what_the_policy_asks(mail: Mail) -> None:
    mail.publish_policy("sts-wrong")
    assert DISTRUSTED in mail.send("sts-wrong.plain.test")


def test_mail_waits_for_a_server_with_a_policy_that_offers_no_tls(mail: Mail) -> None:
    mail.publish_policy("sts-bare")
    assert "status=deferred (TLS is required, but was not offered" in mail.send("sts-bare.plain.test")


def test_mail_goes_to_a_server_whose_policy_is_in_testing(mail: Mail) -> None:
    mail.publish_policy("testing", mode="testing")
    assert "status=sent" in mail.send("testing.plain.test")


# Downgrades: a domain with a policy, whose mail is then led to a server with a wrong certificate.


def _redirect(mail: Mail, name: str) -> None:
    """Do what an attacker does who can forge DNS."""
    mail.authority.publish("plain.test", f"mx.{name} A {WRONG}", without=f"mx.{name} ")


def _refreshed(mail: Mail, name: str) -> None:
    """Let a day pass, ask, and wait until what is asked for has been refreshed."""
    mail.age(DAY)
    store = sqlite3.connect(mail.daemon.directory / "cache/policies.sqlite", timeout=30)
    now = time.time()
    mail.send(f"{name}.plain.test")

    def is_refreshed() -> bool:
        query = "SELECT stored FROM policies WHERE key = ?"
        return bool(store.execute(query, (f"{name}.plain.test",)).fetchone()[0] >= now)

    with contextlib.closing(store):
        eventually(is_refreshed, 30)
    mail.postfix.reload()


def test_who_drops_the_record_does_not_get_the_mail(mail: Mail) -> None:
    mail.publish_policy("dropped")
    assert "status=sent" in mail.send("dropped.plain.test")
    _redirect(mail, "dropped")
    mail.authority.publish("plain.test", without="_mta-sts.dropped ")
    _refreshed(mail, "dropped")
    assert DISTRUSTED in mail.send("dropped.plain.test")


def test_who_publishes_mode_none_without_the_host_s_certificate_does_not_get_the_mail(mail: Mail) -> None:
    mail.publish_policy("forged")
    assert "status=sent" in mail.send("forged.plain.test")
    _redirect(mail, "forged")
    stranger = mail.hosts.stranger.certify("mta-sts.forged.plain.test")
    mail.publish_policy("forged", mode="none", record_id="2", certificate=stranger)
    _refreshed(mail, "forged")
    assert DISTRUSTED in mail.send("forged.plain.test")


def test_a_domain_can_withdraw_its_policy(mail: Mail) -> None:
    mail.publish_policy("withdrawn")
    assert "status=sent" in mail.send("withdrawn.plain.test")
    _redirect(mail, "withdrawn")
    mail.publish_policy("withdrawn", mode="none", record_id="2")
    _refreshed(mail, "withdrawn")
    assert "status=sent" in mail.send("withdrawn.plain.test")
    assert ("user@withdrawn.plain.test", True) in mail.sinks[WRONG].mails


def test_a_policy_protects_until_it_expires(mail: Mail) -> None:
    mail.publish_policy("expired")
    assert "status=sent" in mail.send("expired.plain.test")
    _redirect(mail, "expired")
    mail.authority.publish("plain.test", without="_mta-sts.expired ")
    for _ in range(6):
        _refreshed(mail, "expired")
        assert DISTRUSTED in mail.send("expired.plain.test")
    mail.age(2 * DAY)
    assert "status=sent" in mail.send("expired.plain.test")


# Next hops.


def test_postfix_asks_for_parents_too_and_no_policy_is_theirs(mail: Mail) -> None:
    assert "status=sent" in mail.send("none.signed.test")
    for parent in (".signed.test", ".test"):
        assert f"map tls: '{parent}' is no next hop that can have a policy" in mail.daemon.log()


# The server's life.


def test_what_is_remembered_survives_reload_upgrade_and_restart(mail: Mail) -> None:
    mail.publish_policy("sts-right")
    mail.send("sts-right.plain.test")
    before = len(mail.hosts.requests)
    mail.hosts.sites["mta-sts.sts-right.plain.test"].status = 503
    for change in (mail.daemon.reload, mail.daemon.upgrade, mail.daemon.restart):
        change()
        table = mail.daemon.table("inet", "tls")
        found = mail.postfix.postmap("-q", "sts-right.plain.test", table)
        assert found.stdout == b"secure match=mx.sts-right.plain.test servername=hostname\n", found
    assert len(mail.hosts.requests) == before


def test_the_command_cache_tells_and_forgets_what_the_server_remembers(mail: Mail) -> None:
    table = mail.daemon.table("inet", "tls")
    mail.postfix.postmap("-q", "match.signed.test", table)
    cells = mail.daemon.command("cache", "get", "tls", "Match.Signed.Test.").stdout.split("\t")
    assert cells[:3] + cells[4:] == ["match.signed.test", "OK", "fresh", "dane-only\n"]
    assert "\nmatch.signed.test\tOK\tfresh\t" in f"\n{mail.daemon.command('cache', 'list', 'tls').stdout}"
    forgotten = mail.daemon.command("cache", "purge", "tls", "match.signed.test").stdout
    assert forgotten == "1 answer forgotten\n"
    mail.authority.publish("signed.test", without="_25._tcp.mx.match ")
    assert mail.postfix.postmap("-q", "match.signed.test", table).returncode == 1


def test_query_shows_how_the_answer_is_found(mail: Mail) -> None:
    found = mail.daemon.command("query", "-v", "tls", "hosted.plain.test")
    assert found.stdout == "dane\n"
    mail.daemon.command("cache", "purge", "tls", "hosted.plain.test")
    steps = mail.daemon.command("query", "-v", "tls", "hosted.plain.test").stderr
    for step in (
        "DNS: hosted.plain.test MX: 10 mx.mismatch.signed.test. (not signed, ",
        "DNS: _25._tcp.mx.mismatch.signed.test TLSA: 3 0 1 abab",
        f"hosted.plain.test: DANE: {Dane.SOME.value}",
    ):
        assert step in steps
    again = mail.daemon.command("query", "-v", "tls", "hosted.plain.test").stderr
    assert "map tls: hosted.plain.test is remembered since " in again
