"""Baseline: a thread per connection, with nothing but the standard library's socketserver."""

import socketserver
import sys

from tests.bench.servers.table import ENTRIES, MAP


class Handler(socketserver.StreamRequestHandler):
    """Answers one client until it hangs up."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Read requests and write replies."""
        while (payload := self.read_netstring()) is not None:
            name, _, key = payload.decode().partition(" ")
            value = ENTRIES.get(key) if name == MAP else None
            reply = b"NOTFOUND " if value is None else b"OK " + value.encode()
            self.wfile.write(b"%d:%b," % (len(reply), reply))

    def read_netstring(self) -> bytes | None:
        """Return the next payload, or None at the end."""
        length = b""
        while (digit := self.rfile.read(1)) != b":":
            if not digit.isdigit():
                return None
            length += digit
        payload = self.rfile.read(int(length) + 1)
        return payload[:-1] if payload.endswith(b",") else None


class Server(socketserver.ThreadingTCPServer):
    """A thread per connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4096


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
