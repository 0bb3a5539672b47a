"""What is compared with what, under which load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.load import Load
from tests.bench.measure import ServerProcess
from tests.integration.servers.process import free_port

_SERVERS = "tests.bench.servers"


@dataclass(frozen=True)
class Contender:
    """A server program with its arguments, under the name that the report gives it.

    *company* is a load that it has besides, from clients whose answers are not in the figures.
    """

    name: str
    module: str
    arguments: Sequence[str] = ()
    company: Load | None = None

    def start(self) -> ServerProcess:
        """Return its process, which the caller starts."""
        port = free_port()
        return ServerProcess(f"{_SERVERS}.{self.module}", [str(port), *self.arguments], port)


@dataclass(frozen=True)
class Scenario:
    """Contenders that take turns under each load. The others are set in relation to the first."""

    about: str
    contenders: Sequence[Contender]
    loads: Sequence[Load]


def prefork(name: str, config: Mapping[str, object], company: Load | None = None) -> Contender:
    """Return this server with the given Config."""
    return Contender(name, "prefork", [json.dumps(config)], company)


_THREADED = Contender("socketserver", "threaded")
_ASYNCIO = Contender("asyncio", "asynchronous")

SCENARIOS = {
    "busy": Scenario(
        "a few busy connections",
        [prefork("prefork-socketmap", {"process_limit": 40}), _THREADED, _ASYNCIO],
        [Load(1), Load(8), Load(32)],
    ),
    "crowded": Scenario(
        "many more busy connections than workers",
        [prefork("prefork-socketmap", {"process_limit": 16}), _THREADED, _ASYNCIO],
        [Load(16), Load(200)],
    ),
    "patient": Scenario(
        "thousands of clients that ask now and then",
        [prefork("prefork-socketmap", {"process_limit": 16}), _THREADED, _ASYNCIO],
        [Load(500, interval=0.5), Load(2000, interval=1.0)],
    ),
    "held up": Scenario(
        "quick lookups beside slow ones, which hold workers; their CPU time is in the figures, too",
        [
            prefork("alone", {}),
            prefork("beside 20 of 5 ms", {}, Load(20, name="slow")),
            prefork("beside 10 of 200 ms", {}, Load(10, name="sleepy")),
        ],
        [Load(8)],
    ),
}
