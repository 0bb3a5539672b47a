"""A file of a million lines is replaced under a server at work: nobody waits for it, and memory holds two tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from prefork_socketmap.client import SocketmapClient
from tests.daemon.installation import Installation
from tests.processes import children, process_title
from tests.waiting import eventually

LINES = 1_000_000
WORKERS = 8
LIMITS = f"process_limit = {WORKERS}\nlookup_timeout = 1\n"
SLACK = 0.15
"""For what the server's processes do meanwhile, in tables."""
MAP = '[maps.users]\ntype = "file"\npath = "users"\nindex_dir = "index"\n'


def write(path: Path, value: str) -> None:
    """Replace *path* by a million lines, each with *value* in it."""
    new = path.with_suffix(".new")
    with new.open("w") as lines:
        lines.writelines(
            f"user{number}@example.com\tbox{number}.{value}@mail.example.net\n" for number in range(LINES)
        )
    new.replace(path)


def processes(master: int) -> Iterator[int]:
    """Iterate over a server's processes, those that its workers have forked included."""
    yield master
    with contextlib.suppress(OSError):
        for child in children(master):
            yield from processes(child)


def reader(master: int) -> int:
    """Return the process that reads a file, or 0."""
    with contextlib.suppress(OSError):
        return next((pid for pid in processes(master) if "reader of" in process_title(pid)), 0)
    return 0


def memory(master: int, directory: Path) -> int:
    """Return the bytes that a server's processes have, in memory and in the files of *directory* they have open."""
    total = 0
    files = {}
    for pid in processes(master):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()).startswith(str(directory)):
                        status = link.stat()
                        files[status.st_ino] = 512 * status.st_blocks
    return total + sum(files.values())


def test_a_million_lines_are_replaced_and_no_lookup_waits_and_memory_holds_two_tables(
    installation: Installation,
) -> None:
    source, indexes = installation.directory / "users", installation.directory / "index"
    write(source, "0")
    installation.configure(LIMITS, maps=MAP)
    # From the first to the last as many, or their memory would be counted, too.
    installation.config.write_text(installation.config.read_text().replace("min_spare = 2", f"min_spare = {WORKERS}"))
    installation.start()
    eventually(lambda: len(installation.idle_workers()) == WORKERS, within=60, what="all workers")
    master = installation.pid
    table = sum(path.stat().st_size for path in indexes.iterdir())
    assert table > 50 * LINES
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(SocketmapClient(installation.endpoint)) for _ in range(WORKERS)]

        def answers() -> set[str | None]:
            return {client.lookup("users", "user7@example.com") for client in clients}

        for value in range(2):
            old, new = (f"box7.{number}@mail.example.net" for number in (value, value + 1))
            assert answers() == {old}
            resting = peak = memory(master, indexes)
            write(source, str(value + 1))
            meanwhile = 0
            while (found := answers()) != {new}:
                # A lookup that fails raises, and one that takes a second fails.
                assert found <= {old, new}
                meanwhile += bool(reader(master))
                peak = max(peak, memory(master, indexes))
            assert meanwhile > 10, "the lookups have waited for the reader"
            assert peak - resting <= 1.2 * table + SLACK * table, f"{1 + (peak - resting) / table:.2f} x the table"
            eventually(lambda: not reader(master), within=30, what="the reader's end")
