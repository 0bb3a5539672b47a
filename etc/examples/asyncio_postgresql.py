"""Coroutines as maps: a pool of connections to PostgreSQL in the event loop of each worker.

    DSN=postgresql://postfix@127.0.0.1/mail python asyncio_postgresql.py

In main.cf: ``virtual_alias_maps = socketmap:inet:127.0.0.1:27823:aliases``
"""

import os

import asyncpg

from prefork_socketmap import Config, Server

server = Server(Config(lookup_timeout=10))


@server.on_worker_start
async def connect():
    """Make the pool, in the loop that the lookups will run in."""
    global pool
    pool = await asyncpg.create_pool(os.environ.get("DSN"), min_size=1, max_size=1)


@server.on_worker_stop
async def disconnect():
    """Close it, while the loop is still there."""
    await pool.close()


@server.map("aliases")
async def aliases(key):
    """Return all destinations of an address. After lookup_timeout this is cancelled, and so is the query."""
    rows = await pool.fetch("SELECT goto FROM alias WHERE address = $1", key.lower())
    return ",".join(row["goto"] for row in rows) or None


if __name__ == "__main__":
    server.listen_and_serve()
