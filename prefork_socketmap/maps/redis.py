"""The type ``redis``: Redis or Valkey; one server, a primary that Sentinel knows, or a cluster.

The driver is redis-py. Retries and pauses are those of all network maps, so the driver's own are off. Its
client of clusters is not used either, since to it the loss of one node is that of all: a cluster is asked node by
node, each with a health of its own (Redis cluster specification, "Client and server responsibilities").
"""

# Parts of redis-py have no type hints.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError
from redis.retry import Retry
from redis.sentinel import Sentinel

from prefork_socketmap import settings
from prefork_socketmap.maps.backend import LONGEST_PAUSE, Link
from prefork_socketmap.maps.base import LookupFailedError, log
from prefork_socketmap.maps.host import Host, hosts, network_host
from prefork_socketmap.maps.network import NetworkMap, Trouble, UnreachableError
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.maps.tls import TlsSettings
from prefork_socketmap.socketmap.messages import Reply, to_text

_PORT = 6379
_SENTINEL_PORT = 26379
# The commands that can be asked with, and how many arguments each has.
_COMMANDS = {"GET": 1, "HGET": 2, "SISMEMBER": 2}
_WRITING_COMMANDS = {"SET": 4}
_SERVICE = re.compile(r"[A-Za-z0-9._-]+")
_REDIRECTIONS = {"ASK": AskError, "MOVED": MovedError}
_HAS_PROTOCOLS = redis.VERSION >= (5,)  # Debian 12 has 4.3
_LOST = (redis.ConnectionError, OSError)
_MOST_REDIRECTIONS = 3
# What stands in the place of a key when a node is asked for the cluster's topology.
_TOPOLOGY = "(the nodes of the cluster)"


class Command(Template):
    """A command whose arguments are templates: ``HGET aliases %s``.

    The words are told apart before any key is put in, so a key, whatever is in it, is never more than one argument.
    """

    def __init__(self, text: str, known: Mapping[str, int] = _COMMANDS) -> None:
        """*known*: the commands that are accepted, and how many arguments each has."""
        super().__init__(text)
        word, *arguments = text.split() or [""]
        self.word = word.upper()
        if len(arguments) != known.get(self.word):
            accepted = '"GET key", "HGET key field" or "SISMEMBER key member"'
            raise ValueError(f"{settings.shown(text)} is no query; expected {accepted}")
        if not self.letters:
            raise ValueError(f"{settings.shown(text)} has no part of the lookup key, such as %s")
        self._arguments = [Template(argument) for argument in arguments]

    def arguments(self, key: Address) -> list[str]:
        """Return the arguments for *key*, which has the parts that the templates need."""
        return [argument.expand(key) for argument in self._arguments]


def _command(key: str, value: object) -> Command:
    text = settings.text(key, value)
    try:
        return Command(text)
    except ValueError as error:
        raise settings.SettingError(key, str(error)) from error


def _writing_command(_key: str, value: object) -> Command:
    return Command(str(value), _WRITING_COMMANDS)


def _service(key: str, value: object) -> str:
    """Read a name in the alphabet of Sentinel's."""
    if isinstance(value, str) and _SERVICE.fullmatch(value):
        return value
    raise settings.wrong(key, value, "a name of letters, digits and . - _")


class ElsewhereError(LookupFailedError):
    """Another node of the cluster has the key, or (*is_asked*) is about to get it."""

    def __init__(self, error: AskError, node: str) -> None:
        super().__init__(Reply.temp_fail("the nodes of the cluster do not agree on who has the key"))
        self.node = node
        self.is_asked = not isinstance(error, MovedError)  # which is an AskError, too


