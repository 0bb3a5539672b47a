"""One cache for all workers: what it survives, who may read it, and the command that shows and purges it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefork_socketmap.client import SocketmapClient, TempFail
from prefork_socketmap.daemon import cli
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.memory import Memory, Remembered
from prefork_socketmap.socketmap.messages import Reply
from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.processes import await_end, memories
from tests.serving import Client
from tests.waiting import eventually

WITHIN = 30

CODE = """
import os, time
from pathlib import Path

HERE = Path({directory!r})

def lookup(key):
    with open(HERE / "asked", "a") as asked:
        asked.write(f"{{os.getpid()}} {{key!a}}\\n")
    while (HERE / "closed").exists():
        time.sleep(0.01)
    if (HERE / "down").exists():
        raise RuntimeError("the database is down")
    value = (HERE / "value").read_text()
    return value if value else None
"""


class Site:
    """An installation with the map ``m``, whose code tells by files what it was asked, and is told what to answer."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.directory = installation.directory
        (self.directory / "code_of_map.py").write_text(CODE.format(directory=str(self.directory)))
        self.file = self.directory / "m.cache"
        (self.directory / "asked").touch(mode=0o666)
        (self.directory / "asked").chmod(0o666)
        self.answer("one")

    def configure(self, settings: str = 'cache_ttl = "1h"\nnegative_cache_ttl = "1h"\n', top: str = "") -> None:
        table = f'[maps.m]\ntype = "python"\npath = ["."]\nfunction = "code_of_map:lookup"\nfold = true\n{settings}'
        self.installation.configure(top, maps=table)

    def start(self, settings: str = 'cache_ttl = "1h"\nnegative_cache_ttl = "1h"\n') -> None:
        self.configure(settings)
        self.installation.start()

    def answer(self, value: str) -> None:
        new = self.directory / "value.new"
        new.write_text(value)
        new.replace(self.directory / "value")

    def fail(self) -> None:
        (self.directory / "down").touch()

    def close_gate(self) -> None:
        (self.directory / "closed").touch()

    def open_gate(self) -> None:
        (self.directory / "closed").unlink()

    @property
    def asked(self) -> list[str]:
        """What the code of the map was asked so far, by whom."""
        return (self.directory / "asked").read_text().splitlines()

    def await_asked(self, number: int) -> int:
        """Wait until the map was asked so often; return who was the last."""
        eventually(lambda: len(self.asked) >= number, WITHIN, f"{number} questions")
        return int(self.asked[number - 1].split()[0])

    def lookup(self, key: str = "key") -> str | None:
        return self.installation.lookup("m", key)

    def replace_workers(self) -> None:
        """Kill all workers, and wait for others."""
        former = self.installation.workers()
        for pid in former:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not set(former) & set(self.installation.workers()), WITHIN, "new workers")
        self.installation.idle_workers()

    def kill(self) -> None:
        """Kill the master and all workers at once."""
        master = self.installation.pid
        workers = self.installation.workers()
        for pid in (master, *workers):
            os.kill(pid, signal.SIGKILL)
        await_end(master, *workers, within=WITHIN)
        (self.installation.runtime_dir / "state.json").unlink()

    def command(self, *arguments: str, code: int = 0) -> str:
        """Run the command ``cache``; return what it says, on standard error if it fails."""
        done = self.installation.run("cache", *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr or done.stdout


@pytest.fixture
def site(installation: Installation) -> Site:
    return Site(installation)


FILE = 'cache_ttl = "1h"\nstale_ttl = "1d"\ncache_file = "m.cache"\n'


# What the cache survives.


def test_what_one_worker_has_heard_all_know_those_included_that_start_later(site: Site) -> None:
    site.start()
    assert site.lookup() == "one"
    site.answer("two")
    for _ in range(3):
        site.replace_workers()
        assert site.lookup("KEY") == "one"
    assert len(site.asked) == 1


@pytest.mark.parametrize("command", ["reload", "upgrade"])
@pytest.mark.parametrize("settings", ['cache_ttl = "1h"\n', FILE], ids=["memory", "file"])
def test_the_cache_survives(site: Site, command: str, settings: str) -> None:
    site.start(settings)
    assert site.lookup() == "one"
    for _ in range(3):
        assert site.installation.run(command).returncode == 0
        site.replace_workers()
        assert site.lookup() == "one"
    assert len(site.asked) == 1


def test_a_reload_after_an_upgrade_finds_the_cache_too(site: Site) -> None:
    site.start()
    site.lookup()
    for command in ("upgrade", "reload", "upgrade", "reload"):
        assert site.installation.run(command).returncode == 0
    assert site.lookup() == "one"
    assert len(site.asked) == 1
    assert site.command("list", "m").startswith("key\tOK\tfresh\t")


def test_a_map_that_has_changed_begins_with_nothing_until_the_change_is_undone(site: Site) -> None:
    site.start(FILE)
    assert site.lookup() == "one"
    site.configure(FILE + 'result_format = "<%s>"\n')
    assert site.installation.run("reload").returncode == 0
    assert site.command("list", "m") == ""
    assert site.lookup() == "<one>"
    site.answer("two")
    site.configure(FILE.replace('"1h"', '"2h"') + "cache_size = 10000\n")
    assert site.installation.run("reload").returncode == 0
    assert site.lookup() == "one"
    assert len(site.asked) == 2


def test_a_map_whose_code_has_changed_begins_with_nothing(site: Site) -> None:
    site.start()
    assert site.lookup() == "one"
    code = site.directory / "code_of_map.py"
    code.write_text(code.read_text() + "# changed\n")
    site.answer("two")
    assert site.installation.run("reload").returncode == 0
    assert site.lookup() == "two"


def test_a_map_begins_with_nothing_when_the_secrets_with_which_it_signs_have_changed(
    installation: Installation,
) -> None:
    secrets = installation.directory / "secrets"
    secrets.write_text("secret\n")
    secrets.chmod(0o640)
    maps = '[maps.m]\ntype = "srs"\ndirection = "forward"\ndomain = "x.example"\nsecret_file = "secrets"\n'
    installation.configure(maps=maps + 'cache_ttl = "1h"\n')
    installation.start()
    before = installation.lookup("m", "user@sender.org")
    assert installation.run("reload").returncode == 0
    assert installation.lookup("m", "user@sender.org") == before
    assert "user@sender.org" in installation.run("cache", "list", "m").stdout
    secrets.write_text("another secret\n")
    assert installation.run("reload").returncode == 0
    assert installation.lookup("m", "user@sender.org") != before


def test_a_map_begins_with_nothing_when_one_that_it_asks_has_changed(installation: Installation) -> None:
    maps = (
        '[maps.c]\ntype = "chain"\nmaps = ["d"]\ncache_ttl = "1h"\n'
        '[maps.d]\ntype = "chain"\nmaps = ["s"]\n[maps.s]\ntype = "static"\nentries = {{ key = "{}" }}\n'
    )
    installation.configure(maps=maps.format("one"))
    installation.start()
    assert installation.lookup("c", "key") == "one"
    installation.configure(maps=maps.format("two"))
    assert installation.run("reload").returncode == 0
    assert installation.lookup("c", "key") == "two"


@pytest.mark.parametrize("change", ["cache_size = 20000\n", "cache_bytes = 100000\n", 'cache_file = "m.cache"\n'])
def test_a_cache_of_another_size_or_place_begins_with_nothing(site: Site, change: str) -> None:
    site.start()
    assert site.lookup() == "one"
    site.answer("two")
    site.configure('cache_ttl = "1h"\nnegative_cache_ttl = "1h"\n' + change)
    assert site.installation.run("reload").returncode == 0
    assert site.lookup() == "two"
    assert site.command("list", "m").count("\n") == 1


@pytest.mark.parametrize("settings", ['cache_ttl = "1h"\n', FILE], ids=["memory", "file"])
def test_a_refused_reload_changes_nothing(site: Site, settings: str) -> None:
    site.start(settings)
    assert site.lookup() == "one"
    inode = site.file.stat().st_ino if "cache_file" in settings else 0
    site.configure(settings + "cache_size = 20000\n")
    code = site.directory / "code_of_map.py"
    right = code.read_text()
    code.write_text("raise RuntimeError('broken')\n")
    assert site.installation.run("reload").returncode == 1
    code.write_text(right)
    site.configure(settings)
    assert [each.name for each in site.directory.iterdir() if "m.cache." in each.name] == []
    assert site.command("list", "m").startswith("key\tOK\tfresh")
    if inode:
        assert site.file.stat().st_ino == inode


def test_a_reload_leaves_no_descriptors_of_caches_behind(site: Site) -> None:
    site.start()

    def caches() -> int:
        return len(memories(site.installation.pid, "cache"))

    assert caches() == 1
    for size in (20000, 30000):
        site.configure(f'cache_ttl = "1h"\ncache_size = {size}\n')
        assert site.installation.run("reload").returncode == 0
        assert caches() == 1
    site.configure("")
    assert site.installation.run("reload").returncode == 0
    assert caches() == 0


@pytest.mark.parametrize("end", ["stop", "crash"])
def test_with_a_file_the_cache_survives_the_server(site: Site, end: str) -> None:
    site.start(FILE.replace("1h", "0"))
    assert site.lookup() == "one"
    if end == "stop":
        site.installation.run("stop")
    else:
        site.kill()
    site.fail()
    site.installation.start()
    assert site.lookup() == "one"
    with pytest.raises(TempFail):
        site.lookup("other")


# The file.


def test_the_file_is_for_the_user_alone_and_has_its_size_from_the_beginning(site: Site) -> None:
    site.start(FILE + "cache_bytes = 1000000\n")
    status = site.file.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    assert 1_000_000 <= status.st_size <= 1_050_000
    assert status.st_blocks * 512 >= 1_000_000


def of_another_layout(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:12] = (99).to_bytes(4, "little")
    file.write_bytes(data)


def damaged(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[14] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "is no cache": lambda file: file.write_text("mailbox"),
    "another layout: 99": of_another_layout,
    "is damaged": damaged,
    "is damaged ": lambda file: os.truncate(file, file.stat().st_size // 2),
    "is no cache ": lambda file: os.truncate(file, 0),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_file_that_is_no_use_is_put_aside_with_a_warning(site: Site, problem: str) -> None:
    site.start(FILE)
    site.lookup()
    site.installation.run("stop")
    DAMAGES[problem](site.file)
    before = site.file.read_bytes()
    site.installation.start()
    line = site.installation.logged("it is put aside")
    assert problem.strip() in line
    assert (site.directory / "m.cache.bad").read_bytes() == before
    assert site.lookup() == "one"
    assert len(site.asked) == 2
    site.replace_workers()
    assert site.lookup() == "one"
    assert len(site.asked) == 2


@pytest.mark.parametrize("place", ["nowhere/m.cache", "link", "directory", "pipe"])
def test_a_file_that_cannot_be_used_is_a_warning_and_the_cache_is_in_memory(site: Site, place: str) -> None:
    target = site.directory / "precious"
    target.write_text("precious")
    (site.directory / "link").symlink_to(target)
    (site.directory / "directory").mkdir()
    os.mkfifo(site.directory / "pipe")
    site.start(FILE.replace("m.cache", place))
    site.installation.logged("what is remembered ends with the server")
    assert site.lookup() == "one"
    site.replace_workers()
    assert site.lookup() == "one"
    assert len(site.asked) == 1
    assert target.read_text() == "precious"
    assert site.command("list", "m").startswith("key\tOK")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of other users")
def test_a_file_of_somebody_else_in_a_place_that_others_can_write_to_is_refused(site: Site) -> None:
    shared = site.directory / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    site.configure(FILE.replace("m.cache", "shared/m.cache"))
    for command in ("serve", "check"):
        done = site.installation.run(command)
        assert done.returncode == os.EX_CONFIG
        assert "maps.m.cache_file: others can write to" in done.stderr


def test_two_maps_with_the_same_file_are_refused(installation: Installation) -> None:
    table = '[maps.{}]\ntype = "static"\nentries = {{}}\ncache_ttl = 1\ncache_file = "file"\n'
    installation.configure(maps=table.format("a") + table.format("b"))
    for command in ("serve", "check"):
        done = installation.run(command)
        assert done.returncode == os.EX_CONFIG
        assert "maps.b.cache_file: maps.a has the same file" in done.stderr


def test_check_warns_of_a_directory_that_is_not_there(site: Site) -> None:
    site.configure(FILE.replace("m.cache", "nowhere/m.cache"))
    done = site.installation.run("check")
    assert done.returncode == 0
    assert f"warning: {site.installation.config}: maps.m.cache_file: there is no directory" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of other users")
def test_a_file_that_belongs_to_somebody_else_is_not_used(site: Site) -> None:
    site.start(FILE)
    site.lookup()
    site.installation.run("stop")
    os.chown(site.file, 65534, 65534)
    site.installation.run("check")
    site.configure(FILE)
    done = site.installation.run("check")
    assert done.returncode == os.EX_CONFIG
    assert "belongs to user 65534" in done.stderr


def test_what_is_in_memory_in_place_of_a_file_survives_too(site: Site) -> None:
    site.start(FILE.replace("m.cache", "nowhere/m.cache"))
    assert site.lookup() == "one"
    for command in ("reload", "upgrade", "reload"):
        assert site.installation.run(command).returncode == 0
        assert site.lookup() == "one"
    assert len(site.asked) == 1


def test_a_full_disk_is_a_warning(site: Site) -> None:
    site.start(FILE + f"cache_bytes = {1 << 40}\n")
    site.installation.logged("what is remembered ends with the server")
    assert site.lookup() == "one"
    assert not site.file.exists()


# One lookup at a time.


def test_of_lookups_of_the_same_key_one_asks_and_the_others_wait_for_its_answer(site: Site) -> None:
    site.start("cache_ttl = 0\nstale_ttl = 10\n")
    site.close_gate()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(site.installation.endpoint)) for _ in range(6)]
        for client in clients:
            client.request(b"m key")
        site.await_asked(1)
        await_lookups(site, len(clients))
        assert len(site.asked) == 1
        site.open_gate()
        assert [client.reply() for client in clients] == [b"OK one"] * len(clients)
    assert len(site.asked) == 1


def await_lookups(site: Site, number: int) -> None:
    """Wait until so many lookups are under way."""

    def under_way() -> bool:
        slots = json.loads(site.installation.run("status", "--json").stdout)["slots"]
        return [slot["map"] for slot in slots].count("m") == number

    eventually(under_way, WITHIN, f"{number} lookups under way")


@pytest.mark.parametrize(
    ("answer", "reply", "asked"),
    [("", b"NOTFOUND ", 1), ("x" * 50, b"OK " + b"x" * 50, 1), ("x" * 99, b"OK " + b"x" * 99, 4)],
)
def test_what_is_not_remembered_is_told_to_all_who_wait_if_it_is_short(
    site: Site, answer: str, reply: bytes, asked: int
) -> None:
    # Of the one kind of answers nothing is remembered.
    site.start('cache_ttl = "1h"\n' if not answer else 'negative_cache_ttl = "1h"\n')
    site.answer(answer)
    site.close_gate()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(site.installation.endpoint)) for _ in range(4)]
        for client in clients:
            client.request(b"m key")
        site.await_asked(1)
        await_lookups(site, len(clients))
        assert len(site.asked) == 1
        site.open_gate()
        assert [client.reply() for client in clients] == [reply] * len(clients)
    assert len(site.asked) == asked
    assert site.command("list", "m") == ""


