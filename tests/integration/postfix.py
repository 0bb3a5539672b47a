"""A private Postfix: its own configuration, queue, log and port in one directory. The system's is left alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import smtplib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from tests.integration.servers.process import free_port, program, unavailable
from tests.waiting import eventually

_MAIN = {
    "compatibility_level": "3.6",
    "mail_owner": "postfix",
    "setgid_group": "postdrop",
    "myhostname": "mail.example.test",
    "inet_interfaces": "127.0.0.1",
    "inet_protocols": "ipv4",
    "disable_dns_lookups": "yes",
    "smtpd_peername_lookup": "no",
    "smtpd_client_connection_count_limit": "0",
    "smtpd_relay_restrictions": "permit_mynetworks, reject_unauth_destination",
    # Nobody is local and nobody may relay, unless the test says so; mail for a virtual mailbox is thrown away.
    "mynetworks": "",
    "mydestination": "",
    "alias_maps": "",
    "alias_database": "",
    "virtual_alias_domains": "",
    "virtual_transport": "discard:",
    # A Postfix that does not get its own way at once shall not make a test wait.
    "smtpd_error_sleep_time": "0",
    "notify_classes": "",
}

# master(5). Debian chroots the programs that "{chroot}" is for.
_MASTER = """\
127.0.0.1:{port} inet n - {chroot} - - smtpd
cleanup  unix n - {chroot} - 0 cleanup
qmgr     unix n - n 300 1 qmgr
rewrite  unix - - {chroot} - - trivial-rewrite
proxymap unix - - n - - proxymap
bounce   unix - - n - 0 bounce
defer    unix - - n - 0 bounce
trace    unix - - n - 0 bounce
smtp     unix - - {chroot} - - smtp
tlsmgr   unix - - n 1000? 1 tlsmgr
discard  unix - - n - - discard
error    unix - - n - - error
retry    unix - - n - - error
showq    unix n - n - - showq
postlog  unix-dgram n - n - 1 postlogd
"""


class Session(smtplib.SMTP):
    """A client's session with smtpd(8)."""

    def __init__(self, port: int) -> None:
        # The longest that Postfix waits for a lookup is 100 s.
        super().__init__("127.0.0.1", port, local_hostname="client.example.test", timeout=150)

    def try_recipient(self, address: str) -> tuple[int, str]:
        """Say RCPT TO; return the code and the text of the answer."""
        code, text = self.rcpt(address)
        return code, text.decode()

    def deliver(self, recipient: str) -> str:
        """Send a mail; return its queue id."""
        code, text = self.try_recipient(recipient)
        assert code == 250, text
        code, answer = self.data("Subject: hello\r\n\r\nhello\r\n")
        assert code == 250, answer
        return answer.decode().rpartition(" ")[2]


class Postfix:
    """A Postfix of its own, set up when it is made and started by ``start``. ``close`` stops and removes it.

    *main* are main.cf's parameters beyond those that every instance needs. With *chroot*, smtpd(8) and others see
    no file outside ``queue_directory``.
    """

    def __init__(self, main: Mapping[str, str], *, chroot: bool = False) -> None:
        self._postfix = program("postfix", "postfix")
        if os.geteuid() != 0:
            unavailable("only root can start Postfix: run the tests as root")
        self.port = free_port()
        # Not pytest's directory: Postfix's processes, which run as user postfix, could not get into that.
        self.directory = Path(tempfile.mkdtemp(prefix="socketmap-postfix-"))
        self.directory.chmod(0o755)
        self._etc = self.directory / "etc"
        self.queue_directory = self.directory / "queue"
        self._log = self.directory / "mail.log"
        self._log.touch()
        self._configure(main, chroot)

    def _configure(self, main: Mapping[str, str], chroot: bool) -> None:
        for name in ("etc", "queue", "data"):
            (self.directory / name).mkdir()
        shutil.chown(self.directory / "data", "postfix")
        places = {
            "queue_directory": str(self.queue_directory),
            "data_directory": f"{self.directory}/data",
            "maillog_file": str(self._log),
            "maillog_file_prefixes": str(self.directory),
        }
        parameters = _MAIN | places | dict(main)
        (self._etc / "main.cf").write_text("".join(f"{name} = {value}\n" for name, value in parameters.items()))
        services = _MASTER.format(port=self.port, chroot="y" if chroot else "n")
        (self._etc / "master.cf").write_text(services)

    def set(self, main: Mapping[str, str]) -> None:
        """Set more parameters of main.cf."""
        for name, value in main.items():
            self._run(program("postconf", "postfix"), "-c", self._etc, "-e", f"{name}={value}")

    def start(self) -> None:
        """Start Postfix; its port is open when this returns."""
        self._run(self._postfix, "-c", self._etc, "start")

    def reload(self) -> None:
        """Have all processes but the master replaced by new ones, which remember nothing."""
        self._run(self._postfix, "-c", self._etc, "reload")

    def smtp(self) -> Session:
        """Return a new SMTP session, a context manager."""
        return Session(self.port)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open an SMTP session in which a sender is accepted, so that recipients may follow."""
        with self.smtp() as session:
            session.ehlo()
            assert session.mail("sender@client.example.test")[0] == 250
            yield session

    def postmap(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run postmap(1) with *arguments*; Postfix need not be started. The result has its output as bytes."""
        command = [program("postmap", "postfix"), "-c", str(self._etc), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=150)

    def log(self) -> str:
        """Return the mail log so far."""
        return self._log.read_text(errors="replace")

    def complaints(self) -> list[str]:
        """Return the lines of the mail log so far that warn, or tell of a lookup error."""
        return [line for line in self.log().splitlines() if _is_complaint(line)]

    def clear_log(self) -> None:
        """Forget the mail log so far."""
        self._log.write_text("")

    def logged(self, *texts: str, within: float = 30) -> str:
        """Wait for a line of the mail log that has all *texts*, and return it."""

        def line() -> str:
            found = next((line for line in self.log().splitlines() if all(text in line for text in texts)), "")
            assert found, f"no line with {texts} in\n{self.log()}"
            return found

        return eventually(line, within)

    def queue(self) -> str:
        """Return the mails in the queue, a JSON object in each line; nothing when all mail is gone."""
        return self._run(program("postqueue", "postfix"), "-c", self._etc, "-j")

    def close(self) -> None:
        """Stop Postfix and remove everything."""
        with contextlib.suppress(FileNotFoundError):
            master = int((self.queue_directory / "pid/master.pid").read_text())
            with contextlib.suppress(ProcessLookupError):
                # It is the leader of a group, and on TERM passes the signal on to all of it.
                os.kill(master, signal.SIGTERM)
            eventually(lambda: not _is_running(master), what="Postfix is gone")
        shutil.rmtree(self.directory)

    def __enter__(self) -> Postfix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, *command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done.stdout


def _is_complaint(line: str) -> bool:
    # Linux since 6.13 takes the times of files from a finer clock than time(3): at the turn of a second, they differ.
    of_the_clock = "file system clock is" in line or "resetting file time stamps" in line
    return ("warning:" in line or "lookup error" in line) and not of_the_clock


def _is_running(group: int) -> bool:
    """Whether a process of *group* runs. One that has ended may stay a zombie: nobody here can wait for it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False
