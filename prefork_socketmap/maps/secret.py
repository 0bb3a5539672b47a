"""Passwords and tokens: from the configuration, a file or the environment, and never in a log or an error."""

from __future__ import annotations

import os
from pathlib import Path

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map
from prefork_socketmap.socketmap.messages import to_text


def secret(key: str, value: object) -> str:
    """Read a setting: a string that is not empty. Unlike other readers, this one does not say what it has found."""
    if isinstance(value, str) and value:
        return value
    raise settings.SettingError(key, "expected a string that is not empty")


class Secret:
    """What stands in the setting *setting* of *table*, in the file ``SETTING_file``, or the variable ``SETTING_env``.

    The map declares the three settings. Raises SettingError when more than one of them is used, or the named file or
    variable is not there, at construction.
    """

    def __init__(self, table: Map, setting: str) -> None:
        self._key = f"maps.{table.name}.{setting}"
        self._value: str = getattr(table, setting)
        file: str = getattr(table, f"{setting}_file")
        variable: str = getattr(table, f"{setting}_env")
        if sum(map(bool, (self._value, file, variable))) > 1:
            raise settings.SettingError(self._key, f"only one of {setting}, {setting}_file and {setting}_env can be")
        if variable:
            if variable not in os.environ:
                raise settings.SettingError(f"{self._key}_env", "the environment has no such variable")
            self._value = os.environ[variable]
        self._file: Path | None = table.base / file if file else None
        try:
            self.read()
        except OSError as error:
            # Not its name: who has mistaken the key for that of the secret itself has written the secret there.
            raise settings.SettingError(f"{self._key}_file", f"cannot read the file: {error.strerror}") from None

    def read(self) -> str:
        """Return the secret; "" when there is none. The file is read anew: who changes it need not reload.

        Raises OSError when it cannot be read.
        """
        return self._value if self._file is None else to_text(self._file.read_bytes()).rstrip("\r\n")