def test_a_failure_is_told_to_all_who_wait(site: Site) -> None:
    site.start()
    site.close_gate()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(site.installation.endpoint)) for _ in range(6)]
        for client in clients:
            client.request(b"m key")
        site.await_asked(1)
        await_lookups(site, len(clients))
        site.fail()
        site.open_gate()
        assert [client.reply() for client in clients] == [b"TEMP lookup failed"] * len(clients)
    assert len(site.asked) == 1


def test_when_the_one_that_asks_is_killed_another_one_asks(site: Site) -> None:
    site.start()
    site.close_gate()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(site.installation.endpoint)) for _ in range(4)]
        for client in clients:
            client.request(b"m key")
        asking = site.await_asked(1)
        await_lookups(site, len(clients))
        os.kill(asking, signal.SIGKILL)
        assert site.await_asked(2) != asking
        site.open_gate()
        replies = []
        for client in clients:
            with contextlib.suppress(ConnectionResetError):  # that of the one that was killed
                replies.append(client.reply())
        assert replies == [b"OK one"] * (len(clients) - 1)
    assert len(site.asked) == 2


def test_when_it_takes_long_the_others_give_the_old_answer(site: Site) -> None:
    site.start('stale_ttl = "1h"\n')
    assert site.lookup() == "one"
    site.answer("two")
    site.close_gate()
    with Client(site.installation.endpoint) as client:
        client.request(b"m key")
        site.await_asked(2)
        assert [site.lookup() for _ in range(3)] == ["one"] * 3
        site.open_gate()
        assert client.reply() == b"OK two"
    assert len(site.asked) == 2
    assert site.lookup() == "two"