class RedisMap(TlsSettings, NetworkMap[redis.Redis]):
    """Answers with the string, or the hash's field, at the key; or with the member, if the set has it."""

    hosts = setting(hosts)
    """Hosts and Unix sockets (default port: 6379); with ``sentinel`` the Sentinels (26379), with ``cluster`` any of
    the cluster's nodes."""
    sentinel = setting(_service, "")
    """The name under which the Sentinels watch the primary that is asked."""
    cluster = setting(settings.boolean, False)
    """Whether the hosts are nodes of a cluster."""
    dbname = setting(settings.count, 0)
    """The number of the database. A cluster has but one."""
    user = setting(settings.text, "")
    """The user of an access control list; by default there is none, just a password."""
    password = setting(secret, "")
    password_file = setting(secret, "")
    password_env = setting(secret, "")
    query = setting(_command)
    """``GET key``, ``HGET key field`` or ``SISMEMBER key member``, with parts of the lookup key in the arguments."""

    errors = (redis.RedisError, OSError)
    account = ("sentinel", "cluster", "user", "password", "password_file", "password_env")
    of_the_query = ("query",)

    def __init__(self, name: str, table: Mapping[str, object], base: Path) -> None:
        super().__init__(name, table, base)
        if self.sentinel and self.cluster:
            raise settings.SettingError(f"maps.{name}.sentinel", "cannot be together with cluster")
        if self.cluster and self.dbname:
            raise settings.SettingError(f"maps.{name}.dbname", "a cluster has one database, 0")
        if self.sentinel or self.cluster:
            for host in self.hosts:
                network_host(f"maps.{name}.hosts", host)
        self._password = Secret(self, "password")
        if self.uses_tls:
            self.tls_context()  # for its errors: redis-py opens the files at the first connection
        # Of a cluster: the first slots of ranges, in order, and the node that has each.
        self._slots: list[int] = []
        self._nodes: list[str] = []
        self._node_links: dict[str, Link[redis.Redis]] = {}
        self._learned = float("-inf")
        self._is_asking = False

    def dial(self, host: str, timeout: float) -> redis.Redis:
        """Connect to *host*, or to what it knows, and log in.

        *timeout* is also that of each query: to Redis they are all alike, and as short.
        """
        address = Host.parse(host, _SENTINEL_PORT if self.sentinel else _PORT)
        options = self._options(timeout)
        if self.sentinel:
            sentinel = Sentinel([(address.name, address.port)], sentinel_kwargs=options)
            address = Host(*sentinel.discover_master(self.sentinel))
        options |= {"username": self.user or None, "password": self._password.read() or None}
        return redis.Redis(
            host=address.name,
            port=address.port,
            unix_socket_path=address.path or None,
            db=self.dbname,
            # Connects here and now, and takes no lock per query.
            single_connection_client=True,
            **options,
        )

    def ask(self, connection: redis.Redis, key: str) -> Sequence[str] | None:
        """Send the command for *key*."""
        if key is _TOPOLOGY:
            self._learn_from(connection)
            return None
        arguments = self.query.arguments(Address.split(key))
        log.debug("map %s: %s with %r", self.name, self.query.word, arguments)
        try:
            if self._is_asking:
                connection.execute_command("ASKING")
            answer = connection.execute_command(self.query.word, *arguments)
        except redis.ResponseError as error:
            self.refuse(connection, error)
        if self.query.word in _WRITING_COMMANDS:
            return None
        if self.query.word == "SISMEMBER":
            return arguments[-1:] if answer else None
        return None if answer is None else [to_text(answer)]

    def refuse(self, connection: redis.Redis, error: redis.ResponseError) -> NoReturn:
        """Raise ElsewhereError if *error* says that another node has the key, else *error*."""
        if isinstance(found := _typed(error), AskError):
            raise ElsewhereError(found, _node(found.host or _host_of(connection), found.port)) from error
        raise error

    def examine(self, connection: redis.Redis) -> None:
        """Ask whether it is there for us, and, if it should be a node of a cluster, what it knows of that."""
        try:
            connection.ping()
            if self.cluster:
                self._learn_from(connection)
        except self.errors as error:
            raise UnreachableError(str(error)) from error

    def blamed(self, error: Exception) -> str:
        """A wrong password is the password's fault."""
        # redis-py 4 has a class for a password that is missing only.
        is_login = isinstance(error, redis.AuthenticationError) or str(error).startswith("WRONGPASS ")
        return "password" if is_login else super().blamed(error)

    def hang_up(self, connection: redis.Redis) -> None:
        """Close the connection."""
        connection.close()

    def trouble(self, connection: redis.Redis, error: Exception) -> Trouble:  # noqa: ARG002
        """redis-py has a class for each."""
        if isinstance(error, redis.TimeoutError):
            return Trouble.SLOW
        return Trouble.LOST if isinstance(error, _LOST) else Trouble.REFUSED

    def server_limit(self, connection: redis.Redis) -> int | None:
        """Return ``maxclients``, which an access control list may hide."""
        return int(connection.config_get("maxclients")["maxclients"] or 0)

    # A cluster.

    def all_links(self) -> Sequence[Link[redis.Redis]]:
        """Return the connections to the server or, of a cluster, to all nodes that have keys.

        Raises LookupFailedError.
        """
        if not self.cluster:
            return [self.own_link]
        if not self._slots:
            self._learn()
        return [self._link_of(node) for node in dict.fromkeys(self._nodes)]

    def prepare(self) -> None:
        """Connect, if ``connect`` says so."""
        if not self.cluster:
            super().prepare()
        elif self.connect == "start":
            try:
                self._learn()
            except LookupFailedError as failure:
                problem = f"no node of the cluster answers: {failure}"
                raise settings.SettingError(f"maps.{self.name}.hosts", problem) from failure

    def release(self) -> None:
        """Close the connections."""
        for link in self._node_links.values():
            link.drop()
        if not self.cluster:
            super().release()

    def find(self, key: str) -> Sequence[str] | None:
        """Ask the server or, of a cluster, the node that has the key."""
        if not self.cluster:
            return super().find(key)
        node, is_asked = self._node_of(key), False
        for _ in range(_MOST_REDIRECTIONS):
            try:
                self._is_asking = is_asked
                return self.find_at(self._link_of(node), key)
            except ElsewhereError as elsewhere:
                node, is_asked = elsewhere.node, elsewhere.is_asked
                self._slots = self._slots if is_asked else []
            finally:
                self._is_asking = False
        return self.find_at(self._link_of(node), key)

    def _node_of(self, key: str) -> str:
        """Return the node that has *key*. Raises LookupFailedError."""
        slot = key_slot(self.query.arguments(Address.split(key))[0].encode())
        if not self._slots:
            self._learn()
        node = self._nodes[bisect_right(self._slots, slot) - 1]
        # Another one may have taken its place; who looks for it again and again would find out no more.
        if self._link_of(node).health.cells.since[0] and time.monotonic() > self._learned + LONGEST_PAUSE:
            self._learn(apart_from=node)
            node = self._nodes[bisect_right(self._slots, slot) - 1]
        return node

    def _learn(self, apart_from: str = "") -> None:
        """Ask the nodes, one after the other, which of them has what. Raises LookupFailedError if none answers."""
        self._learned = time.monotonic()
        failure = LookupFailedError(Reply.temp_fail(f"map {self.name}: no node of the cluster is known"))
        for node in dict.fromkeys((*self._nodes, *self.hosts)):
            if node == apart_from:
                continue
            try:
                self.find_at(self._link_of(node), _TOPOLOGY)
            except LookupFailedError as error:
                failure = error
            else:
                return
        if not self._slots:
            raise failure

    def _learn_from(self, connection: redis.Redis) -> None:
        answer = connection.execute_command("CLUSTER", "SLOTS")
        ranges = sorted((int(first), to_text(where[0] or b""), int(where[1])) for first, _, where, *_ in answer)
        if not ranges:
            raise ClusterDownError("the node knows of no others")
        self._slots = [first for first, _, _ in ranges]
        here = _host_of(connection)
        self._nodes = [_node(name if name not in ("", "?") else here, port) for _, name, port in ranges]

    def _link_of(self, node: str) -> Link[redis.Redis]:
        if node not in self._node_links:
            self._node_links[node] = self.link_to((node,))
        return self._node_links[node]

    def _options(self, timeout: float) -> dict[str, Any]:
        options: dict[str, Any] = {
            "socket_connect_timeout": timeout,
            "socket_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
        }
        if _HAS_PROTOCOLS:
            # Nothing of protocol 3 is needed, and the older one needs no negotiation.
            options["protocol"] = 2
        if self.uses_tls:
            options |= {
                "ssl": True,
                "ssl_ca_certs": self._path(self.tls_CAfile),
                "ssl_ca_path": self._path(self.tls_CApath),
                "ssl_certfile": self._path(self.tls_cert_file),
                "ssl_keyfile": self._path(self.tls_key_file),
                "ssl_cert_reqs": "required" if self.tls_verify_cert else "none",
                "ssl_check_hostname": self.tls_verify_cert,
            }
        return options


class RedisWriter(RedisMap):
    """Stores what its keys tell; for the types that keep something of their own, and no type of the config file."""

    query = setting(_writing_command)
    """``SET key value EX seconds``."""

    asks_as = RedisMap


def _host_of(connection: redis.Redis) -> str:
    return str(connection.connection_pool.connection_kwargs["host"])


def _typed(error: redis.ResponseError) -> redis.ResponseError:
    """Return *error* as what its first word says; redis-py 4 tells these apart in its client for clusters alone."""
    word, _, rest = str(error).partition(" ")
    kind = _REDIRECTIONS.get(word)
    return kind(rest) if kind else error


def _node(name: str, port: int) -> str:
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
