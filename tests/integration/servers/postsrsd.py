"""A private PostSRSd, of whichever version is installed: 1.x speaks tcp_table(5), 2.x socketmap."""

from __future__ import annotations

import re
import socket
import subprocess
from io import BufferedRWPair
from urllib.parse import quote, unquote

from prefork_socketmap.client import SocketmapClient
from tests.integration.servers.process import Server, answers_at, free_port, program


class PostSrsd(Server):
    """It rewrites to *domain* with the first of *secrets*. ``port`` is that of the forward direction.

    Version 1.x has another port for the reverse direction, 2.x one for both.
    """

    def __init__(self, domain: str, secrets: list[str], hash_length: int = 4, separator: str = "=") -> None:
        super().__init__()
        self._program = program("postsrsd", "postsrsd")
        said = subprocess.run([self._program, "-v"], capture_output=True, text=True, check=False)
        self.version = tuple(map(int, re.findall(r"\d+", said.stdout + said.stderr)[:3]))
        self.writes_for_urls = self.version >= (2, 2, 6)
        """Whether its hashes are in the alphabet for URLs."""
        self.speaks_socketmap = self.version >= (2,)
        self.reverse_port = self.port if self.speaks_socketmap else free_port()
        self._secrets = self.directory / "secrets"
        self._secrets.write_text("".join(f"{secret}\n" for secret in secrets))
        self._secrets.chmod(0o600)
        self._options = [f"-d{domain}", f"-n{hash_length}", f"-a{separator}"]
        self._conf = f"""
srs-domain = "{domain}"
secrets-file = "{self._secrets}"
hash-length = {hash_length}
separator = "{separator}"
unprivileged-user = ""
chroot-dir = ""
"""

    def command(self) -> list[str]:
        if self.speaks_socketmap:
            file = self.directory / "postsrsd.conf"
            file.write_text(f"{self._conf}socketmap = inet:127.0.0.1:{self.port}\n")
            return [self._program, "-C", str(file)]
        return [self._program, f"-s{self._secrets}", f"-f{self.port}", f"-r{self.reverse_port}", *self._options]

    def is_ready(self) -> bool:
        return answers_at(self.port) and answers_at(self.reverse_port)

    def forward(self, *addresses: str) -> list[str | None]:
        """Return what it makes of *addresses*; None for what stays."""
        return self._ask("forward", self.port, addresses)

    def reverse(self, *addresses: str) -> list[str | None]:
        """Return what *addresses* were made of; None for what is not undone."""
        return self._ask("reverse", self.reverse_port, addresses)

    def _ask(self, name: str, port: int, addresses: tuple[str, ...]) -> list[str | None]:
        if self.speaks_socketmap:
            with SocketmapClient(f"inet:127.0.0.1:{port}") as client:
                return [client.lookup(name, address) for address in addresses]
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
            connection.makefile("rwb") as file,
        ):
            return [self._ask_tcp_table(file, address) for address in addresses]

    @staticmethod
    def _ask_tcp_table(file: BufferedRWPair, address: str) -> str | None:
        file.write(b"get %s\n" % quote(address, safe="@=+").encode())
        file.flush()
        code, _, text = file.readline().decode().rstrip("\n").partition(" ")
        return unquote(text) if code == "200" else None
