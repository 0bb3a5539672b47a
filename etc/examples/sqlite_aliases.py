"""Aliases in an SQLite database, which each worker has a connection of its own to.

    python sqlite_aliases.py

Needs ``mail.sqlite``, or what the environment variable DATABASE names, with a table ``aliases`` of ``address`` and
``destination``. In main.cf: ``virtual_alias_maps = socketmap:inet:127.0.0.1:27823:aliases``
"""

import os
import sqlite3

from prefork_socketmap import Server

server = Server()


@server.on_worker_start
def connect():
    """Open the database: after the fork, since processes must not share a connection."""
    global database
    database = sqlite3.connect(f"file:{os.environ.get('DATABASE', 'mail.sqlite')}?mode=ro", uri=True)


@server.on_worker_stop
def disconnect():
    """Close it."""
    database.close()


@server.map("aliases")
def aliases(key):
    """Return all destinations of an address."""
    rows = database.execute("SELECT destination FROM aliases WHERE address = ?", [key.lower()])
    return ",".join(destination for (destination,) in rows) or None


if __name__ == "__main__":
    server.listen_and_serve()
