"""The manual pages say what the code does: each command, option and config key, nothing missing, nothing invented.

A page marks what it documents, ``.It Va KEY Pq DEFAULT`` for a key, ``.It Fl OPTION``, ``.It Ic COMMAND``; these
marks are compared with what the code declares.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefork_socketmap
from prefork_socketmap import Config, client, settings
from prefork_socketmap.daemon import asjson, cli, configfile, prometheus
from prefork_socketmap.daemon.backends import BackendReport
from prefork_socketmap.daemon.report import CacheReport, Counters, Finding, MapReport, Report, WorkerReport
from prefork_socketmap.maps import registry
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.network import NetworkMap
from prefork_socketmap.maps.setting import Setting, declared
from prefork_socketmap.maps.srsaddress import Flaw
from prefork_socketmap.maps.tls import TlsSettings
from prefork_socketmap.maps.watched import WatchedFileMap
from prefork_socketmap.prefork.counters import SERVER_COUNTERS
from prefork_socketmap.socketmap import messages, netstring

MAN = Path(__file__).parent.parent / "man"
PAGES = sorted(MAN.glob("*.[1-9]"))
README = MAN.parent / "README.md"
COMMANDS = MAN / "prefork-socketmap.8"
CONFIGURATION = MAN / "prefork-socketmap.toml.5"
LIBRARY = MAN / "prefork_socketmap.3"

SECRET_KEYS = {"password", "password_file", "password_env"}
# Words that a page uses for a default in place of a value.
WORDS: dict[str, object] = {"none": None, "required": ...}


def sections(page: Path, macro: str = "S[hs]") -> dict[str, str]:
    """Return the text of each section and subsection of *page*, by title."""
    pieces = re.split(rf"^\.{macro} (.*)\n", page.read_text(), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def items(text: str, macro: str) -> dict[str, str]:
    """Return the list items of *text* that *macro* marks, with what stands on the line after their first word."""
    found = re.findall(rf"^\.It {macro} (\S+) ?(.*)$", text, flags=re.MULTILINE)
    assert len(found) == len(dict(found)), "an item stands there twice"
    return dict(found)


def keys(text: str) -> dict[str, object]:
    """Return the config keys that *text* documents, with their defaults."""
    return {key: _default(rest) for key, rest in items(text, "Va").items()}


def _default(rest: str) -> object:
    text = re.sub(r"\bQ[qo] (\S+)(?: Qc)?", r'"\1"', rest.removeprefix("Pq "))
    text = re.sub(r"^Bq (.*)", r"[\1]", text)
    if text in WORDS:
        return WORDS[text]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


SECTIONS = sections(CONFIGURATION)
COMMON_KEYS = keys(SECTIONS["Keys of every type"])
WATCHED_KEYS = keys(SECTIONS["Keys of all types that answer from a file which each worker reads"])
NETWORK_KEYS = keys(SECTIONS["Keys of all types that ask a server over the network"])
TLS_KEYS = keys(SECTIONS["TLS"])
TYPES = sorted(registry._BUILT_IN)


def map_class(kind: str) -> type[Map]:
    """Return the class behind the map type *kind*."""
    return registry._load("type", kind)


def is_default(declaration: Setting[object], documented: object) -> bool:
    """Whether a page's default is the declared one, read as the config file would be."""
    default = declaration._default
    if documented is ... or _is_required(declaration):
        return documented is ... and _is_required(declaration)
    if documented is None:
        return not default
    read = declaration._read("key", documented)
    # A template is known by its text.
    return getattr(read, "text", read) == getattr(default, "text", default)


def _is_required(declaration: Setting[object]) -> bool:
    try:
        declaration.value("", "key", {})
    except settings.SettingError:
        return True
    return False


# The configuration.


