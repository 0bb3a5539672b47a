"""The bench runs, and its figures are of what happened. How fast anything is, no test says: machines differ."""

from __future__ import annotations

import itertools
import re
import socket
import sys
import threading
from array import array

import pytest

from tests.bench import __main__ as bench
from tests.bench import cache, imports
from tests.bench.load import Load, Loader, Outcome
from tests.bench.report import Figures, render
from tests.bench.scenarios import SCENARIOS
from tests.integration.servers.process import free_port


def test_the_bench_prints_a_line_per_server_and_a_ratio_for_each_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["busy", "--connections", "2", "--seconds", "0.2", "--rounds", "1"])
    report = capsys.readouterr().out.splitlines()
    names = [contender.name for contender in SCENARIOS["busy"].contenders]
    lines = {name: line.split() for name in names for line in report if line.startswith(f"{name}  ")}
    assert list(lines) == names
    for line in lines.values():
        lookups_per_second, failures, hangups = line[1], line[-2], line[-1]
        assert (int(lookups_per_second) > 0, failures, hangups) == (True, "0", "0")
    assert [line.split("  ")[0] for line in report if " / " in line] == [f"{names[0]} / {name}" for name in names[1:]]


def test_the_bench_of_caches_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["cache", "--seconds", "0.05", "--rounds", "1"])
    lines = {line[:28].strip(): line.split()[-2:] for line in capsys.readouterr().out.splitlines()[-4:]}
    assert list(lines) == list(cache.CONTENDERS)
    assert all(float(number) > 0 for numbers in lines.values() for number in numbers)


def test_the_bench_of_imports_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["import", "-r", "1"])
    lines = capsys.readouterr().out.splitlines()
    for name in imports.PROGRAMS:
        assert re.fullmatch(rf"{name} +-?\d+\.\d +\d\.\d", next(line for line in lines if line.startswith(name)))


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="the others' memory is their collector's business")
def test_an_import_takes_no_more_memory_than_it_did() -> None:
    assert imports.memory(imports.PROGRAMS["a server"]) < 7 << 20


RIGHT = b"12:OK mailbox0/,"


def outcome_of(answer: bytes, load: Load, seconds: float = 0.2, hangups: int = 0) -> Outcome:
    """Load a server that answers whatever arrives with *answer*, after it has hung up on so many clients."""

    def serve(listener: socket.socket) -> None:
        for number in itertools.count():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                while client.recv(4096) and number >= hangups:
                    client.send(answer)

    with socket.create_server(("127.0.0.1", free_port())) as listener:
        server = threading.Thread(target=serve, args=[listener], daemon=True)
        server.start()
        loader = Loader(listener.getsockname()[1], load, range(load.connections))
        outcome = loader.run(seconds)
        loader.close()
        listener.shutdown(socket.SHUT_RDWR)
        server.join()
    return outcome


def test_an_answer_that_is_not_the_expected_one_is_counted() -> None:
    outcome = outcome_of(b"9:NOTFOUND ,", Load(1))
    assert outcome.wrong == len(outcome.latencies) > 0


def test_the_right_answer_is_not_counted_as_wrong() -> None:
    outcome = outcome_of(RIGHT, Load(1))
    assert len(outcome.latencies) > 0
    assert (outcome.wrong, outcome.late, outcome.hangups) == (0, 0, 0)
    assert outcome.per_connection == [len(outcome.latencies)]


def test_a_hangup_is_counted_and_the_question_repeated() -> None:
    outcome = outcome_of(RIGHT, Load(1), hangups=3)
    assert outcome.hangups == 3
    assert (outcome.wrong, outcome.late) == (0, 0)
    assert len(outcome.latencies) > 0


def test_clients_that_ask_now_and_then_keep_their_pace() -> None:
    outcome = outcome_of(RIGHT, Load(1, interval=0.05), seconds=0.22)
    assert len(outcome.latencies) + outcome.late == 5


def test_the_figures_are_of_what_the_clients_saw() -> None:
    outcome = Outcome(
        array("Q", range(1000, 1_001_000, 1000)), [250, 500, 250], wrong=1, late=2, hangups=3, elapsed=2
    )
    figures = Figures.of(outcome, cpu=0.01, pss=3 * 2**20)
    assert figures == Figures(
        lookups_per_second=500,
        p50=501,
        p99=991,
        p99_9=1000,
        cpu_per_lookup=10,
        pss=3,
        fairness=1,
        failures=3,
        hangups=3,
    )


def test_the_ratios_are_medians_of_the_rounds_and_not_ratios_of_medians() -> None:
    def round_of(cpu: float) -> Figures:
        return Figures(1, 1, 1, 1, cpu, 1, 1, 0, 0)

    ours, theirs = [round_of(1), round_of(2), round_of(30)], [round_of(10), round_of(4), round_of(20)]
    assert " 0.50 x" in render("load", {"ours": ours, "theirs": theirs}).splitlines()[-1]
