"""What ``install`` has made on a machine: kept beside it, for the next ``install`` and for ``uninstall``.

A file whose content is still what was put there is the package's, to be replaced or removed; any other is the
administrator's by now.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from prefork_socketmap.daemon import newfile
from prefork_socketmap.settings import SettingError

PLACE = Path("var/lib/prefork-socketmap.installed.json")
"""Not in /var/lib/prefork-socketmap: that is the workers', and root does what stands here."""


def digest(content: bytes) -> str:
    """Return what a content is known by."""
    return hashlib.sha256(content).hexdigest()


def content_of(path: Path) -> bytes | None:
    """Return what is at *path*, of a link its target; None when nothing is. Raises OSError."""
    if path.is_symlink():
        return bytes(path.readlink())
    return path.read_bytes() if path.exists() else None


@dataclass
class Manifest:
    """Digests of files by path; directories; whether the account was made. Paths are those on the machine."""

    files: dict[str, str] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    account: bool = False

    @classmethod
    def read(cls, prefix: Path) -> Self:
        """Read the one of *prefix*; an empty one, when nothing was installed. Raises SettingError."""
        path = prefix / PLACE
        try:
            return cls(**json.loads(newfile.read(path)))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise SettingError(str(path), f"is not what install has written: {error}") from error

    def write(self, prefix: Path) -> None:
        """Write it. Raises OSError."""
        (prefix / PLACE).parent.mkdir(parents=True, exist_ok=True)
        newfile.write(prefix / PLACE, json.dumps(asdict(self), indent=1) + "\n")

    def remove(self, prefix: Path) -> None:
        """Remove it."""
        (prefix / PLACE).unlink(missing_ok=True)

    def has(self, path: Path, content: bytes | None) -> bool:
        """Whether *content* is what was put at *path*."""
        return content is not None and self.files.get(str(path)) == digest(content)
