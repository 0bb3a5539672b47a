"""The codec alone, in a server that is nothing but asyncio: for programs that serve in a way of their own."""

import asyncio
import sys

from prefork_socketmap.socketmap.messages import MalformedRequestError, Reply, Request
from prefork_socketmap.socketmap.netstring import Decoder, FramingError, encode


def answer(payload):
    """Return the payload of the reply to a request's."""
    request = Request.decode(payload)
    found = request == ("domains", "example.com")
    return (Reply.ok("found") if found else Reply.not_found()).encode(max_size=100_000)


async def serve(reader, writer):
    """Answer the requests of one connection, in order."""
    decoder = Decoder(max_size=100_000)
    try:
        while data := await reader.read(65536):
            decoder.feed(data)
            while (payload := decoder.next()) is not None:
                writer.write(encode(answer(payload)))
            await writer.drain()
    except (FramingError, MalformedRequestError):
        writer.write(encode(Reply.perm_fail("malformed request").encode()))
    finally:
        writer.close()


async def main(port):
    """Serve on a port of this machine, for ever."""
    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 27823))