def test_every_top_level_key_is_documented_and_no_other() -> None:
    documented = {
        key
        for title in ("WHERE TO LISTEN", "WHOM TO RUN AS", "LIMITS", "LOGGING")
        for key in keys(SECTIONS[title])
        if not key.startswith("log.")
    }
    limits = {field.name for field in dataclasses.fields(Config)}
    assert documented == {*configfile._KEYS, *limits} - {"log", "metrics", "maps", "default_map"}


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda field: field.name)
def test_a_limit_has_the_documented_default(field: dataclasses.Field[object]) -> None:
    documented = keys(SECTIONS["WHERE TO LISTEN"]) | keys(SECTIONS["LIMITS"])
    assert field.metadata["read"](field.name, documented[field.name]) == field.default


def test_every_key_of_a_listen_table_is_named() -> None:
    text = SECTIONS["WHERE TO LISTEN"]
    assert all(f".Va {key}" in text for key in configfile._LISTEN_KEYS)


def test_the_keys_of_the_log_table_are_documented_with_their_defaults() -> None:
    documented = {key: value for key, value in keys(SECTIONS["LOGGING"]).items() if key.startswith("log.")}
    assert documented == {f"log.{key}": value for key, value in dataclasses.asdict(configfile.LogSettings()).items()}


def test_the_key_of_the_metrics_table_is_documented_with_its_default(tmp_path: Path) -> None:
    documented = keys(SECTIONS["METRICS"])
    file = tmp_path / "file.toml"
    file.write_text('[metrics]\n[maps.m]\ntype = "static"\nentries = { k = "v" }\n')
    assert documented == {"metrics.listen": str(configfile.load(file).metrics).removeprefix("inet:")}


def test_every_map_type_has_a_section_and_no_other() -> None:
    assert sorted(title.removeprefix("Type ") for title in SECTIONS if title.startswith("Type ")) == TYPES


def test_the_keys_of_every_type_are_documented_with_their_defaults() -> None:
    declarations = dict(declared(Map))
    assert COMMON_KEYS.keys() == declarations.keys()
    assert [key for key, default in COMMON_KEYS.items() if not is_default(declarations[key], default)] == []


@pytest.mark.parametrize("kind", TYPES)
def test_the_keys_of_a_type_are_documented_with_their_defaults(kind: str) -> None:
    owner = map_class(kind)
    declarations = dict(declared(owner))
    documented = dict(COMMON_KEYS)
    if issubclass(owner, NetworkMap):
        documented |= NETWORK_KEYS
    if issubclass(owner, WatchedFileMap):
        documented |= WATCHED_KEYS
    if issubclass(owner, TlsSettings):
        documented |= TLS_KEYS
    if declarations.keys() >= SECRET_KEYS:
        documented |= keys(SECTIONS["Secrets"])
    text = SECTIONS[f"Type {kind}"]
    if not owner.is_table:
        for key in COMMON_KEYS.keys() - declarations.keys():
            assert re.search(rf"^\.Va {key}\b", text, flags=re.MULTILINE)
            del documented[key]
    documented |= keys(text)
    assert documented.keys() == declarations.keys()
    assert [key for key, default in documented.items() if not is_default(declarations[key], default)] == []


def displays(text: str) -> list[str]:
    """Return the literal displays in *text*."""
    return [
        display.replace(r"\&", "")
        for display in re.findall(r"^\.Bd -literal[^\n]*\n(.*?)^\.Ed$", text, flags=re.MULTILINE | re.DOTALL)
    ]


MAP_EXAMPLES = [example for text in SECTIONS.values() for example in displays(text) if "[maps." in example]


