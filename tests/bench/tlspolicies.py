"""The type ``tls-policy`` beside postfix-mta-sts-resolver: the same domains, whose MTA-STS policies both remember.

The peer comes from the Python registry, into an environment of its own. Both ask a real resolver and real policy
hosts, in a network of their own, but only once: what is measured are answers that are remembered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.bench.load import Load, socketmap_question
from tests.bench.maps import daemon
from tests.bench.measure import ServerProcess
from tests.bench.report import Figures, render
from tests.bench.servers.table import MAP
from tests.integration.servers.dnsservers import RESOLVER, dns_servers
from tests.integration.servers.namespace import private_network
from tests.integration.servers.policyhosts import ADDRESS, PolicyHosts
from tests.integration.servers.process import free_port

PEER = "postfix-mta-sts-resolver"
_ZONE = "plain.test"
_DOMAINS = 32

Measure = Callable[[ServerProcess, Load], Figures]


def run(measure: Measure, loads: Sequence[Load], rounds: int) -> Iterator[str]:
    """Measure both in alternating rounds; yield a report for each load."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="socketmap-bench-")))
        directory.chmod(0o700)
        program = _install(directory / "peer")
        stack.enter_context(private_network())
        hosts = stack.enter_context(PolicyHosts())
        names = [f"d{number}" for number in range(_DOMAINS)]
        for name in names:
            hosts.add(f"{name}.{_ZONE}")
        hosts.certify_all()
        stack.enter_context(dns_servers({_ZONE: [line for name in names for line in _lines(name)]}, signed=[]))
        settings = {"type": "tls-policy", "resolver": [RESOLVER], "tls_CAfile": str(hosts.authority.file)}
        port = free_port()
        arguments = [str(port), str(program), RESOLVER, str(hosts.authority.file)]
        servers = {
            "prefork-socketmap": daemon(directory, {**settings, "policy_cache": "policies.sqlite"}),
            PEER: ServerProcess("tests.bench.servers.mtastsresolver", arguments, port),
        }
        for server in servers.values():
            stack.enter_context(server)
        for load in loads:
            yield render(str(load), _alternate(measure, servers, _asking(load, names), rounds))


def _alternate(
    measure: Measure, servers: dict[str, ServerProcess], load: Load, rounds: int
) -> dict[str, list[Figures]]:
    figures: dict[str, list[Figures]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, server in servers.items():
            found = measure(server, load)
            if number:  # the first round warms up
                figures[name].append(found)
    return figures


def _asking(load: Load, names: Sequence[str]) -> Load:
    """Return *load*, with questions whose answers are those of both."""
    domains = [f"{name}.{_ZONE}" for name in names]
    answer = "secure match=.mx.{} servername=hostname"
    questions = [socketmap_question(MAP, domain, answer.format(domain)) for domain in domains]
    return dataclasses.replace(load, questions=questions)


def _lines(name: str) -> list[str]:
    return [
        f"{name} MX 10 mx.{name}",
        f"mx.{name} A 127.0.0.10",
        f'_mta-sts.{name} TXT "v=STSv1; id=1;"',
        f"mta-sts.{name} A {ADDRESS}",
    ]


def _install(directory: Path) -> Path:
    """Install the peer; return its program."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([directory / "bin/pip", "install", "-q", PEER], check=True)
    return directory / "bin/mta-sts-daemon"
