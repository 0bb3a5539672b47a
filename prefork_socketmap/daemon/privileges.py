"""Users and groups: whom workers run as, and how a process becomes that account for good."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from prefork_socketmap.settings import SettingError


def find_user(key: str, name: str) -> pwd.struct_passwd:
    """Return the entry of the user *name*, or of the number; SettingError at *key* when there is none."""
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise SettingError(key, f"there is no user {name!r}") from None


def find_group(key: str, name: str) -> grp.struct_group:
    """Return the entry of the group *name*, or of the number; SettingError at *key* when there is none."""
    try:
        return grp.getgrgid(int(name)) if name.isdecimal() else grp.getgrnam(name)
    except KeyError:
        raise SettingError(key, f"there is no group {name!r}") from None


@dataclass(frozen=True)
class Account:
    """A user with the groups that its processes have."""

    user: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def find(cls, user: str, group: str | None) -> Account:
        """Look *user* up, with *group* or else its own as the primary group. Raises SettingError."""
        entry = find_user("user", user)
        gid = entry.pw_gid if group is None else find_group("group", group).gr_gid
        return cls(entry.pw_name, entry.pw_uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)), entry.pw_dir)

    def assume(self) -> None:
        """Make this process run as the account. There is no way back. Raises SettingError when that is not allowed.

        A process that runs as the user already, as under systemd's ``User=``, is left as it is.
        """
        if os.geteuid() == self.uid:
            return
        try:
            os.setgroups(self.groups)
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
        except PermissionError as error:
            raise SettingError("user", f"only root can run workers as {self.user!r}, and this is not root") from error
        # Client libraries look into the home directory for their settings (libpq for ~/.postgresql), and fail if
        # they may not read it.
        os.environ.update(HOME=self.home, USER=self.user, LOGNAME=self.user)