@pytest.mark.parametrize("example", MAP_EXAMPLES)
def test_an_example_of_a_map_is_accepted(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("secret")
    text = re.sub(r'^(\w+_file = )"/etc/prefork-socketmap/.*"', r'\1"secret"', example, flags=re.MULTILINE)
    # Files of TLS that are not there; and a chain is shown without the maps that it names.
    monkeypatch.setattr(TlsSettings, "tls_context", lambda _self: None)
    tables = tomllib.loads(text)["maps"]
    others = {name for table in tables.values() for name in table.get("maps", [])}
    tables |= {name: {"type": "static", "entries": {}} for name in others}
    assert registry.build(tables, tmp_path).keys() == tables.keys()


RENAMED = {"server_host": "hosts"}


@pytest.mark.parametrize("kind", ["mysql", "pgsql", "sqlite", "ldap"])
def test_a_file_of_postfix_stands_beside_the_table_line_by_line(kind: str) -> None:
    before, after = displays(SECTIONS[f"From {kind}_table(5)"])
    parameters = [line.partition(" =")[0] for line in before.splitlines()]
    keys_here = [line.partition(" =")[0] for line in after.splitlines()][2:]  # behind the table's name and the type
    assert keys_here[: len(parameters)] == [RENAMED.get(name, name) for name in parameters]
    assert set(keys_here[len(parameters) :]) <= {"search", "recipient_delimiter", "propagate_extension"}


# The commands.


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    (group,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(group.choices)


def test_every_command_is_documented_and_no_other() -> None:
    assert items(sections(COMMANDS)["COMMANDS"], "Ic").keys() == commands().keys()


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Iterate over the options of *parser* as a page writes them: without the first dash."""
    for action in parser._actions:
        yield from (option[1:] for option in action.option_strings if option not in ("-h", "--help"))


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_options_of_a_command_are_documented_and_no_others(name: str) -> None:
    text = _text_of_command(name)
    first_line, rest = text.split("\n", 1)
    assert set(re.findall(r"\bFl (\S+)", first_line)) <= set(options(commands()[name]))
    described = sections(COMMANDS)["OPTIONS"]
    for option in options(commands()[name]):
        assert option in re.findall(r"\bFl (\S+)", first_line + rest + described), f"{option} of {name}"


def _text_of_command(name: str) -> str:
    text = sections(COMMANDS)["COMMANDS"]
    match = re.search(rf"^\.It Ic {name}\b(.*?)(?=^\.It Ic |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert match
    return match[1]


def test_no_option_is_invented() -> None:
    real = {option for parser in [cli.parser(), *commands().values()] for option in options(parser)}
    documented = {
        option
        for line in re.findall(r"^\.It (Fl .*)$", sections(COMMANDS)["OPTIONS"], flags=re.MULTILINE)
        for option in re.findall(r"Fl (\S+)", line)
    }
    assert documented == real


def test_the_manual_tells_to_install_as_the_readme_does() -> None:
    page = displays(sections(COMMANDS)["INSTALLATION"])
    section = README.read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    assert page == re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)


# The status.


def a_finding() -> Finding:
    """Return what a server with a map, a cache, a worker and a refused reload has to tell."""
    events: dict[str, dict[str, int]] = {}
    for group, name, _ in SERVER_COUNTERS:
        events.setdefault(group, {})[name] = 1
    counters = Counters(endings=[1, *[0] * 7], seconds=1.0, worst=1.0, buckets=[1, *[0] * 27])
    worker = WorkerReport(0, 2, 1, "busy", 0.0, "map", 0.5, "local", counters)
    backend = BackendReport("redis 127.0.0.1:6379", 1, 1.0)
    maps = [MapReport("map", counters, CacheReport(1, 1, 1, 1), {flaw.value: 1 for flaw in Flaw})]
    report = Report(1, 0.0, 1, 1, 1, events, maps, [worker], ["name"], [backend])
    return Finding(0, "running", 1, report, "a problem")


def keys_of(value: object) -> Iterator[str]:
    """Iterate over the keys in a JSON document, but for those that are names of maps, states or status words."""
    if isinstance(value, list):
        for each in value:
            yield from keys_of(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            if key not in ("states", "replies"):
                yield from keys_of(list(each.values()) if key in ("maps", "backends") else each)


def documented_words(text: str) -> set[str]:
    """Return the words of *text* that are marked as names: in ``.Va`` lines and items."""
    lines = re.findall(r"^\.(?:It )?Va (.*)$", text, flags=re.MULTILINE)
    return {word for line in lines for word in line.split()}


def test_every_key_of_the_status_in_json_is_documented() -> None:
    keys = set(keys_of(json.loads(asjson.render(a_finding()))))
    assert {"overflowed", "exhausted", "p99_seconds", "below_seconds", "stale", "lookup_seconds", "problem"} <= keys
    assert keys - documented_words(sections(COMMANDS)["STATUS"]) == set()


def test_every_metric_for_prometheus_is_documented_and_no_other() -> None:
    metrics = set(re.findall(r"^# TYPE prefork_socketmap_(\S+)", prometheus.render(a_finding()), flags=re.MULTILINE))
    items = sections(COMMANDS)["STATUS"].partition("The metrics for Prometheus")[2]
    documented = set()
    for line in re.findall(r"^\.It Va (.*)$", items, flags=re.MULTILINE):
        for name in line.replace(" Ns Ar name Ns Va ", "*").replace("Va ", "").split(" , "):
            group, star, end = name.partition("*")
            counted = [each.name for each in SERVER_COUNTERS if f"{each.group}_" == group]
            documented |= {f"{group}{each}{end}" for each in counted} if star else {name}
    assert documented == metrics


def test_every_state_of_a_worker_is_documented() -> None:
    assert (report := a_finding().report)
    documented = re.findall(r"^\.Em (\w+)", sections(COMMANDS)["STATUS"], flags=re.MULTILINE)
    assert report.count_states().keys() <= set(documented)


# The library.


def public_names(owner: type) -> set[str]:
    """Return the public methods, properties and fields that *owner* itself defines."""
    return {name for name in vars(owner) if not name.startswith("_") and name not in getattr(owner, "_fields", ())}


def test_every_public_name_of_the_package_is_documented() -> None:
    text = LIBRARY.read_text()
    assert [name for name in prefork_socketmap.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    "owner",
    [prefork_socketmap.Server, prefork_socketmap.RunningServer, prefork_socketmap.Reply, client.SocketmapClient],
    ids=lambda owner: owner.__name__,
)
def test_the_methods_of_a_class_are_documented_and_no_others(owner: type) -> None:
    documented = {
        name.removeprefix(f"{owner.__name__}.")
        for name in re.findall(r"^\.It (?:Fn|Va) (\S+)", LIBRARY.read_text(), flags=re.MULTILINE)
        if name.startswith(f"{owner.__name__}.")
    }
    internal = {"encode", "decode"} if owner is prefork_socketmap.Reply else set()
    assert documented == public_names(owner) - internal


def test_the_client_s_exceptions_are_documented() -> None:
    raised = [
        name
        for name, value in inspect.getmembers(client, inspect.isclass)
        if issubclass(value, client.LookupFailed) and value is not client.LookupFailed
    ]
    text = LIBRARY.read_text()
    assert raised
    assert [name for name in raised if name not in text] == []


def test_every_example_is_named_and_no_other() -> None:
    named = set(re.findall(r"^\.It Pa (\w+\.py)$", LIBRARY.read_text(), flags=re.MULTILINE))
    assert named == {path.name for path in (MAN.parent / "etc" / "examples").glob("*.py")}


def test_the_server_of_asyncio_is_the_example_that_is_tested() -> None:
    (shown,) = [text for text in displays(LIBRARY.read_text()) if "asyncio.start_server" in text]
    lines, example = shown.splitlines(), (MAN.parent / "etc" / "examples" / "asyncio_server.py").read_text()
    code = lines[: lines.index("async def main():")]
    assert [line for line in code if line not in example.splitlines()] == []
    compile(shown, "manual", "exec")


def test_every_public_name_of_the_codec_is_documented() -> None:
    text = sections(LIBRARY)["The codec"]
    names = {
        name for name, value in vars(netstring).items() if getattr(value, "__module__", "") == netstring.__name__
    }
    names |= {error for error, value in vars(messages).items() if error.endswith("Error") and isinstance(value, type)}
    assert {name for name in names if not name.startswith("_") and not re.search(rf"\b{name}\b", text)} == set()


# All pages.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_sound_to_mandoc(page: Path) -> None:
    if not shutil.which("mandoc"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("install mandoc: apt install mandoc")
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True, check=False
    )
    assert lint.stdout == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_refers_only_to_our_pages_that_exist(page: Path) -> None:
    ours = {match.groups() for match in re.finditer(r"\.Xr (prefork\S+) (\d)", page.read_text())}
    assert {f"{name}.{section}" for name, section in ours} <= {path.name for path in PAGES}
