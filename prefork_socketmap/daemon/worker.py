"""What a worker of the daemon does before it serves: it takes its own account and power, then builds the maps.

Only workers and the commands ``check`` and ``query`` import types of maps, their libraries and users' modules: the
master may be root, and lives longer than the code that a reload brings. What all types are based on is imported here,
in the master: in each worker it would take 1.5 MiB of memory that they can share.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import mmap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prefork_socketmap.daemon import log, privileges
from prefork_socketmap.daemon.backends import Memory, WorkerBackends
from prefork_socketmap.daemon.configfile import DEFAULT_MAP, Network, Settings, Table, errors_in, in_file
from prefork_socketmap.daemon.privileges import Account
from prefork_socketmap.maps import registry
from prefork_socketmap.prefork.counters import SlotCounters
from prefork_socketmap.prefork.plan import Plan
from prefork_socketmap.service import ANY_OTHER_MAP, DefaultLookup, Lookup, Service, counter_names
from prefork_socketmap.settings import SettingError, wrong

if TYPE_CHECKING:
    from prefork_socketmap.maps.base import Map, MissingLibraryError
    from prefork_socketmap.maps.store import Shared

    OnMissing = Callable[[MissingLibraryError], None]

logger = logging.getLogger("prefork_socketmap.worker")


LONGEST_VERIFICATION = 10.0
"""Seconds. A dead server costs each of its maps a timeout, and who starts during an outage does not wait for ever."""


class Proof:
    """That the maps of a generation would answer: given by its first worker, before it is ready.

    What ``check`` would say is logged. With *refuses*, what a server calls wrong keeps the worker from starting: so a
    reload is refused, where a start rather serves the other maps. A server that is down is no reason for either.
    """

    def __init__(self, *, refuses: bool) -> None:
        self._refuses = refuses
        self._is_given = mmap.mmap(-1, 1)  # shared by all workers that are forked

    def give(self, settings: Settings, maps: Iterable[Map]) -> None:
        """Ask the servers of *maps*, if no other worker has. Raises SettingError."""
        if self._is_given[0]:
            return
        self._is_given[0] = 1
        for error in verify(settings, maps):
            if self._refuses and not error.may_pass:
                raise error
            logger.log(logging.WARNING if error.may_pass else logging.ERROR, "%s", error, extra={"map": error.key})


def plan(settings: Settings, memory: Memory, caches: Mapping[str, Shared], *, is_first: bool = False) -> Plan:
    """Return what workers do according to *settings*; *is_first*: there is no server yet that could go on.

    In *memory* they share what they know of backends, in *caches*, by the names of maps, what these remember.
    """
    proof = Proof(refuses=not is_first)
    return Plan(
        endpoints=settings.endpoints,
        limits=settings.config,
        start=functools.partial(_start, settings, memory, caches, proof),
        defers=memory.defers,
        names=counter_names(settings.maps, has_default=settings.default_map is not None),
        source=str(settings.path),
        allow=functools.lru_cache(maxsize=1024)(functools.partial(is_allowed, settings.allow)),
    )


def is_allowed(networks: Sequence[Network], client: str) -> bool:
    """Whether the IP address *client* lies in one of *networks*."""
    address = ipaddress.ip_address(client.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in networks)


def build_maps(settings: Settings, run_as: Account | None, on_missing: OnMissing | None = None) -> dict[str, Map]:
    """Take the account *run_as*, if any, and build all maps; return them by name, the default map as DEFAULT_MAP.

    What their code has no use for is given up before. None of them is open. Raises SettingError for a wrong table.
    With *on_missing*, a library that is not installed costs only the map that needs it (see ``registry.build``).
    """
    tables = dict(settings.maps)
    if settings.default_map is not None:
        # Among the others, so that a chain can be the default.
        tables[DEFAULT_MAP] = settings.default_map
    privileges.clean_environment([*settings.environment, *_named_variables(tables.values())])
    if run_as:
        run_as.assume()
    privileges.hide()  # now: a change of user may have undone it
    with errors_in(settings.path):
        maps = registry.build(tables, settings.base, on_missing)
        _compare_timeouts(maps, tables, settings.config.lookup_timeout)
    return maps


def _compare_timeouts(maps: Mapping[str, Map], tables: Mapping[str, Table], most: float) -> None:
    """Raise SettingError for a map whose timeout no lookup would live to see."""
    for name, each in maps.items():
        if "timeout" in tables[name] and most and getattr(each, "timeout", 0.0) > most:
            accepted = f"at most lookup_timeout, which is {most:g} s"
            raise wrong(f"maps.{name}.timeout", tables[name]["timeout"], accepted)


def _named_variables(tables: Iterable[Table]) -> list[str]:
    """Return the names of the environment variables that *tables*, and tables in them, have their secrets from."""
    names: list[str] = []
    for key, value in (each for table in tables for each in table.items()):
        if isinstance(value, dict):
            names += _named_variables([value])
        elif key.endswith("_env") and isinstance(value, str):
            names.append(value)
    return names


def open_maps(
    settings: Settings, on_missing: OnMissing | None = None, backends: WorkerBackends | None = None
) -> dict[str, Map]:
    """Take the workers' account, give up what they have no use for, build all maps and open them.

    With *backends* they share connections, and what is known of backends with other workers.

    Raises what ``build_maps`` raises, and whatever a map's code or library raises when it is opened.
    """
    maps = build_maps(settings, settings.account, on_missing)
    with errors_in(settings.path):
        for each in maps.values():
            if backends:
                each.share(lambda: backends.links)
            each.open()
    return maps


def verify(settings: Settings, maps: Iterable[Map]) -> Iterator[SettingError]:
    """Have open *maps* ask their servers whether they would answer; iterate over what is wrong, with the file's name.

    An UncheckedError is one that may be over when a client asks.
    """
    from prefork_socketmap.maps.base import UncheckedError

    deadline = time.monotonic() + LONGEST_VERIFICATION
    for each in maps:
        try:
            if time.monotonic() >= deadline:
                raise UncheckedError(f"maps.{each.name}", "cannot be checked: other maps have taken too long")
            each.verify()
        except SettingError as error:
            yield in_file(settings.path, error)


def _start(
    settings: Settings, memory: Memory, caches: Mapping[str, Shared], proof: Proof, counters: SlotCounters
) -> Service:
    backends = memory.leave_to_worker(settings.config.process_limit)
    log.set_up("worker", settings.log)

    def log_missing(error: MissingLibraryError) -> None:
        problem = "%s; every lookup in this map fails"
        logger.error(problem, in_file(settings.path, error), extra={"map": error.key})

    maps = open_maps(settings, log_missing, backends)
    proof.give(settings, maps.values())
    for name, each in maps.items():
        counted = counters[ANY_OTHER_MAP if name == DEFAULT_MAP else name]
        each.count_in(counted.own)
        if each.cache is not None:
            if name in caches:
                each.cache.share(caches[name])
            each.cache.count_in(counted.extras)
    lookups: dict[str, Lookup] = {name: each.lookup for name, each in maps.items()}
    default = _without_name(lookups.pop(DEFAULT_MAP)) if DEFAULT_MAP in lookups else None
    return Service(lookups, default, settings.config, counters, log_lookups=settings.log.lookups)


def _without_name(lookup: Lookup) -> DefaultLookup:
    return lambda _name, key: lookup(key)
