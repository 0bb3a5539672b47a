"""Private Redis servers: one alone, a primary and a replica watched by Sentinel, and a cluster of three."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.servers.process import Certificate, Server, free_port, library, program, running
from tests.waiting import eventually

PASSWORD = "a pass word"
SERVICE = "mail"


class Redis(Server):
    """One Redis: on a port, on a port with TLS and on a Unix socket; *options* as on the command line."""

    user = "redis"

    def __init__(self, *options: str) -> None:
        super().__init__()
        self._redis = library("redis", "redis")
        self.tls = Certificate(self.directory, self.user)
        self.tls_port = free_port()
        self.socket = self.directory / "socket"
        self._options = options

    def command(self) -> list[str]:
        listeners = f"--bind 127.0.0.1 --port {self.port} --tls-port {self.tls_port} --unixsocket {self.socket}"
        tls = f"--tls-cert-file {self.tls.certificate} --tls-key-file {self.tls.key} --tls-auth-clients no"
        storage = f"--dir {self.directory}"
        words = " ".join([listeners, tls, storage]).split()
        # Saved, that is, when it is stopped: what a test has put in is still there after a restart.
        return [program("redis-server", "redis-server"), *words, "--save", "3600 1", *self._options]

    def is_ready(self) -> bool:
        with contextlib.suppress(self._redis.ConnectionError):
            return bool(self.client().ping())
        return False

    def client(self) -> Any:
        """Return a client that may do everything."""
        password = PASSWORD if "--requirepass" in self._options else None
        return self._redis.Redis(port=self.port, password=password, decode_responses=True)

    def terminate_clients(self) -> None:
        """Disconnect every client, as an administrator may."""
        self.client().client_kill_filter(_type="normal", skipme=True)


class Sentinel(Server):
    """A Sentinel alone, whose word is enough to promote the replica of *primary*."""

    user = "redis"

    def __init__(self, primary: Redis) -> None:
        super().__init__()
        self._redis = library("redis", "redis")
        self._configuration = self.directory / "sentinel.conf"
        self._configuration.write_text(
            f"bind 127.0.0.1\nport {self.port}\ndir {self.directory}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 500\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        self.give_away(self._configuration)

    def command(self) -> list[str]:
        return [program("redis-sentinel", "redis-sentinel"), str(self._configuration)]

    def is_ready(self) -> bool:
        with contextlib.suppress(self._redis.ConnectionError):
            return bool(self.client().ping())
        return False

    def client(self) -> Any:
        """Return a client of the Sentinel itself."""
        return self._redis.Redis(port=self.port, decode_responses=True)

    def knows_the_replica(self) -> bool:
        """Whether there is somebody to promote."""
        state = self.client().sentinel_master(SERVICE)
        return isinstance(state, dict) and state["num-slaves"] > 0


class Watched:
    """A primary, its replica, and the Sentinel that watches them."""

    def __init__(self) -> None:
        self.primary = Redis()
        self.replica = Redis("--replicaof", "127.0.0.1", str(self.primary.port))
        self.sentinel = Sentinel(self.primary)

    def start(self) -> None:
        """Start all three, and wait until a failover could be had."""
        self.primary.start()
        self.replica.start()
        self.sentinel.start()
        eventually(self.sentinel.knows_the_replica, within=60)

    def close(self) -> None:
        """Stop them."""
        for server in (self.sentinel, self.replica, self.primary):
            server.close()


class Cluster:
    """Three primaries that share the keys."""

    def __init__(self) -> None:
        # Not "full coverage": with it, all nodes refuse to answer when one has been lost for long.
        options = "--cluster-enabled yes --cluster-node-timeout 2000 --cluster-require-full-coverage no"
        self.nodes = [Redis(*options.split(), "--cluster-port", str(free_port())) for _ in range(3)]

    def start(self) -> None:
        """Start the nodes and make a cluster of them."""
        for node in self.nodes:
            node.start()
        addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
        subprocess.run(
            [program("redis-cli", "redis-tools"), "--cluster", "create", *addresses, "--cluster-yes"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        eventually(self._is_complete, within=60)

    def client(self) -> Any:
        """Return a client of the whole cluster."""
        return library("redis", "redis").RedisCluster(
            host="127.0.0.1", port=self.nodes[0].port, decode_responses=True
        )

    def close(self) -> None:
        """Stop the nodes."""
        for node in self.nodes:
            node.close()

    def _is_complete(self) -> bool:
        return all("cluster_state:ok" in self._state(node) for node in self.nodes)

    def _state(self, node: Redis) -> str:
        return subprocess.run(
            [program("redis-cli", "redis-tools"), "-p", str(node.port), "cluster", "info"],
            check=True, capture_output=True, text=True, timeout=60,
        ).stdout  # fmt: skip


@pytest.fixture(scope="session")
def _redis() -> Iterator[Redis]:
    with running(Redis("--requirepass", PASSWORD)) as server:
        yield server


@pytest.fixture
def redis_server(_redis: Redis) -> Iterator[Redis]:
    """An empty Redis that runs and wants a password."""
    _redis.client().flushall()
    yield _redis
    _redis.restore()


@pytest.fixture
def redis_sentinel() -> Iterator[Watched]:
    """An empty primary and its replica under a Sentinel; new for each test, since a failover leaves its mark."""
    with running(Watched()) as watched:
        yield watched


@pytest.fixture(scope="session")
def _redis_cluster() -> Iterator[Cluster]:
    with running(Cluster()) as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(_redis_cluster: Cluster) -> Iterator[Cluster]:
    """An empty cluster that runs."""
    for node in _redis_cluster.nodes:
        node.client().flushall()
    yield _redis_cluster
    for node in _redis_cluster.nodes:
        node.restore()