# The command.


def test_the_command_lists_gets_and_purges_what_the_running_server_remembers(site: Site) -> None:
    site.start()
    for key in ("Key", "other"):
        site.lookup(key)
    site.answer("")
    site.lookup("none")
    lines = sorted(line.split("\t") for line in site.command("list", "m").splitlines())
    assert [(key, status, state, value) for key, status, state, left, value in lines] == [
        ("key", "OK", "fresh", "one"),
        ("none", "NOTFOUND", "fresh", ""),
        ("other", "OK", "fresh", "one"),
    ]
    assert all(3000 < int(left) <= 3600 for _, _, _, left, _ in lines)
    assert site.command("get", "m", "KEY").split("\t")[0] == "key"
    assert site.command("get", "m", "unknown", code=1) == ""

    site.answer("two")
    assert site.command("purge", "m", "KEY") == "1 answer forgotten\n"
    assert site.command("purge", "m", "KEY", code=1) == "0 answers forgotten\n"
    assert [site.lookup(key) for key in ("key", "other", "none")] == ["two", "one", None]
    assert site.command("purge", "m") == "3 answers forgotten\n"
    assert [site.lookup(key) for key in ("key", "other", "none")] == ["two"] * 3


def test_the_command_finds_the_server_of_the_file_when_its_directory_is_gone(site: Site) -> None:
    site.start()
    site.lookup()
    shutil.rmtree(site.installation.runtime_dir)
    result = site.installation.run("cache", "purge", "m", "key")
    assert (result.returncode, result.stdout) == (0, "1 answer forgotten\n")
    site.answer("two")
    assert site.lookup() == "two"


