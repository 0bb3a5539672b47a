"""Thousands of clients that do it wrong, by mistake or on purpose, keep nobody else waiting."""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from prefork_socketmap import Config
from prefork_socketmap.prefork.table import BUFFER_LIMIT
from prefork_socketmap.socketmap import netstring
from tests.crowd import MANY, Board, Crowd, GoodClient, echo
from tests.processes import kill
from tests.serving import DEADLINE, Client, Gate, Serve, Site, kept
from tests.waiting import eventually

REQUEST = netstring.encode(b"echo key")
REPLY = netstring.encode(b"OK key")
LARGE = "x" * 99_000

pytestmark = pytest.mark.usefixtures("room_for_many")


def large(key: str) -> str:
    return LARGE


def nap(key: str) -> str:
    time.sleep(0.002)
    return key


MAPS = {"echo": echo, "large": large}


@pytest.fixture
def site(serve: Serve, endpoint: str) -> Site:
    return serve(MAPS, None, endpoint)


@pytest.fixture
def crowd(site: Site) -> Iterator[Crowd]:
    with Crowd(site.endpoint) as made:
        yield made


# The beginning of a request.


def test_nobody_waits_beside_many_halves_of_requests(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    for _ in range(10):
        crowd.join(MANY // 10, b"5:ab")
        good.ask()
        good.ask_anew()
    good.ask_for(0.5)


def test_nobody_waits_beside_many_that_begin_the_next_request_again_and_again(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    crowd.join(MANY, REQUEST + REQUEST[:3])
    for _ in range(3):
        good.ask()
        good.ask_anew()
        crowd.say(REQUEST[3:] + REQUEST[:3])
    good.ask()
    for sock in crowd.sockets:
        sock.settimeout(DEADLINE)
        received = b""
        while len(received) < 4 * len(REPLY):
            received += sock.recv(1000)
        assert received == 4 * REPLY


def test_a_request_that_arrives_in_any_pieces_is_answered(site: Site, crowd: Crowd) -> None:
    """Each of many sends a request of its own, in pieces cut anywhere, between those of all others."""
    chance = random.Random(10)
    crowd.join(300)
    payloads = [b"echo " + b"%d" % index * chance.randint(1, 500) for index in range(300)]
    left = [netstring.encode(payload) for payload in payloads]
    while any(left):
        for index, sock in enumerate(crowd.sockets):
            size = chance.choice([1, 2, 3, 100, 1000])
            sock.send(left[index][:size])
            left[index] = left[index][size:]
    for payload, sock in zip(payloads, crowd.sockets, strict=True):
        sock.settimeout(DEADLINE)
        expected = netstring.encode(payload.replace(b"echo", b"OK"))
        received = b""
        while len(received) < len(expected):
            data = sock.recv(65536)
            assert data
            received += data
        assert received == expected


HALF = b"99000:" + b"y" * 98_000


def fill(site: Site, crowd: Crowd, good: GoodClient) -> int:
    """Let *crowd* send halves of requests until there is no more room; return how much memory that was at most."""
    sent = dict.fromkeys(crowd.sockets, 0)
    highest = 0
    board = Board(site.pid)
    deadline = time.monotonic() + DEADLINE
    while sent and not board.counter("connections", "overflowed") and time.monotonic() < deadline:
        for sock in list(sent):
            try:
                sent[sock] += sock.send(HALF[sent[sock] :])
            except BlockingIOError:
                continue
            except OSError:
                del sent[sock]  # there is no room for what it sends
                continue
            if sent[sock] == len(HALF):
                del sent[sock]
        highest = max(highest, kept(site.pid))
        good.ask()
    eventually(lambda: board.counter("connections", "overflowed") > 0, DEADLINE)
    return max(highest, kept(site.pid))


def test_the_memory_for_halves_of_requests_is_bounded_and_given_back(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    crowd.join(1000)
    highest = fill(site, crowd, good)
    # Each of the workers may add what it is about to write.
    assert BUFFER_LIMIT / 2 < highest <= BUFFER_LIMIT + 20 * 65536
    good.ask()
    crowd.close()
    eventually(lambda: kept(site.pid) == 0, DEADLINE)


def test_newcomers_that_begin_when_there_is_no_room_take_no_places_from_others(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    crowd.join(1000)
    fill(site, crowd, good)
    already = Board(site.pid).counter("connections", "overflowed")

    def many_are_turned_away() -> bool:
        crowd.join(1, HALF)
        good.ask()
        # More than all workers together have places for.
        return Board(site.pid).counter("connections", "overflowed") >= already + 100

    eventually(many_are_turned_away, DEADLINE)
    crowd.close()
    eventually(lambda: kept(site.pid) == 0, DEADLINE)
    newcomers = [GoodClient(site) for _ in range(100)]
    for each in newcomers * 2:
        each.ask()
    assert Board(site.pid).connections == len([good, *newcomers])


def test_of_newcomers_that_the_master_could_not_be_told_of_nothing_is_left(site: Site, crowd: Crowd) -> None:
    for _ in range(10):  # more often than a worker has places
        crowd.join(500, REQUEST)
        eventually(lambda: crowd.heard() == 500, DEADLINE, "answers to all")
        kill(site.pid, signal.SIGSTOP)
        try:
            crowd.close()  # more ends than it can be told of
            eventually(lambda: Board(site.pid).has_an_idle_worker(), DEADLINE)
            newcomer = site.connect()
            newcomer.send(b"8:echo")
        finally:
            kill(site.pid, signal.SIGCONT)
        with newcomer, contextlib.suppress(ConnectionError):  # if the master falls far behind, it is refused
            newcomer.send(b" key,")
            assert newcomer.reply() == b"OK key"
    eventually(lambda: Board(site.pid).connections == 0, DEADLINE, "a table without connections")
    eventually(lambda: kept(site.pid) == 0, DEADLINE)


def test_a_request_has_read_timeout_from_its_first_byte_on(serve: Serve, endpoint: str) -> None:
    """Its length, too, which is not known until its last digit has arrived."""
    site = serve(MAPS, Config(read_timeout=1, max_request_size=10**40), endpoint)
    client = site.connect()
    assert client.ask(b"echo before") == b"OK before"
    for _ in range(40):
        try:
            client.send(b"9")
        except OSError:
            break
        if select.select([client.sock], [], [], 0.25)[0]:
            break
    else:
        pytest.fail("a byte now and then keeps it going")
    assert Board(site.pid).counter("connections", "timed_out") == 1


# Replies that nobody reads.


def test_nobody_waits_beside_many_that_do_not_read(site: Site) -> None:
    good = GoodClient(site)
    with Crowd(site.endpoint) as crowd:
        for _ in range(10):
            crowd.join(MANY // 10, netstring.encode(b"large key") * 3, receive_buffer=2048)
            good.ask()
            good.ask_anew()
        good.ask_for(0.5)
        assert kept(site.pid) <= BUFFER_LIMIT + 20 * 100_000
    good.ask()
    eventually(lambda: kept(site.pid) == 0, DEADLINE)


def test_a_client_that_reads_slowly_gets_every_byte_in_order(site: Site) -> None:
    client = site.connect(receive_buffer=2048)
    expected = b""
    for index in range(20):
        client.request(b"large key")
        client.request(b"echo %d" % index)
        expected += netstring.encode(b"OK " + LARGE.encode()) + netstring.encode(b"OK %d" % index)
    received = bytearray()
    while len(received) < len(expected):
        data = client.sock.recv(7000)
        assert data
        received += data
    assert received == expected


def test_a_client_that_does_not_read_has_write_timeout(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(write_timeout=0.5), endpoint)
    client = site.connect(receive_buffer=2048)
    for _ in range(50):  # more than the kernel keeps for a connection
        client.request(b"large key")
    eventually(lambda: Board(site.pid).counter("connections", "timed_out") == 1, DEADLINE)
    GoodClient(site).ask()


def test_a_client_that_does_not_read_has_write_timeout_between_turns_too(serve: Serve, endpoint: str) -> None:
    """A turn may end when the last reply has just found room; then nobody has been refused a byte yet."""
    site = serve({"some": lambda key: "x" * int(key)}, Config(write_timeout=0.5), endpoint)
    clients = [site.connect(receive_buffer=2048) for _ in range(40)]
    for number, client in enumerate(clients):
        client.send(netstring.encode(b"some %d" % (19_000 + 2000 * number)) * 500)
    eventually(lambda: Board(site.pid).counter("connections", "timed_out") == len(clients), DEADLINE)


# Clients that have done their part in time, and wait for a worker.


def test_a_request_that_is_complete_in_time_is_answered_however_late(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({**MAPS, "slow": gate.lookup}, Config(process_limit=1, read_timeout=0.5), endpoint)
    client, slow = site.connect(), site.connect()
    client.send(REQUEST[:5])
    eventually(lambda: kept(site.pid) > 0, DEADLINE)
    slow.request(b"slow key")
    gate.await_arrival()
    client.send(REQUEST[5:])
    time.sleep(2)  # longer than the timeout, and than the master may take to notice that it is over
    gate.open()
    assert client.reply() == b"OK key"
    assert Board(site.pid).counter("connections", "timed_out") == 0


def test_a_client_that_waits_for_its_turn_is_answered_however_late(serve: Serve, endpoint: str, gate: Gate) -> None:
    site = serve({**MAPS, "slow": gate.lookup}, Config(process_limit=1, write_timeout=0.5), endpoint)
    client, slow = site.connect(), site.connect()
    client.send(netstring.encode(b"slow key") + REQUEST * 20)
    gate.await_arrival()
    slow.request(b"slow key")
    time.sleep(0.05)  # more than a turn
    gate.open()
    gate.await_arrival()  # after the first turn of the one, at the first of the other
    time.sleep(2)
    gate.open()
    assert [client.reply() for _ in range(21)] == [b"OK done"] + [b"OK key"] * 20
    assert Board(site.pid).counter("connections", "timed_out") == 0


# Rubbish.


@pytest.mark.parametrize("rate", [120, 300])
def test_nobody_waits_beside_hundreds_a_second_that_send_rubbish_and_stay(
    site: Site, crowd: Crowd, rate: int
) -> None:
    good = GoodClient(site)
    for _ in range(20):
        crowd.join(rate // 10, b"x\n")
        good.ask()
        good.ask_anew()
        good.ask_for(0.1)
    eventually(lambda: crowd.heard() == len(crowd.sockets), DEADLINE, "the refusals")


def test_nobody_waits_beside_many_that_go_on_after_the_refusal(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    crowd.join(MANY, b"x\n")
    for _ in range(10):
        crowd.say(b"z" * 2000)
        good.ask()
        good.ask_anew()
    eventually(lambda: Board(site.pid).connections == 1, DEADLINE, "the end of all but one")


# The rest of the list.


def test_halves_of_requests_keep_no_worker_of_a_former_generation(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    crowd.join(20, b"5:ab")
    good.ask()
    for generation in range(2, 5):
        kill(site.pid, signal.SIGHUP)

        def only_the_new(generation: int = generation) -> bool:
            good.ask()
            states = Board(site.pid)
            return states.generations() == {generation}

        eventually(only_the_new, DEADLINE)
    good.ask_anew()
    crowd.say(b"c d,")
    eventually(lambda: crowd.heard() == 20, DEADLINE, "answers over connections that have met four generations")


def test_nobody_waits_while_the_master_is_stopped(site: Site, crowd: Crowd) -> None:
    good = GoodClient(site)
    crowd.join(MANY)
    for _ in range(3):  # until whoever is on duty has met them
        crowd.say(REQUEST)
        eventually(lambda: crowd.heard() == MANY, DEADLINE, "answers to all")
        for sock in crowd.sockets:
            assert sock.recv(1000) == REPLY
        good.ask()
    kill(site.pid, signal.SIGSTOP)
    try:
        good.ask_for(1.0)
        crowd.say(REQUEST)
        good.ask_for(1.0)
        eventually(lambda: crowd.heard() == MANY, DEADLINE, "answers to all without a master")
    finally:
        kill(site.pid, signal.SIGCONT)
    good.ask()
    good.ask_anew()


def test_newcomers_are_answered_while_the_master_is_stopped_and_harm_nobody(site: Site) -> None:
    good = GoodClient(site)
    for _ in range(20):
        good.ask()
    kill(site.pid, signal.SIGSTOP)
    try:
        newcomers = []
        for _ in range(3):  # there are five workers
            newcomers.append(GoodClient(site))
            for each in (good, *newcomers):
                each.ask()
        for each in (good, *newcomers):
            each.ask_for(0.1)
    finally:
        kill(site.pid, signal.SIGCONT)
    for each in (good, *newcomers):
        each.ask()


def test_without_a_master_who_was_born_with_a_client_answers_it(serve: Serve, endpoint: str) -> None:
    site = serve(MAPS, Config(process_limit=2, min_spare=2), endpoint)
    victim, _ = site.await_workers(2)
    clients = [GoodClient(site) for _ in range(40)]
    for each in clients:
        each.ask()
    site.await_idle()
    kill(victim)
    site.await_count("workers", "died", 1)
    site.await_workers(2)  # one has met only those that it has answered, the other one none
    kill(site.pid, signal.SIGSTOP)
    try:
        for each in clients:
            each.ask()
    finally:
        kill(site.pid, signal.SIGCONT)


def test_clients_that_nobody_on_duty_knows_are_answered_when_the_master_goes_on(site: Site, crowd: Crowd) -> None:
    crowd.join(MANY, REQUEST)
    eventually(lambda: crowd.heard() == MANY, DEADLINE, "answers to all")
    for sock in crowd.sockets:
        assert sock.recv(1000) == REPLY
    kill(site.pid, signal.SIGSTOP)
    try:
        crowd.say(REQUEST)
        eventually(lambda: crowd.heard() >= MANY / 10, DEADLINE, "answers by those that know the clients")
    finally:
        kill(site.pid, signal.SIGCONT)
    eventually(lambda: crowd.heard() == MANY, DEADLINE, "answers to all")
    crowd.say(REQUEST)
    GoodClient(site).ask()


# Requests in a row.


def test_a_backlog_longer_than_a_turn_is_answered_in_order_and_nobody_waits_for_its_end(site: Site) -> None:
    number = 20_000
    hog = Client(site.endpoint)
    requests = b"".join(netstring.encode(b"echo %d" % index) for index in range(number))
    sender = threading.Thread(target=hog.send, args=(requests,))
    sender.start()
    good = GoodClient(site)
    for index in range(number):
        assert hog.reply() == b"OK %d" % index
        if index % 1000 == 0:
            good.ask()
            good.ask_anew()
    sender.join()
    hog.close()


def test_a_backlog_is_answered_in_turns(serve: Serve, endpoint: str) -> None:
    """With one worker, a client that comes later does not wait for all that another has sent before."""
    site = serve(MAPS | {"nap": nap}, Config(process_limit=1, min_spare=1), endpoint)
    hog = site.connect()
    hog.send(b"".join(netstring.encode(b"nap %d" % index) for index in range(1000)))
    assert hog.reply() == b"OK 0"
    GoodClient(site).ask()
    # Not all of the 1000 naps, two seconds, have been before.
    answered = 1
    hog.sock.setblocking(False)
    received = hog.sock.recv(1 << 20)
    answered += received.count(b"OK")
    assert answered < 900
    hog.sock.settimeout(DEADLINE)
    while answered < 1000:
        answered += hog.sock.recv(1 << 20).count(b"OK")


def test_a_request_with_the_end_of_what_the_client_sends_is_answered(site: Site, crowd: Crowd) -> None:
    """Half closed, right after the request, over new and over known connections, with and without a backlog."""
    for times in (1, 100):
        crowd.close()
        crowd.join(100)
        for sock in crowd.sockets[:50]:
            sock.send(REQUEST)
        for sock in crowd.sockets[:50]:
            sock.settimeout(DEADLINE)
            assert sock.recv(1000) == REPLY
        for sock in crowd.sockets:
            sock.send(REQUEST * times)
            sock.shutdown(socket.SHUT_WR)
        for sock in crowd.sockets:
            sock.settimeout(DEADLINE)
            received = b""
            while len(received) < times * len(REPLY):
                data = sock.recv(65536)
                assert data, f"{len(received)} bytes of {times * len(REPLY)}"
                received += data
            assert received == REPLY * times


# Whose answer it is.


def test_thousands_that_come_and_go_get_their_own_answers(site: Site) -> None:
    chance = random.Random(2000)
    asked = 0
    clients: list[Client] = []
    for _ in range(60):
        while len(clients) < 100:
            clients.append(Client(site.endpoint))
        keys: dict[Client, list[bytes]] = {}
        for client in chance.sample(clients, 70):
            keys[client] = []
            for _ in range(chance.choice([1, 1, 1, 3])):
                asked += 1
                keys[client].append(b"%d" % asked)
                client.request(b"echo %d" % asked)
        silent = chance.sample(list(keys), 10)
        for client in silent:
            client.close()  # its answer is on the way, and its number is used again
            del keys[client]
            clients.remove(client)
        for client, own in keys.items():
            assert [client.reply() for _ in own] == [b"OK " + key for key in own]
        for client in chance.sample(clients, 30):
            client.close()
            clients.remove(client)
    for client in clients:
        client.close()


def test_connections_that_end_while_the_master_hears_nothing_end_for_all(site: Site, crowd: Crowd) -> None:
    crowd.join(MANY, REQUEST)
    eventually(lambda: crowd.heard() == MANY, DEADLINE, "answers to all")
    kill(site.pid, signal.SIGSTOP)
    try:
        crowd.close()
        eventually(lambda: Board(site.pid).has_an_idle_worker(), DEADLINE)
    finally:
        kill(site.pid, signal.SIGCONT)
    eventually(lambda: Board(site.pid).connections == 0, DEADLINE, "a table without connections")
