"""This server: maps that are Python functions over a dict. Its Config is the second argument, as JSON."""

import json
import sys

from prefork_socketmap import Config, Server
from tests.bench.servers.table import ENTRIES, MAP, SLOW


def main(port: int, config: Config) -> None:
    """Serve on *port* until a signal stops the server."""
    server = Server(config)
    server.register_map(MAP, ENTRIES.get)
    for name, function in SLOW.items():
        server.register_map(name, function)
    server.listen_and_serve(f"127.0.0.1:{port}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Config(**json.loads(sys.argv[2])))