def test_the_command_leaves_the_server_of_another_file_alone(site: Site) -> None:
    site.start()
    site.lookup()
    other = site.directory / "other.toml"
    shutil.copy(site.installation.config, other)
    result = subprocess.run(
        [*COMMAND, "cache", "purge", "-c", other, "m"], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    assert result.returncode == os.EX_UNAVAILABLE
    assert f"is held by the server of {site.installation.config}" in result.stderr
    site.answer("two")
    assert site.lookup() == "one"


def test_in_json_each_answer_is_a_document(site: Site) -> None:
    site.start('cache_ttl = "1h"\nstale_ttl = "1h"\n')
    site.lookup()
    (found,) = map(json.loads, site.command("list", "m", "--json").splitlines())
    assert (found["key"], found["status"], found["value"]) == ("key", "OK", "one")
    assert found["fresh_until"] - found["stored"] == pytest.approx(3600)
    assert found["kept_until"] - found["fresh_until"] == pytest.approx(3600)
    assert json.loads(site.command("purge", "m", "--json")) == {"forgotten": 1}


def test_without_a_server_the_command_looks_into_the_file(site: Site) -> None:
    site.start(FILE)
    site.lookup()
    site.lookup("other")
    site.installation.run("stop")
    assert site.command("get", "m", "key").startswith("key\tOK\tfresh\t")
    site.command("purge", "m", "key")
    site.installation.start()
    site.answer("two")
    assert [site.lookup(key) for key in ("key", "other")] == ["two", "one"]


def test_the_command_says_when_there_is_nothing(site: Site) -> None:
    site.configure('cache_ttl = "1h"\n')
    assert "nothing is remembered" in site.command("list", "m", code=os.EX_UNAVAILABLE)
    site.configure(FILE)
    assert "there is no" in site.command("list", "m", code=os.EX_UNAVAILABLE)
    assert "there is no such map; the file has: m" in site.command("list", "x", code=os.EX_UNAVAILABLE)
    site.configure("")
    assert "it remembers nothing" in site.command("list", "m", code=os.EX_UNAVAILABLE)
    assert "takes no KEY" in site.command("list", "m", "key", code=os.EX_USAGE)
    assert "needs a KEY" in site.command("get", "m", code=os.EX_USAGE)


FORGED = "a\tOK\tfresh\t9\tx\nb\\t\x1b[31m\u202e\x9b"


def test_no_key_and_no_value_forges_a_line_a_column_or_another_key(site: Site) -> None:
    site.start()
    site.answer(FORGED)
    with Client(site.installation.endpoint) as client:
        client.request(b"m " + FORGED.encode() + b"\xff")
        assert client.reply() == b"OK " + FORGED.encode()
    (line,) = site.command("list", "m").splitlines()
    key, status, state, _, value = line.split("\t")
    assert (status, state) == ("OK", "fresh")
    assert value == r"a\tOK\tfresh\t9\tx\nb\\t\x1b[31m\u202e\x9b"
    assert key == value.lower() + r"\udcff"
    (found,) = map(json.loads, site.command("list", "m", "--json").splitlines())
    assert found["value"] == FORGED


def test_a_purge_while_the_map_is_asked_keeps_the_old_answer_out(site: Site) -> None:
    site.start()
    site.close_gate()
    with Client(site.installation.endpoint) as client:
        client.request(b"m key")
        site.await_asked(1)
        site.command("purge", "m")
        site.open_gate()
        assert client.reply() == b"OK one"
    site.answer("two")
    assert site.lookup() == "two"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_sees_nothing(site: Site) -> None:
    site.start()
    site.lookup()
    (link,) = memories(site.installation.pid, "cache")
    done = subprocess.run(
        [shutil.which("cat") or "", link],
        user="nobody",
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
    assert b"one" not in done.stdout


class Notes(Map):
    """A type that remembers something of its own."""

    notes = {"key": "value", "other": "value"}  # noqa: RUF012 - a stand-in for a file

    def find(self, key: str) -> list[str]:
        return []

    def memory(self) -> Memory:
        return self  # type: ignore[return-value]

    def recall(self, key: str) -> Remembered | None:
        return Remembered(key, Reply.ok(self.notes[key]), 1.0, 2.0, 1e10) if key in self.notes else None

    def recall_all(self) -> Iterator[Remembered | None]:
        return map(self.recall, self.notes)

    def forget(self, key: str) -> bool:
        return self.notes.pop(key, None) is not None


def test_a_type_shows_and_forgets_what_it_remembers_of_its_own(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site.configure("")
    notes = Notes("m", {"cache_ttl": "1h"}, site.directory)
    monkeypatch.setattr("prefork_socketmap.daemon.cache.build_maps", lambda *_args, **_options: {"m": notes})

    def run(*arguments: str) -> str:
        cli.main(["cache", "-c", str(site.installation.config), *arguments])
        return "".join(capfd.readouterr())

    lines = [line.split("\t") for line in run("list", "m").splitlines()]
    assert [(key, state, value) for key, _, state, _, value in lines] == [
        ("key", "stale", "value"),
        ("other", "stale", "value"),
    ]
    assert run("purge", "m", "Key") == "1 answer forgotten\n"
    assert run("get", "m", "KEY") == ""
    assert run("get", "m", "OTHER").startswith("other\tOK\t")


# What is counted.


def cache_counters(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.installation.run("status", "--json").stdout)["maps"]["m"]["cache"]
    return found


def test_the_status_counts_the_shared_cache_once(site: Site) -> None:
    site.start('cache_ttl = "1h"\nstale_ttl = "1h"\n')
    for number in range(20):
        site.lookup(f"key{number}")
    site.replace_workers()
    for number in range(20):
        site.lookup(f"key{number}")
    assert cache_counters(site) == {"hits": 20, "misses": 20, "stale": 0, "entries": 20}


# Hostile workers.

HOSTILE = """
import fcntl, os
from pathlib import Path

def lookup(key):
    if key.startswith("path "):
        fds = [os.open(key.removeprefix("path "), os.O_RDWR)]
    else:
        fds = [int(each) for each in os.listdir("/proc/self/fd") if "cache" in name(each)]
    for fd in fds:
        size = os.fstat(fd).st_size
        if key == "garbage":
            for place in range(0, size, 4096):
                os.pwrite(fd, os.urandom(4096), place)
        if key == "grow":
            os.pwrite(fd, b"x", size + 10_000_000)
        if key == "shrink":
            try:
                os.ftruncate(fd, 0)
            except PermissionError:
                return "refused"
        if key == "lock":
            fcntl.lockf(fd, fcntl.LOCK_EX, 1 << 62, 0)  # but for the flights
    return "done"

def name(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
"""


@pytest.fixture
def hostile(site: Site) -> Site:
    """A site with a map, ``h``, that does to caches what it is asked to."""
    (site.directory / "hostile.py").write_text(HOSTILE)
    return site


def start_hostile(site: Site, settings: str) -> None:
    top = 'user = "nobody"\n' if os.geteuid() == 0 else ""
    hostile = '[maps.h]\ntype = "python"\npath = ["."]\nfunction = "hostile:lookup"\n'
    site.configure(f"{settings}\n{hostile}", top)
    site.installation.start()


@pytest.mark.parametrize("settings", ['cache_ttl = "1h"\n', FILE], ids=["memory", "file"])
@pytest.mark.parametrize("crime", ["garbage", "shrink", "lock"])
def test_a_hostile_worker_crashes_nobody_and_blocks_nobody(hostile: Site, settings: str, crime: str) -> None:
    start_hostile(hostile, settings)
    installation = hostile.installation
    assert hostile.lookup() == "one"
    master, workers = installation.pid, installation.idle_workers()
    assert installation.lookup("h", crime) in ("done", "refused")
    for number in range(50):
        assert hostile.lookup(f"key{number}") == "one"
    assert installation.pid == master
    assert set(workers) <= set(installation.workers())
    for command in ("reload", "upgrade"):
        assert installation.run(command).returncode == 0
        assert hostile.lookup("after") == "one"
    installation.run("cache", "list", "m")
    assert "Traceback" not in installation.run("cache", "list", "m").stderr


def test_what_a_hostile_worker_adds_to_a_file_is_cut_off(hostile: Site) -> None:
    start_hostile(hostile, FILE)
    size = hostile.file.stat().st_size
    hostile.installation.lookup("h", "grow")
    assert hostile.file.stat().st_size > size
    eventually(lambda: hostile.file.stat().st_size == size, WITHIN, "the size that it had")


def test_nobody_makes_a_cache_in_memory_longer(hostile: Site) -> None:
    start_hostile(hostile, 'cache_ttl = "1h"\n')
    with pytest.raises(TempFail):
        hostile.installation.lookup("h", "grow")
    assert hostile.lookup() == "one"


def test_the_client_keeps_its_connection_when_the_cache_is_purged(site: Site) -> None:
    site.start()
    with SocketmapClient(site.installation.endpoint) as client:
        assert client.lookup("m", "key") == "one"
        site.answer("two")
        site.command("purge", "m")
        assert client.lookup("m", "key") == "two"
