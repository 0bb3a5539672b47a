"""``python -m tests.bench [SCENARIO]``: run the bench and print its report."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import resource
from collections.abc import Iterator, Sequence

from tests.bench import imports
from tests.bench.load import Load, Loaders
from tests.bench.measure import ServerProcess
from tests.bench.report import Figures, render
from tests.bench.scenarios import SCENARIOS, Contender, Scenario

_AT_BOTH_ENDS = 1.0  # seconds for which a contender's company asks longer than the clients that are measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run what it names."""
    options = _parser().parse_args(arguments)
    _raise_descriptor_limit()
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, loopback TCP;")
    print(f"medians of {options.rounds} alternating rounds of {options.seconds:g} s")
    if options.scenario == "maps":
        _compare_maps(options)
    elif options.scenario == "srs":
        _compare_srs(options)
    elif options.scenario == "cache":
        _compare_caches(options)
    elif options.scenario == "change":
        _change_a_file(options)
    elif options.scenario == "import":
        _import_the_library(options)
    else:
        _compare_servers(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Load socketmap servers side by side.")
    parser.add_argument(
        "scenario",
        nargs="?",
        choices=[*SCENARIOS, "maps", "cache", "change", "import", "srs"],
        default="busy",
        metavar="SCENARIO",
        help=f"{', '.join(SCENARIOS)}, maps, cache, change, import, srs (default: %(default)s)",
    )
    parser.add_argument(
        "-c",
        "--connections",
        type=int,
        action="append",
        default=[],
        help="so many busy connections instead of the scenario's loads; can be given more than once",
    )
    parser.add_argument("-s", "--seconds", type=float, default=3.0, help="length of a round (default: %(default)s)")
    parser.add_argument("-r", "--rounds", type=int, default=5, help="rounds per load (default: %(default)s)")
    parser.add_argument(
        "-p",
        "--processes",
        type=int,
        default=max(1, (os.cpu_count() or 1) // 2),
        help="processes that make the load (default: one for every two cores)",
    )
    return parser


def _compare_maps(options: argparse.Namespace) -> None:
    from tests.bench import maps  # needs the drivers, and the servers behind them

    print("maps: this server beside the bare drivers\n")
    print(maps.run(functools.partial(_measure, options=options), options.seconds, options.rounds))


def _compare_srs(options: argparse.Namespace) -> None:
    from tests.bench import srs  # needs PostSRSd

    print("srs: senders are rewritten, here and by PostSRSd")
    for load in [Load(number) for number in options.connections or (1, 8)]:
        print(f"\n{srs.run(functools.partial(_measure, options=options), load, options.rounds)}", flush=True)


def _compare_caches(options: argparse.Namespace) -> None:
    from tests.bench import cache  # needs libraries

    print("cache: what a remembered answer costs\n")
    print(cache.run(options.seconds, options.rounds))


def _change_a_file(options: argparse.Namespace) -> None:
    from tests.bench import change  # by way of the drivers, too

    print("change: a file of a million lines is replaced at the beginning of a round\n")
    print(change.run(options.seconds, options.rounds, options.processes))


def _import_the_library(options: argparse.Namespace) -> None:
    print("import: what it takes, above the bare interpreter\n")
    print(imports.run(options.rounds))


def _compare_servers(options: argparse.Namespace) -> None:
    scenario = SCENARIOS[options.scenario]
    print(f"{options.scenario}: {scenario.about}")
    for load in [Load(number) for number in options.connections] or scenario.loads:
        print(f"\n{_run(scenario, load, options)}", flush=True)


def _run(scenario: Scenario, load: Load, options: argparse.Namespace) -> str:
    """Let the contenders take turns under one load, and return the report."""
    rounds: dict[str, list[Figures]] = {contender.name: [] for contender in scenario.contenders}
    with contextlib.ExitStack() as stack:
        servers = [(contender, stack.enter_context(contender.start())) for contender in scenario.contenders]
        for number in range(options.rounds + 1):
            for contender, server in servers:
                with _company(contender, server, options):
                    figures = _measure(server, load, options)
                if number:  # the first round warms up
                    rounds[contender.name].append(figures)
    return render(str(load), rounds)


@contextlib.contextmanager
def _company(contender: Contender, server: ServerProcess, options: argparse.Namespace) -> Iterator[None]:
    """Have the contender's other clients ask meanwhile, if it has any."""
    if not contender.company:
        yield
        return
    with Loaders(server.port, contender.company, 1) as loaders:
        loaders.begin(options.seconds + _AT_BOTH_ENDS)
        yield


def _measure(server: ServerProcess, load: Load, options: argparse.Namespace) -> Figures:
    with Loaders(server.port, load, options.processes) as loaders:
        cpu_before = server.cpu()
        outcome = loaders.run(options.seconds)
        return Figures.of(outcome, server.cpu() - cpu_before, server.pss())


def _raise_descriptor_limit() -> None:
    """Allow as many connections as the system does, here and in the servers, which inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
