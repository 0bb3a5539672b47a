"""The type ``redis``: Redis or Valkey; one server, a primary that Sentinel knows, or a cluster.

The driver is redis-py. Retries and pauses are those of all network maps, so the driver's own are off.
"""

# Parts of redis-py have no type hints.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException
from redis.retry import Retry
from redis.sentinel import Sentinel

from prefork_socketmap import settings
from prefork_socketmap.maps.base import log
from prefork_socketmap.maps.host import Host, hosts, network_host
from prefork_socketmap.maps.network import NetworkMap, Trouble
from prefork_socketmap.maps.secret import Secret, secret
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.maps.template import Address, Template
from prefork_socketmap.maps.tls import TlsSettings
from prefork_socketmap.socketmap.messages import to_text

_PORT = 6379
_SENTINEL_PORT = 26379
# The commands that can be asked with, and how many arguments each has.
_COMMANDS = {"GET": 1, "HGET": 2, "SISMEMBER": 2}
_WRITING_COMMANDS = {"SET": 4}
_SERVICE = re.compile(r"[A-Za-z0-9._-]+")
_LOST = (redis.ConnectionError, RedisClusterException, OSError)


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


class RedisMap(TlsSettings, NetworkMap["redis.Redis | RedisCluster"]):
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

    errors = (redis.RedisError, RedisClusterException, OSError)

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

    def dial(self, host: str, timeout: float) -> redis.Redis | RedisCluster:
        """Connect to *host*, or to what it knows, and log in.

        *timeout* is also that of each query: to Redis they are all alike, and as short.
        """
        address = Host.parse(host, _SENTINEL_PORT if self.sentinel else _PORT)
        options = self._options(timeout)
        if self.sentinel:
            sentinel = Sentinel([(address.name, address.port)], sentinel_kwargs=options)
            address = Host(*sentinel.discover_master(self.sentinel))
        options |= {"username": self.user or None, "password": self._password.read() or None}
        if self.cluster:
            return RedisCluster(startup_nodes=[ClusterNode(address.name, address.port)], **options)
        return redis.Redis(
            host=address.name,
            port=address.port,
            unix_socket_path=address.path or None,
            db=self.dbname,
            # Connects here and now, and takes no lock per query.
            single_connection_client=True,
            **options,
        )

    def ask(self, connection: redis.Redis | RedisCluster, key: str) -> Sequence[str] | None:
        """Send the command for *key*."""
        arguments = self.query.arguments(Address.split(key))
        log.debug("map %s: %s with %r", self.name, self.query.word, arguments)
        answer = connection.execute_command(self.query.word, *arguments)
        if self.query.word == "SISMEMBER":
            return arguments[-1:] if answer else None
        return None if answer is None else [to_text(answer)]

    def hang_up(self, connection: redis.Redis | RedisCluster) -> None:
        """Close the connection, or those to all nodes."""
        connection.close()

    def trouble(self, connection: redis.Redis | RedisCluster, error: Exception) -> Trouble:  # noqa: ARG002
        """redis-py has a class for each."""
        if isinstance(error, redis.TimeoutError):
            return Trouble.SLOW
        return Trouble.LOST if isinstance(error, _LOST) else Trouble.REFUSED

    def _options(self, timeout: float) -> dict[str, Any]:
        options: dict[str, Any] = {
            "socket_connect_timeout": timeout,
            "socket_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
            # Nothing of protocol 3 is needed, and the older one needs no negotiation.
            "protocol": 2,
        }
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

    def ask(self, connection: redis.Redis | RedisCluster, key: str) -> Sequence[str] | None:
        """Send the command for *key*."""
        connection.execute_command(self.query.word, *self.query.arguments(Address.split(key)))
        return None
