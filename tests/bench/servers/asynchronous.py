"""Baseline: one event loop for all connections, with nothing but the standard library's asyncio."""

import asyncio
import contextlib
import sys

from tests.bench.servers.table import ENTRIES, MAP


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one client until it hangs up."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            length = await reader.readuntil(b":")
            payload = await reader.readexactly(int(length[:-1]) + 1)
            name, _, key = payload[:-1].decode().partition(" ")
            value = ENTRIES.get(key) if name == MAP else None
            reply = b"NOTFOUND " if value is None else b"OK " + value.encode()
            writer.write(b"%d:%b," % (len(reply), reply))
            await writer.drain()
    writer.close()


async def serve(port: int) -> None:
    """Serve on *port* until the process is killed."""
    server = await asyncio.start_server(handle, "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
