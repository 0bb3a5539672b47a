"""What the command ``install`` puts where: the files that the package ships, led to the program that runs it.

What nobody changes by hand goes below ``/usr/local``, where packages of the distribution never write: systemd and
sysusers.d look there, and changes have their places in ``/etc``. There go the configuration and the init script.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefork_socketmap.settings import SettingError

ACCOUNT = "prefork-socketmap"
COMMAND = Path("/usr/local/bin/prefork-socketmap")
"""What units, the init script and an administrator call."""
CONFIG = Path("/etc/prefork-socketmap")
SYSUSERS = Path("/usr/local/lib/sysusers.d/prefork-socketmap.conf")
TMPFILES = Path("/usr/local/lib/tmpfiles.d/prefork-socketmap.conf")
UNITS = Path("/usr/local/lib/systemd/system")
SOCKET_DIRECTORY = Path("/var/spool/postfix/socketmap")

_SHIPPED_COMMAND = b"/usr/bin/prefork-socketmap"
_SAMPLES = ("prefork-socketmap.toml", "sample.aliases", "sample.py")


@dataclass(frozen=True)
class Item:
    """A file at *path*, absolute on the machine, with *content*; a link with it as its target."""

    path: Path
    content: bytes
    mode: int = 0o644
    is_config: bool = False
    """Whether it is the server's group that may read it, and nobody else."""
    is_link: bool = False


@dataclass(frozen=True)
class Source:
    """Where the files are that the package ships."""

    etc: Path
    man: Path

    @classmethod
    def find(cls) -> Source:
        """Find them: in the clone that this program runs from, or where pip has put them. Raises SettingError."""
        data = Path(sysconfig.get_path("data"), "share")
        clone = Path(__file__).parents[2]
        for source in (cls(clone / "etc", clone / "man"), cls(data / "prefork-socketmap", data / "man")):
            if (source.etc / _SAMPLES[0]).is_file():
                return source
        raise SettingError("", f"there is nothing to install in {data}; what a package of Debian brings is in place")


def system_files(source: Source, program: Path, *, systemd: bool) -> Iterator[Item]:
    """Iterate over what is not configuration."""
    yield Item(COMMAND, bytes(program), is_link=True)
    for page in sorted(source.man.rglob("prefork[-_]socketmap*.[1-8]")):
        yield Item(Path("/usr/local/share/man", f"man{page.suffix[1:]}", page.name), page.read_bytes())
    if not systemd:
        yield Item(Path("/etc/init.d/prefork-socketmap"), _led(source.etc / "init.d/prefork-socketmap"), 0o755)
        return
    yield Item(SYSUSERS, (source.etc / "sysusers.d/prefork-socketmap.conf").read_bytes())
    yield Item(TMPFILES, (source.etc / "tmpfiles.d/prefork-socketmap.conf").read_bytes())
    for unit in sorted((source.etc / "systemd").iterdir()):
        yield Item(UNITS / unit.name, _led(unit))


def config_files(source: Source) -> Iterator[Item]:
    """Iterate over the configuration; its workers run as the account that ``install`` makes."""
    for name in _SAMPLES:
        content = (source.etc / name).read_bytes()
        if name == _SAMPLES[0]:
            content = re.sub(rb'^#(?=(?:user|group) = "prefork-socketmap"$)', b"", content, flags=re.MULTILINE)
        yield Item(CONFIG / name, content, 0o640, is_config=True)


def _led(path: Path) -> bytes:
    return path.read_bytes().replace(_SHIPPED_COMMAND, bytes(COMMAND))
