"""The metrics process: Prometheus over HTTP, from a process that cannot harm the server and goes where that goes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from prefork_socketmap.client import TempFail
from prefork_socketmap.daemon import configfile
from prefork_socketmap.daemon.exporter import MOST_CLIENTS
from prefork_socketmap.settings import SettingError
from tests.daemon.installation import Installation
from tests.integration.servers.process import free_port
from tests.processes import await_end, children, open_files, process_status, process_title
from tests.waiting import eventually

ETC = Path(__file__).parent.parent.parent / "etc"
TITLE = "prefork-socketmap: metrics"


class Metered(Installation):
    """An installation whose file asks for metrics."""

    def __init__(self) -> None:
        self.metrics_port = free_port()
        super().__init__()
        self.configure()

    def configure(self, text: str = "", *, listen: str | None = None, maps: str | None = None) -> None:
        """Write the config file, with a table of metrics at its end."""
        super().configure(text, listen=listen, maps=maps)
        with self.config.open("a") as file:
            file.write(f'\n[metrics]\nlisten = "127.0.0.1:{self.metrics_port}"\n')

    def scrape(self, path: str = "/metrics") -> str:
        """Get the metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read().decode()

    def scraped(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Wait for metrics; return the samples."""

        def scrape() -> str:
            try:
                return self.scrape()
            except (OSError, http.client.HTTPException):
                return ""

        families = text_string_to_metric_families(eventually(scrape, within=30, what="metrics"))
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def exporter(self, other_than: int = 0) -> int:
        """Wait for the metrics process; return its pid."""

        def find() -> int:
            found = [pid for pid in children(self.pid) if process_title(pid) == TITLE and pid != other_than]
            return found[0] if found else 0

        return eventually(find, within=30, what="the metrics process")


@pytest.fixture
def metered() -> Iterator[Metered]:
    made = Metered()
    with made:
        yield made


def test_what_happens_is_counted_as_status_counts_it(metered: Metered) -> None:
    metered.start()
    metered.scraped()
    for _ in range(3):
        assert metered.lookup() == "blue"
    name = ("prefork_socketmap_replies_total", (("map", "colours"), ("status", "OK")))
    eventually(lambda: metered.scraped()[name] == 3, within=30, what="the lookups are counted")
    assert metered.scraped()["prefork_socketmap_up", ()] == 1
    told = {family.name for family in text_string_to_metric_families(metered.run("status", "--prometheus").stdout)}
    assert {family.name for family in text_string_to_metric_families(metered.scrape())} == told


def test_hits_of_a_cache_and_the_state_of_backends_are_told(metered: Metered) -> None:
    port = free_port()
    metered.configure(
        maps=f"""
[maps.colours]
type = "python"
path = ["."]
function = "cached_colours:lookup"
cache_ttl = "1h"

[maps.down]
type = "redis"
hosts = ["127.0.0.1:{port}"]
query = "GET %s"
"""
    )
    (metered.directory / "cached_colours.py").write_text('def lookup(key):\n    return "blue"\n')
    metered.start()
    assert [metered.lookup("colours", "sky") for _ in range(3)] == ["blue"] * 3
    with pytest.raises(TempFail):
        metered.lookup("down", "sky")
    hits = ("prefork_socketmap_cache_hits_total", (("map", "colours"),))
    up = ("prefork_socketmap_backend_up", (("backend", f"redis 127.0.0.1:{port}"),))
    eventually(lambda: metered.scraped().get(hits) == 2, within=30, what="the hits are counted")
    eventually(lambda: metered.scraped().get(up) == 0, within=30, what="the backend is down")
    shutil.rmtree(metered.runtime_dir)
    assert f"redis 127.0.0.1:{port}" in metered.run("status").stdout
    assert metered.scraped()[up] == 0


def test_it_can_do_nothing_but_read_and_answer(metered: Metered) -> None:
    metered.start()
    metered.scraped()
    pid = metered.exporter()
    status = process_status(pid)
    assert status["NoNewPrivs"] == ["1"]
    assert {int(status[name][0], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
    if os.geteuid() == 0:
        assert "0" not in status["Uid"]
        assert "0" not in status["Gid"]
    files = open_files(pid)
    (board,) = [number for number, name in files.items() if "scoreboard" in name]
    del files[board]
    assert not [name for name in files.values() if re.search(r"memfd|eventpoll|\.pid$", name)]
    flags = re.findall(r"^flags:\s+(\d+)", Path(f"/proc/{pid}/fdinfo/{board}").read_text(), re.MULTILINE)
    assert int(flags[0], 8) & os.O_ACCMODE == os.O_RDONLY
    assert "memory" not in Path(f"/proc/{pid}/environ").read_text()


def test_it_has_no_secret_of_the_server(metered: Metered) -> None:
    (metered.directory / "m.py").write_text("def f(key): return key\n")
    metered.start(env={"DATABASE_PASSWORD": "geheim"})
    assert b"geheim" not in Path(f"/proc/{metered.exporter()}/environ").read_bytes()


def test_its_death_is_noticed_and_mended_and_no_client_of_the_server_sees_it(metered: Metered) -> None:
    metered.start()
    metered.scraped()
    first = metered.exporter()
    os.kill(first, signal.SIGKILL)
    metered.logged("the metrics process was killed by signal 9; it is started again in 1 s")
    assert metered.lookup() == "blue"
    assert metered.exporter(other_than=first) != first
    metered.scraped()
    assert metered.state()["generation"] == 1


def test_a_reload_moves_it_and_one_that_is_refused_does_not(metered: Metered) -> None:
    metered.start()
    metered.scraped()
    first = metered.exporter()
    metered.configure("nonsense = 1")
    assert metered.run("reload").returncode == 1
    assert metered.run("reload").returncode == 1
    metered.scraped()
    assert metered.exporter() == first
    metered.configure()
    assert metered.run("reload").returncode == 0
    assert metered.exporter() == first  # there is no reason to start another
    metered.metrics_port = free_port()
    metered.configure()
    assert metered.run("reload").returncode == 0
    metered.scraped()
    assert metered.exporter(other_than=first)
    await_end(first, within=30)
    Installation.configure(metered)
    assert metered.run("reload").returncode == 0
    eventually(lambda: TITLE not in map(process_title, children(metered.pid)), within=30, what="it has gone")


def test_an_upgrade_takes_it_along(metered: Metered) -> None:
    metered.start()
    metered.scraped()
    first = metered.exporter()
    result = metered.run("upgrade")
    assert (result.returncode, result.stderr) == (0, "")
    assert metered.exporter(other_than=first)
    metered.scraped()
    eventually(lambda: not Path(f"/proc/{first}").exists(), within=30, what="the former one has been waited for")


def stop(metered: Metered) -> None:
    assert metered.run("stop").returncode == 0


def kill(metered: Metered) -> None:
    os.kill(metered.pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [stop, kill])
def test_it_ends_with_the_server(metered: Metered, end: Callable[[Metered], None]) -> None:
    metered.start()
    metered.scraped()
    pid = metered.exporter()
    end(metered)
    await_end(pid, within=30)


def test_a_port_in_use_is_told_and_costs_no_lookup(metered: Metered) -> None:
    with socket.create_server(("127.0.0.1", metered.metrics_port)):
        metered.start()
        metered.logged(
            f"metrics.listen: cannot serve metrics at 127.0.0.1:{metered.metrics_port}: Address already in use"
        )
        assert metered.lookup() == "blue"
    metered.scraped()  # it is tried again


def test_clients_that_say_nothing_keep_nobody_from_the_server_and_are_hung_up_on(metered: Metered) -> None:
    metered.start()
    metered.scraped()
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", metered.metrics_port)
        silent = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(MOST_CLIENTS)]
        for each in silent:
            each.sendall(b"GET / HTT")

        def is_hung_up_on() -> bool:
            with socket.create_connection(address, 30) as newer, contextlib.suppress(ConnectionResetError):
                newer.settimeout(0.5)
                try:
                    return newer.recv(1) == b""
                except TimeoutError:
                    return False
            return True

        eventually(is_hung_up_on, within=30, what="one too many is hung up on")
        assert metered.lookup() == "blue"
        for each in silent:
            with contextlib.suppress(ConnectionResetError):
                each.recv(65536)  # ends when its time is over
    metered.scraped()


@pytest.mark.parametrize("listen", ["", "example.org:1", "127.0.0.1:0", "127.0.0.1:x", "127.0.0.1:99999", "unix:/x"])
def test_a_wrong_address_is_an_error_with_its_key(metered: Metered, listen: str) -> None:
    Installation.configure(metered)
    with metered.config.open("a") as file:
        file.write(f"\n[metrics]\nlisten = {json.dumps(listen)}\n")
    with pytest.raises(SettingError, match=r"metrics\.listen: "):
        configfile.load(metered.config)


# Maps with all that is told only where there is something to tell.
EVERYTHING = """
[maps.cached]
type = "redis"
hosts = ["unix:/nobody"]
query = "GET %s"
cache_ttl = "1h"

[maps.bounces]
type = "srs"
direction = "reverse"
secret_file = "secrets"
"""


def test_the_board_for_grafana_shows_metrics_that_there_are(metered: Metered) -> None:
    board = json.loads((ETC / "grafana/prefork-socketmap.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    used = {name for each in expressions for name in re.findall(r"\bprefork_socketmap_\w+", each)}
    assert len(used) > 10
    secrets = metered.directory / "secrets"
    secrets.write_text("secret\n")
    secrets.chmod(0o600)
    metered.configure(maps=EVERYTHING)
    metered.start()
    assert metered.lookup("bounces", "SRS0=nonsense@example.com") is None
    with pytest.raises(TempFail):
        metered.lookup("cached")

    def shown() -> set[str]:
        return {name for name, _ in metered.scraped()}

    eventually(lambda: used <= shown(), within=30, what="all metrics that the board shows")
