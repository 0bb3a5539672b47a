"""The command line: what can be said, and which module does it.

A module that does something is imported when its command is given, so that each command loads no more than it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prefork_socketmap import settings
from prefork_socketmap.daemon.configfile import DEFAULT_PATH
from prefork_socketmap.daemon.journal import complain
from prefork_socketmap.settings import SettingError

PROGRAM = "prefork-socketmap"
_DAY = 86400.0
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")


class Parser(argparse.ArgumentParser):
    """An argument parser that exits with the code for wrong usage; argparse has one of its own."""

    def error(self, message: str) -> NoReturn:
        """Say how it is meant and exit."""
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{self.prog}: {message}\n")


class ShowVersion(argparse.Action):
    """Shows the version of the installed package: looked up only then, since that takes longer than all the rest."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - an Action
        values: object,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> NoReturn:
        """Show it and exit."""
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv*, by default in ``sys.argv``, and return its exit code."""
    arguments = parser().parse_args(argv)
    module, _, function = arguments.run.partition(":")
    try:
        code: int = getattr(importlib.import_module(f"prefork_socketmap.daemon.{module}"), function)(arguments)
    except SettingError as error:
        return complain(str(error), os.EX_CONFIG)
    except OSError as error:
        return complain(str(error), os.EX_NOPERM if isinstance(error, PermissionError) else os.EX_OSERR)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def parser() -> Parser:
    """Return the parser for all commands; each sets ``run`` to "module:function"."""
    top = Parser(prog=PROGRAM, description="Answer Postfix socketmap: lookups with preforked workers.")
    top.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_check(commands)
    _add_control(commands)
    _add_status(commands)
    _add_query(commands)
    _add_convert(commands)
    _add_cache(commands)
    _add_install(commands)
    return top


def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    serve = commands.add_parser("serve", help="answer lookups", description="Answer lookups until told to stop.")
    _add_config(serve)
    _add_pid_file(serve)
    serve.add_argument(
        "-d",
        "--daemon",
        action="store_true",
        help="go to the background, and return when lookups are answered; log to syslog",
    )
    serve.add_argument("-v", "--verbose", action="store_true", help="log at level debug")
    serve.set_defaults(run="serve:serve")


def _add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    check = commands.add_parser(
        "check",
        help="tell whether a start with the config file would succeed",
        description="Do all that a start would do, short of serving: check every value of the config file, open "
        "every map as a worker would, connect to its server, prepare its query, and bind what the running server has "
        "not. Exit status: 0, 69 something is down or in use, 75 a probe failed, 78 something is wrong.",
    )
    _add_config(check)
    check.add_argument("--no-connect", action="store_true", help="ask no server that a map has its answers from")
    check.add_argument(
        "--probe",
        metavar="MAP=KEY",
        action="append",
        default=[],
        help="look KEY up in MAP as well; may be given more than once",
    )
    check.set_defaults(run="check:check")


def _add_control(commands: argparse._SubParsersAction[Parser]) -> None:
    for name, what in {
        "reload": "make the running server read its config file again, and wait until it has",
        "upgrade": "make the running server run the program that is installed by now, and wait until it does",
        "stop": "let the running server finish its lookups and stop, and wait until it is gone",
    }.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        _add_config(command)
        _add_pid_file(command)
        command.set_defaults(run=f"control:{name}")


def _add_status(commands: argparse._SubParsersAction[Parser]) -> None:
    status = commands.add_parser(
        "status",
        help="tell whether the server runs, and what it does",
        description="Tell whether the server runs, and what it does. Exit status: 0 it does, 1 it died, 3 it does "
        "not run, 4 that is not known.",
    )
    _add_config(status)
    _add_pid_file(status)
    formats = status.add_mutually_exclusive_group()
    for name, what in {"json": "as JSON", "prometheus": "in the text format of Prometheus"}.items():
        formats.add_argument(f"--{name}", action="store_const", const=name, dest="format", help=what)
    status.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        const=2.0,
        type=_pause,
        help="tell it again and again, every %(const)g seconds by default, until interrupted",
    )
    status.set_defaults(run="status:status", format="text")


def _pause(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= _DAY:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not accepted here; expected a number of seconds, a day at most")


def _time(text: str) -> float:
    try:
        return settings.seconds("", float(text) if _NUMBER.fullmatch(text) else text)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_query(commands: argparse._SubParsersAction[Parser]) -> None:
    query = commands.add_parser(
        "query",
        help="ask a server, as Postfix would, or a map of a config file",
        description="Look a key up and print the value. Exit status: 0 found, 1 not found, 69 timeout, "
        "75 temporary error, 78 permanent error.",
    )
    query.add_argument(
        "-c", "--config", metavar="FILE", type=Path, help="ask a map of this config file, with no server"
    )
    query.add_argument(
        "--timeout",
        metavar="TIME",
        type=_time,
        help="how long to wait for a server to take the connection, and for its answer: 5, or 5s, 2m as in main.cf; "
        "0: for ever (default: 100s, as Postfix)",
    )
    query.add_argument("-v", "--verbose", action="store_true", help="with -c: tell each key tried, how, and the time")
    query.add_argument(
        "map",
        metavar="MAP",
        help="inet:HOST:PORT:MAP or unix:PATH:MAP, as in main.cf; with -c the name of a map in FILE",
    )
    query.add_argument("key", metavar="KEY", help='what to look up; "-": each line of standard input')
    query.set_defaults(run="query:query")


def _add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="print the maps for tables of Postfix",
        description="Print the maps for the tables of Postfix that are in the files: main.cf, and files of mysql:, "
        "pgsql:, sqlite:, ldap: and memcache: tables. Exit status: 0, or 65 if anything could not be translated.",
    )
    convert.add_argument(
        "files", metavar="FILE", nargs="+", help="a file, or mysql:FILE or pgsql:FILE where the file does not tell"
    )
    convert.set_defaults(run="convert:convert")


def _add_cache(commands: argparse._SubParsersAction[Parser]) -> None:
    cache = commands.add_parser(
        "cache",
        help="show what a map remembers, or have it forgotten",
        description="List what a map remembers, show what it remembers of a key, or have it forgotten by all "
        "workers. Exit status: 0, or 1 if KEY is not remembered.",
    )
    _add_config(cache)
    _add_pid_file(cache)
    cache.add_argument("--json", action="store_true", help="as JSON, a document on each line")
    cache.add_argument("action", metavar="ACTION", choices=["list", "get", "purge"], help="list, get or purge")
    cache.add_argument("map", metavar="MAP", help="the name of a map in the config file")
    cache.add_argument("key", metavar="KEY", nargs="?", help="get: of which key; purge: this one instead of all")
    cache.set_defaults(run="cache:cache")


def _add_install(commands: argparse._SubParsersAction[Parser]) -> None:
    install = commands.add_parser(
        "install",
        help="make the server a service of this machine",
        description="Put configuration, units or init script, and manual pages in place, and make the user that the "
        "server runs as. What was changed by hand is kept.",
    )
    kinds = install.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--systemd", action="store_true", help="for systemd: units, sysusers.d, tmpfiles.d")
    kinds.add_argument("--init", action="store_true", help="for any other init: a script for /etc/init.d")
    uninstall = commands.add_parser(
        "uninstall",
        help="take back what install did",
        description="Take back what install did, but for what was changed by hand since.",
    )
    for command in (install, uninstall):
        command.add_argument(
            "--prefix",
            metavar="DIR",
            type=Path,
            default=Path("/"),
            help="the root of the machine (default: %(default)s); below any other one only files are made",
        )
        command.add_argument("--dry-run", action="store_true", help="tell what would be done, and do nothing")
    install.set_defaults(run="install:install")
    uninstall.set_defaults(run="install:uninstall")


def _add_config(command: Parser) -> None:
    command.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        type=Path,
        default=DEFAULT_PATH,
        help="the config file (default: %(default)s)",
    )


def _add_pid_file(command: Parser) -> None:
    command.add_argument(
        "--pid-file", metavar="FILE", type=Path, help="the file that holds the master's pid, in place of pid_file"
    )
