"""What a worker of the daemon does before it serves: it takes its own account, then builds the maps.

Only workers and the commands ``check`` and ``query`` import code of maps: the master may be root, and lives longer
than the code that a reload brings.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prefork_socketmap.daemon import log
from prefork_socketmap.daemon.configfile import DEFAULT_MAP, Network, Settings, errors_in, in_file
from prefork_socketmap.daemon.privileges import Account
from prefork_socketmap.prefork.generation import Plan
from prefork_socketmap.prefork.tallies import Tallies
from prefork_socketmap.service import ANY_OTHER_MAP, DefaultLookup, Lookup, Service, tally_names

if TYPE_CHECKING:
    from prefork_socketmap.maps.base import Map, MissingLibraryError

    OnMissing = Callable[[MissingLibraryError], None]

logger = logging.getLogger("prefork_socketmap.worker")


def plan(settings: Settings) -> Plan:
    """Return what workers do according to *settings*."""
    return Plan(
        endpoints=settings.endpoints,
        limits=settings.config,
        start=functools.partial(_start, settings),
        names=tally_names(settings.maps, has_default=settings.default_map is not None),
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

    None of them is open. Raises SettingError for a wrong table. With *on_missing*, a library that is not installed
    costs only the map that needs it (see ``registry.build``).
    """
    # The registry is ours. Which types, libraries and modules of users it imports, the tables say, and that is later.
    from prefork_socketmap.maps import registry

    if run_as:
        run_as.assume()
    tables = dict(settings.maps)
    if settings.default_map is not None:
        # Among the others, so that a chain can be the default.
        tables[DEFAULT_MAP] = settings.default_map
    with errors_in(settings.path):
        return registry.build(tables, settings.base, on_missing)


def open_maps(settings: Settings, on_missing: OnMissing | None = None) -> dict[str, Map]:
    """Take the workers' account, build all maps and open them.

    Raises what ``build_maps`` raises, and whatever a map's code or library raises when it is opened.
    """
    maps = build_maps(settings, settings.account, on_missing)
    with errors_in(settings.path):
        for each in maps.values():
            each.open()
    return maps


def _start(settings: Settings, tallies: Tallies) -> Service:
    log.set_up("worker", settings.log)

    def log_missing(error: MissingLibraryError) -> None:
        logger.error("%s; every lookup in this map fails", in_file(settings.path, error))

    maps = open_maps(settings, log_missing)
    for name, each in maps.items():
        if each.cache is not None:
            each.cache.count_in(tallies[ANY_OTHER_MAP if name == DEFAULT_MAP else name].extras)
    lookups: dict[str, Lookup] = {name: each.lookup for name, each in maps.items()}
    default = _without_name(lookups.pop(DEFAULT_MAP)) if DEFAULT_MAP in lookups else None
    return Service(lookups, default, settings.config, tallies, log_lookups=settings.log.lookups)


def _without_name(lookup: Lookup) -> DefaultLookup:
    return lambda _name, key: lookup(key)
