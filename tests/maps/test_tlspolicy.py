"""The type ``tls-policy``: next hops, what is remembered, refreshes, downgrades, and servers that are down.

``test_tlspolicy_table`` has the rules of the RFCs.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from prefork_socketmap.maps import domainpolicy, registry
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.mtasts import Policy
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.policyhosts import ADDRESS, POLICY, silent
from tests.maps.tlspolicydomains import BARE, DIGEST, PLAIN, SIGNED, SINK
from tests.maps.tlspolicyworld import Clock, MakeMap, World
from tests.smalldisk import SmallDisk
from tests.waiting import eventually

SECURE = "secure match=.mx.{} servername=hostname"
DAY = 86400


def told(table: Map, key: str) -> str:
    """Return what Postfix is told, of a failure the status."""
    reply = table.lookup(key)
    return reply.text if reply.status is Status.OK else reply.status.value


Publish = Callable[..., str]


@pytest.fixture
def publish(world: World, request: pytest.FixtureRequest) -> Publish:
    """Return what makes a new domain with an MTA-STS policy; by default one that is enforced."""

    def publish(name: str, text: str = POLICY, record: str = "v=STSv1; id=1;", **site: object) -> str:
        lines = [*BARE, f'_mta-sts.{{d}} TXT "{record}"', f"mta-sts.{{d}} A {ADDRESS}"]
        world.authority.publish(PLAIN, *(line.replace("{d}", name) for line in lines))
        domain = f"{name}.{PLAIN}"
        world.hosts.add(domain, text, certificate=world.hosts.authority.certify(f"mta-sts.{domain}"), **site)
        return domain

    return publish


def requests(world: World, domain: str) -> int:
    """Return how often the policy of *domain* has been fetched."""
    return world.hosts.requests.count(f"mta-sts.{domain} /.well-known/mta-sts.txt")


# Next hops. "good" has TLSA records for port 25.


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        (f"good.{SIGNED}", "dane-only"),
        ("GOOD.Signed.Test", "dane-only"),
        (f"good.{SIGNED}.", "dane-only"),
        (f"good.{SIGNED}:25", "dane-only"),
        (f"good.{SIGNED}:smtp", "dane-only"),
        (f"good.{SIGNED}:587", "NOTFOUND"),
        (f"good.{SIGNED}:submission", "NOTFOUND"),
        (f"good.{SIGNED}:nonsense", "NOTFOUND"),
        (f"[mx.good.{SIGNED}]", "dane-only"),
        (f"[mx.good.{SIGNED}.]", "dane-only"),
        (f"[mx.good.{SIGNED}]:25", "dane-only"),
        (f"[mx.good.{SIGNED}]:587", "NOTFOUND"),
        (f"[mx.tlsa.{PLAIN}]", "NOTFOUND"),
        (f"[good.{SIGNED}]", "NOTFOUND"),
        (f"[record.{PLAIN}]", SECURE.format(f"record.{PLAIN}")),
        (f"record.{PLAIN}:587", SECURE.format(f"record.{PLAIN}")),
        (f".good.{SIGNED}", "NOTFOUND"),
        (f"sub.record.{PLAIN}", "NOTFOUND"),
        (f"good.{SIGNED}..", "NOTFOUND"),
        ("127.0.0.10", "NOTFOUND"),
        ("[127.0.0.10]", "NOTFOUND"),
        ("[127.0.0.10]:25", "NOTFOUND"),
        ("[::1]", "NOTFOUND"),
        ("[IPv6:::1]:25", "NOTFOUND"),
        ("localhost", "NOTFOUND"),
        ("two words.test", "NOTFOUND"),
        ("a,b.test", "NOTFOUND"),
        ("-x.test", "NOTFOUND"),
        (f"{'x' * 64}.test", "NOTFOUND"),
        (f"{'x.' * 130}test", "NOTFOUND"),
        ("x" * 5000, "NOTFOUND"),
        (f"good.{SIGNED}\0", "NOTFOUND"),
        ("\udcff.test", "NOTFOUND"),
        ("", "NOTFOUND"),
    ],
)
def test_a_next_hop_gets_the_answer_that_its_form_calls_for(make: MakeMap, key: str, answer: str) -> None:
    assert told(make(), key) == answer


def test_a_domain_in_unicode_is_that_in_a_labels(world: World, make: MakeMap) -> None:
    # IDNA 2008: not "strasse".
    lines = ["{d} MX 10 mx.{d}", f"mx.{{d}} A {SINK}", f"_25._tcp.mx.{{d}} TLSA 3 1 1 {DIGEST}"]
    world.authority.publish(SIGNED, *(line.replace("{d}", "xn--strae-oqa") for line in lines))
    table = make()
    assert told(table, f"straße.{SIGNED}") == "dane-only"
    assert told(table, f"Straße.{SIGNED}") == "dane-only"
    assert told(table, f"xn--strae-oqa.{SIGNED}") == "dane-only"
    assert told(table, f"strasse.{SIGNED}") == "NOTFOUND"


def test_what_cannot_have_a_policy_is_not_asked_for(tmp_path: Path, world: World) -> None:
    tmp_path.chmod(0o700)
    with silent("127.0.0.53") as questions:
        table = registry.build({"m": world.settings(resolver=["127.0.0.53"], policy_cache="c")}, tmp_path)["m"]
        table.open()
        for key in (f".{PLAIN}", "[127.0.0.1]", "127.0.0.1", "[IPv6:::1]", "localhost", "x y.test", ""):
            assert told(table, key) == "NOTFOUND"
        table.close()
    assert questions == []


# What is switched off, and who is trusted.


def test_dane_is_looked_for_only_if_it_is_on(make: MakeMap) -> None:
    table = make(dane=False)
    assert told(table, f"good.{SIGNED}") == "NOTFOUND"
    assert told(table, f"both.{SIGNED}") == SECURE.format(f"both.{SIGNED}")
    assert told(table, "none.bogus.test") == "TEMP"  # it is bogus, whatever it is


def test_mta_sts_is_looked_for_only_if_it_is_on(world: World, make: MakeMap) -> None:
    before = len(world.hosts.requests)
    assert told(make(mta_sts=False), f"record.{PLAIN}") == "NOTFOUND"
    assert len(world.hosts.requests) == before


def test_an_answer_under_other_settings_is_not_given_but_its_policy_is_kept(
    world: World, make: MakeMap, publish: Publish
) -> None:
    domain = publish("other-settings")
    assert told(make(), domain) == SECURE.format(domain)
    assert told(make(tlsrpt=True), domain).startswith(f"{SECURE.format(domain)} policy_type=sts")
    assert told(make(mta_sts=False), domain) == "NOTFOUND"
    assert requests(world, domain) == 1


def test_the_word_of_a_resolver_that_is_not_trusted_does_not_count(
    make: MakeMap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Of the addresses here all are on the loopback interface.
    from prefork_socketmap.maps import dnsclient

    monkeypatch.setattr(dnsclient.Resolver, "is_local", False)
    assert told(make(), f"good.{SIGNED}") == "NOTFOUND"
    assert "no resolver is trusted" in caplog.text
    assert told(make(trusted_resolver=["127.0.0.1"], cache_size=1), f"two-hosts.{SIGNED}") == "dane-only"


def test_who_silences_a_trusted_resolver_does_not_get_another_one_asked(
    make: MakeMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefork_socketmap.maps import dnsclient

    monkeypatch.setattr(dnsclient.Resolver, "is_local", property(lambda self: self.address == "127.0.0.53"))
    with silent("127.0.0.53") as questions:
        table = make(resolver=["127.0.0.53", "127.0.0.1"], timeout=1, query_timeout=0.3)
        assert told(table, f"good.{SIGNED}") == "TEMP"
    assert questions


# TLSRPT.


def test_what_postfix_reports_is_added_if_it_is_asked_for(make: MakeMap, publish: Publish) -> None:
    domain = publish("reported", "version: STSv1\nmode: enforce\nmx: a.test\nmx: *.b.test\nmax_age: 1000\n")
    assert told(make(tlsrpt=True), domain) == (
        "secure match=a.test:.b.test servername=hostname policy_type=sts "
        f"policy_domain={domain} policy_ttl=1000 "
        "{ policy_string = version: STSv1 } { policy_string = mode: enforce } { policy_string = mx: a.test } "
        "{ policy_string = mx: *.b.test } { policy_string = max_age: 1000 } "
        "mx_host_pattern=a.test mx_host_pattern=*.b.test"
    )


def test_a_policy_in_testing_is_reported_and_no_more(make: MakeMap, publish: Publish) -> None:
    domain = publish("in-testing", POLICY.replace("enforce", "testing"))
    answer = told(make(tlsrpt=True), domain)
    assert answer.startswith(f"may policy_type=sts policy_domain={domain} ")
    assert "{ policy_string = mode: testing }" in answer
    assert told(make(), domain) == "NOTFOUND"


def test_nothing_is_added_to_answers_by_dane(make: MakeMap) -> None:
    table = make(tlsrpt=True)
    assert told(table, f"good.{SIGNED}") == "dane-only"
    assert told(table, f"one-of-two.{SIGNED}") == "dane"
    assert told(table, f"unprotected.{SIGNED}") == "NOTFOUND"


@pytest.mark.parametrize("line", ["x: } servername=evil.test {", "x: {", "x: }", "x: ü"])
def test_a_stranger_writes_no_attribute(line: str) -> None:
    policy = Policy("enforce", 86400, ("a.test",), ("version: STSv1", line))
    answer = domainpolicy.answer(policy, "x.test", tlsrpt=True)
    assert answer.count("{") == answer.count("}") == 1
    assert line not in answer
    assert answer.isascii()


def test_a_report_that_is_too_long_is_left_out() -> None:
    policy = Policy("enforce", 86400, ("a.test",), ("x: " + "x" * 60_000,))
    assert domainpolicy.answer(policy, "x.test", tlsrpt=True) == "secure match=a.test servername=hostname"


# What is remembered.


def test_an_answer_is_remembered_by_all_workers_and_survives_them(
    world: World, make: MakeMap, publish: Publish
) -> None:
    domain = publish("remembered")
    first = make()
    assert told(first, domain) == SECURE.format(domain)
    first.close()
    world.resolver.freeze()
    try:
        assert told(make(), domain) == SECURE.format(domain)
    finally:
        world.resolver.thaw()
    assert requests(world, domain) == 1


def test_an_answer_is_looked_for_again_when_it_is_no_longer_fresh(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    table = make()
    assert told(table, f"later.{PLAIN}") == "NOTFOUND"
    domain = publish("later")
    assert told(table, domain) == "NOTFOUND"
    clock.advance(domainpolicy.SHORTEST + 1)
    assert told(table, domain) == SECURE.format(domain)


def test_a_policy_with_the_same_id_is_not_fetched_again_for_a_day(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    domain = publish("same-id")
    table = make()
    for _ in range(5):
        assert told(table, domain) == SECURE.format(domain)
        clock.advance(4000)
        _refreshed(table, domain)
    assert requests(world, domain) == 1
    clock.advance(DAY)
    _refreshed(table, domain)
    assert requests(world, domain) == 2


def _refreshed(table: Map, key: str) -> None:
    """Ask for *key*, and wait until it has been refreshed beside the lookup."""
    told(table, key)
    eventually(lambda: not _refreshing(), 30, "the refresh ends")


def _refreshing() -> bool:
    return any(thread.name.startswith("refresh ") for thread in threading.enumerate())


def test_a_policy_with_a_new_id_is_fetched(world: World, make: MakeMap, publish: Publish, clock: Clock) -> None:
    domain = publish("new-id")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    world.hosts.sites[f"mta-sts.{domain}"].body = b"version: STSv1\nmode: enforce\nmx: other.test\nmax_age: 604800\n"
    world.authority.publish(PLAIN, '_mta-sts.new-id TXT "v=STSv1; id=2;"', without="_mta-sts.new-id ")
    clock.advance(4000)
    _refreshed(table, domain)
    assert told(table, domain) == "secure match=other.test servername=hostname"


def test_a_lookup_never_waits_for_a_refresh(world: World, make: MakeMap, publish: Publish, clock: Clock) -> None:
    domain = publish("beside")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    clock.advance(5 * DAY)
    world.resolver.freeze()
    try:
        # The refresh takes until its time limit, so whoever waited for it would find it ended.
        assert told(table, domain) == SECURE.format(domain)
        assert _refreshing()
    finally:
        world.resolver.thaw()
    eventually(lambda: not _refreshing(), 30)


# Downgrades.


def test_a_policy_outlives_the_loss_of_its_record(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    domain = publish("record-dropped")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    world.authority.publish(PLAIN, without="_mta-sts.record-dropped ")
    for _ in range(6):
        clock.advance(DAY)
        _refreshed(table, domain)
        assert told(table, domain) == SECURE.format(domain)


def test_a_policy_outlives_dns_that_is_blocked(world: World, make: MakeMap, publish: Publish, clock: Clock) -> None:
    domain = publish("dns-blocked")
    table = make(timeout=6, query_timeout=1.5)
    assert told(table, domain) == SECURE.format(domain)
    world.resolver.freeze()
    try:
        for _ in range(3):
            clock.advance(DAY)
            _refreshed(table, domain)
            assert told(table, domain) == SECURE.format(domain)
    finally:
        world.resolver.thaw()


def test_a_policy_outlives_a_policy_host_that_is_not_the_right_one(
    world: World, make: MakeMap, publish: Publish, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    domain = publish("host-forged")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    site = world.hosts.sites[f"mta-sts.{domain}"]
    site.body = b"version: STSv1\nmode: none\nmax_age: 86400\n"
    site.certificate = world.hosts.stranger.certify(f"mta-sts.{domain}")
    world.authority.publish(PLAIN, '_mta-sts.host-forged TXT "v=STSv1; id=2;"', without="_mta-sts.host-forged ")
    clock.advance(4000)
    _refreshed(table, domain)
    assert told(table, domain) == SECURE.format(domain)
    assert (
        f"{domain}: MTA-STS: https://mta-sts.{domain}/.well-known/mta-sts.txt: its certificate is not valid"
        in caplog.text
    )


def test_a_policy_ends_by_mode_none_of_the_right_host(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    domain = publish("withdrawn")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    world.hosts.sites[f"mta-sts.{domain}"].body = b"version: STSv1\nmode: none\nmax_age: 86400\n"
    world.authority.publish(PLAIN, '_mta-sts.withdrawn TXT "v=STSv1; id=2;"', without="_mta-sts.withdrawn ")
    clock.advance(4000)
    _refreshed(table, domain)
    assert told(table, domain) == "NOTFOUND"


def test_a_policy_ends_when_it_expires(world: World, make: MakeMap, publish: Publish, clock: Clock) -> None:
    domain = publish("expired")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    world.authority.publish(PLAIN, without="_mta-sts.expired ")
    clock.advance(604800 - 10)
    assert told(table, domain) == SECURE.format(domain)
    eventually(lambda: not _refreshing(), 30)
    clock.advance(20)
    assert told(table, domain) == "NOTFOUND"


def test_dane_that_fails_is_not_overridden_by_a_policy_that_is_known(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    world.hosts.add(f"turned.{SIGNED}", certificate=world.hosts.authority.certify(f"mta-sts.turned.{SIGNED}"))
    sts = ['_mta-sts.turned TXT "v=STSv1; id=1;"', f"mta-sts.turned A {ADDRESS}"]
    world.authority.publish(SIGNED, "turned MX 10 mx.turned", f"mx.turned A {SINK}", *sts)
    table = make()
    assert told(table, f"turned.{SIGNED}") == SECURE.format(f"turned.{SIGNED}")
    world.authority.publish(SIGNED, "_25._tcp.mx.turned CNAME x.bogus.test.")
    clock.advance(4000)
    _refreshed(table, f"turned.{SIGNED}")
    assert told(table, f"turned.{SIGNED}") == "TEMP"
    # And the policy is not forgotten over it.
    world.authority.publish(SIGNED, without="_25._tcp.mx.turned ")
    clock.advance(400)
    before = requests(world, f"turned.{SIGNED}")
    assert told(table, f"turned.{SIGNED}") == SECURE.format(f"turned.{SIGNED}")
    assert requests(world, f"turned.{SIGNED}") == before


# Servers that are down, and storms.


def test_a_resolver_that_is_dead_costs_a_bounded_time_and_few_questions(
    world: World, make: MakeMap, caplog: pytest.LogCaptureFixture
) -> None:
    with silent("127.0.0.53") as questions:
        table = make(resolver=["127.0.0.53"], timeout=2, query_timeout=0.2)
        for _ in range(50):
            assert table.lookup(f"good.{SIGNED}") == Reply.temp_fail(f"map m: good.{SIGNED} MX: no resolver answers")
        # Two tries, at the MX records; then the failure is remembered for a while.
        assert len(questions) == 2
    assert caplog.text.count("no resolver answers") == 1


def test_a_failure_is_remembered_for_longer_each_time(world: World, make: MakeMap, clock: Clock) -> None:
    with silent("127.0.0.53") as questions:
        table = make(resolver=["127.0.0.53"], timeout=2, query_timeout=0.1)
        for pause in (15, 30, 60, 120, 240, 300, 300):
            told(table, f"good.{SIGNED}")
            before = len(questions)
            clock.advance(pause - 1)
            told(table, f"good.{SIGNED}")
            eventually(lambda: not _refreshing(), 30)
            assert len(questions) == before, pause
            clock.advance(2)
        assert told(make(), f"good.{SIGNED}") == "dane-only"


def test_without_dane_a_resolver_that_is_dead_defers_nothing(make: MakeMap) -> None:
    with silent("127.0.0.53"):
        table = make(resolver=["127.0.0.53"], dane=False, timeout=2, query_timeout=0.2)
        assert told(table, f"record.{PLAIN}") == "NOTFOUND"


def test_a_policy_that_cannot_be_had_and_has_expired_is_no_reason_to_defer(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    domain = publish("expired-and-gone")
    table = make()
    assert told(table, domain) == SECURE.format(domain)
    world.hosts.sites[f"mta-sts.{domain}"].status = 503
    clock.advance(8 * DAY)
    assert told(table, domain) == "NOTFOUND"


def test_a_policy_host_that_is_dead_is_left_alone_for_a_while(
    world: World, make: MakeMap, publish: Publish, clock: Clock
) -> None:
    domain = publish("host-dead", status=503)
    table = make()
    for _ in range(4):
        assert told(table, domain) == "NOTFOUND"
        clock.advance(70)
        eventually(lambda: not _refreshing(), 30)
    assert requests(world, domain) == 1
    clock.advance(300)
    world.hosts.sites[f"mta-sts.{domain}"].status = 200
    assert told(table, domain) == SECURE.format(domain)


def _ask(settings: dict[str, object], base: Path, key: str, pipe: object) -> None:
    table = registry.build({"m": settings}, base)["m"]
    table.open()
    pipe.send("ready")  # type: ignore[attr-defined]
    pipe.recv()  # type: ignore[attr-defined]
    pipe.send(table.lookup(key))  # type: ignore[attr-defined]


def _ask_in_processes(settings: dict[str, object], base: Path, key: str, number: int) -> list[Reply]:
    """Ask for *key* in so many processes at the same time."""
    fork = multiprocessing.get_context("fork")
    pairs = [fork.Pipe() for _ in range(number)]
    processes = [fork.Process(target=_ask, args=(settings, base, key, theirs), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    for ours, _ in pairs:
        assert ours.recv() == "ready"
    for ours, _ in pairs:
        ours.send("go")
    replies = [ours.recv() for ours, _ in pairs]
    for process in processes:
        process.join()
    return replies


def test_one_worker_at_a_time_looks_for_a_domain(world: World, tmp_path: Path, publish: Publish) -> None:
    answers = threading.Event()

    def speak(handler: BaseHTTPRequestHandler) -> None:
        """Answer when all have had the time to ask."""
        answers.wait(1)
        body = POLICY.format(domain=domain).encode()
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body))
        handler.wfile.write(body)

    domain = publish("wanted-by-many", speak=speak)
    tmp_path.chmod(0o700)
    replies = _ask_in_processes(world.settings(policy_cache="p.sqlite", timeout=30), tmp_path, domain, 12)
    assert set(replies) == {Reply.ok(SECURE.format(domain))}
    assert requests(world, domain) == 1


def test_one_worker_at_a_time_asks_a_dead_resolver(world: World, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with silent("127.0.0.53") as questions:
        settings = world.settings(policy_cache="p.sqlite", resolver=["127.0.0.53"], timeout=20, query_timeout=1)
        replies = _ask_in_processes(settings, tmp_path, f"good.{SIGNED}", 12)
        assert {reply.status for reply in replies} == {Status.TEMP}
        assert len(questions) == 2


def test_a_worker_that_dies_with_a_claim_keeps_others_waiting_for_a_while_only(make: MakeMap, clock: Clock) -> None:
    table = make(timeout=2)
    assert table._store.claim(f"good.{SIGNED}", 5)  # type: ignore[attr-defined]
    assert table.lookup(f"good.{SIGNED}") == Reply.temp_fail("map m: another worker is looking for the policy")
    clock.advance(6)
    assert told(table, f"good.{SIGNED}") == "dane-only"


def test_a_lookup_that_is_interrupted_keeps_nobody_waiting(make: MakeMap, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overdue(BaseException):
        pass

    def interrupted(*_: object) -> None:
        raise Overdue

    table = make(timeout=20)
    with monkeypatch.context() as patch:
        patch.setattr(domainpolicy.Look, "dane", interrupted)
        with pytest.raises(Overdue):
            table.lookup(f"good.{SIGNED}")
    assert told(table, f"good.{SIGNED}") == "dane-only"


# A store that fails.


def test_a_full_disk_defers_nothing(
    make: MakeMap, publish: Publish, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = publish("full-disk")
    try:
        with SmallDisk(tmp_path) as disk:
            table = make()
            assert told(table, f"good.{SIGNED}") == "dane-only"
            disk.fill()
            assert told(table, key) == SECURE.format(key)
            assert told(table, f"good.{SIGNED}") == "dane-only"
            assert "map m: the cache is not available: database or disk is full" in caplog.text
            disk.empty()
            assert told(table, key) == SECURE.format(key)
            memory = table.memory()
            assert memory
            assert memory.recall(key)
            table.close()
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_refresh_that_cannot_begin_is_in_nobody_s_way(
    make: MakeMap, publish: Publish, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    key = publish("no-thread")
    table = make()
    assert told(table, key) == SECURE.format(key)
    clock.advance(DAY)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert told(table, key) == SECURE.format(key)
    publish("no-thread", text=POLICY.replace("mx:", f"mx: also.{PLAIN}\nmx:"))
    eventually(lambda: "also" in told(table, key), within=30)


def test_a_store_that_another_process_writes_to_is_in_no_lookup_s_way(
    make: MakeMap, publish: Publish, tmp_path: Path, clock: Clock
) -> None:
    key = publish("locked")
    table = make()
    assert told(table, key) == SECURE.format(key)
    clock.advance(DAY)
    with contextlib.closing(sqlite3.connect(tmp_path / "policies.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answers = [told(table, key) for _ in range(3)]
        # The refresh waits, and has not been given up: so nobody has waited for it.
        assert [thread.name for thread in threading.enumerate()].count(f"refresh {key}") == 1
        other.execute("ROLLBACK")
    assert answers == 3 * [SECURE.format(key)]


# With other types.


def test_policies_of_one_s_own_come_first_in_a_chain(world: World, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    tables: dict[str, dict[str, object]] = {
        "own": {"type": "static", "entries": {f"good.{SIGNED}": "encrypt"}},
        "found": world.settings(policy_cache="p.sqlite"),
        "all": {"type": "chain", "maps": ["own", "found"]},
    }
    maps = registry.build(tables, tmp_path)
    for each in maps.values():
        each.open()
    assert told(maps["all"], f"good.{SIGNED}") == "encrypt"
    assert told(maps["all"], f"two-hosts.{SIGNED}") == "dane-only"
    for each in maps.values():
        each.close()


# Steps in the log.


def test_of_what_is_remembered_it_is_told_what_it_came_of(
    make: MakeMap, publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    key = publish("told-again")
    table = make()
    told(table, key)
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    told(table, key)
    assert f"map m: {key} is remembered since 0 s, for 60480" in caplog.text
    assert f"map m: {key}: MTA-STS: id 1, fetched 0 s ago, expires in 60480" in caplog.text
    assert "DNS: " not in caplog.text


def test_the_steps_to_an_answer_are_told_at_debug(make: MakeMap, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told(make(), f"record.{PLAIN}")
    for step in (
        f"DNS: record.{PLAIN} MX: 10 mx.record.{PLAIN}. (not signed",
        f"record.{PLAIN}: DANE: no host has TLSA records",
        f'DNS: _mta-sts.record.{PLAIN} TXT: "v=STSv1; id=1;" (not signed',
        f"record.{PLAIN}: MTA-STS: fetched: version: STSv1; mode: enforce; mx: *.mx.record.{PLAIN}; max_age: 604800",
    ):
        assert step in caplog.text


# Settings.


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"dane": False, "mta_sts": False}, "maps.m.mta_sts: cannot be false together with dane"),
        ({"timeout": 0}, "maps.m.timeout: 0 is not accepted here; expected a time above 0"),
        ({"query_timeout": 0}, "maps.m.query_timeout: 0 is not accepted here; expected a time above 0"),
        ({"cache_size": 0}, "maps.m.cache_size: 0 is not accepted"),
        (
            {"resolver": ["dns.example"]},
            "maps.m.resolver: ['dns.example'] is not accepted here; expected IP addresses",
        ),
        ({"resolver": "127.0.0.1"}, "maps.m.resolver: '127.0.0.1' is not accepted here; expected a list"),
        ({"trusted_resolver": ["1.2.3"]}, "maps.m.trusted_resolver: ['1.2.3'] is not accepted here; expected IP"),
        ({"tls_CAfile": "/nowhere"}, "maps.m.tls_CAfile: cannot be used: "),
        ({"redis": {"hosts": ["h"]}, "policy_cache": "x"}, "maps.m.policy_cache: cannot be together with redis"),
        ({"cache_ttl": 60}, "maps.m.cache_ttl: is not for tls-policy, which remembers by itself"),
        ({"redis": {"hosts": ["h"]}, "cache_size": 5}, "maps.m.cache_size: cannot be together with redis"),
        ({"redis": {"hosts": ["h"], "query": "GET %s"}}, "maps.m.redis.query: unknown key"),
        ({"redis": {}}, "maps.m.redis.hosts: is missing"),
        ({"redis": {"hosts": ["h"], "password": ""}}, "maps.m.redis.password: expected a string"),
    ],
)
def test_a_wrong_setting_is_refused(table: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingError) as raised:
        registry.build({"m": {"type": "tls-policy", **table}})
    assert str(raised.value).startswith(problem)


def test_resolvers_can_have_ports() -> None:
    table = registry.build({"m": {"type": "tls-policy", "resolver": ["127.0.0.1:5353", "[::1]:5353", "::1"]}})["m"]
    assert [str(each) for each in table.resolver] == ["127.0.0.1:5353", "::1:5353", "::1"]  # type: ignore[attr-defined]


def test_resolv_conf_is_followed(make: MakeMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefork_socketmap.maps import dnsclient

    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 127.0.0.1\n")
    monkeypatch.setattr(dnsclient, "_RESOLV_CONF", file)
    table = make(resolver=[], timeout=10, query_timeout=1)
    assert told(table, f"good.{SIGNED}") == "dane-only"
    with silent("127.0.0.53") as questions:
        (tmp_path / "new").write_text("nameserver 127.0.0.53\n")
        (tmp_path / "new").rename(file)
        assert told(table, f"two-hosts.{SIGNED}") == "TEMP"
    assert questions
    file.unlink()  # then there is one on this machine: resolv.conf(5)
    assert told(table, f"one-of-two.{SIGNED}") == "dane"


def test_a_directory_that_others_can_write_to_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    table = registry.build({"m": world.settings(policy_cache="open/c.sqlite")}, tmp_path)["m"]
    with pytest.raises(SettingError, match=r"maps\.m\.policy_cache: .* nobody else may write there"):
        table.open()


def test_no_time_is_given_to_a_query_beyond_that_of_the_lookup(make: MakeMap) -> None:
    with silent("127.0.0.53"):
        table = make(resolver=["127.0.0.53"], timeout=0.5, query_timeout=3600)
        begin = time.monotonic()
        assert told(table, f"good.{SIGNED}") == "TEMP"
        assert time.monotonic() - begin < 60
