"""The type ``srs`` beside PostSRSd, of whichever version is installed: the same secret, the same senders."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefork_socketmap.maps.srsaddress import Scheme, join
from tests.bench.load import Load, socketmap_question
from tests.bench.maps import daemon
from tests.bench.measure import ServerProcess
from tests.bench.report import Figures, render
from tests.bench.servers.postsrsd import DOMAIN, SECRET
from tests.bench.servers.table import MAP
from tests.integration.servers.postsrsd import PostSrsd
from tests.integration.servers.process import free_port

Measure = Callable[[ServerProcess, Load], Figures]


def run(measure: Measure, load: Load, rounds: int) -> str:
    """Measure both in alternating rounds; return the report."""
    peer = PostSrsd(DOMAIN, [SECRET])
    peer.close()
    senders = list(itertools.islice(_senders(), 1000))
    ours = [socketmap_question(MAP, sender, rewritten) for sender, rewritten in senders]
    if peer.speaks_socketmap:
        theirs = [socketmap_question("forward", sender, rewritten) for sender, rewritten in senders]
    else:
        theirs = [(f"get {sender}\n".encode(), f"200 {rewritten}\n".encode()) for sender, rewritten in senders]
    name = f"PostSRSd {'.'.join(map(str, peer.version))}"
    port = free_port()
    with contextlib.ExitStack() as stack:

        def prefork(**settings: object) -> ServerProcess:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="socketmap-bench-")))
            (directory / "secret").write_text(f"{SECRET}\n")
            (directory / "secret").chmod(0o600)
            table = {"type": "srs", "direction": "forward", "domain": DOMAIN, "secret_file": "secret", **settings}
            return daemon(directory, table)

        contenders = {
            "cached": (prefork(cache_ttl="1h"), ours),
            "not cached": (prefork(), ours),
            name: (ServerProcess("tests.bench.servers.postsrsd", [str(port)], port), theirs),
        }
        figures: dict[str, list[Figures]] = {each: [] for each in contenders}
        servers = {each: stack.enter_context(server) for each, (server, _) in contenders.items()}
        for number in range(rounds + 1):
            for each, (_, questions) in contenders.items():
                found = measure(servers[each], dataclasses.replace(load, questions=questions))
                if number:  # the first round warms up
                    figures[each].append(found)
    return render(str(load), figures)


def _senders() -> Iterator[tuple[str, str]]:
    """Iterate without end over senders and what both make of them today: hashes with neither of the letters in which
    the alphabets differ."""
    today = int(time.time()) // 86400
    for number in itertools.count():
        local, domain = f"user{number}", "sender.example"
        rewritten = Scheme().rewrite(local, domain, SECRET.encode(), today)
        if not {"+", "/"} & set(rewritten):
            yield join(local, domain), join(rewritten, DOMAIN)
