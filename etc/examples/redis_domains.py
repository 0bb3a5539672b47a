"""Domains in a set of a Redis server.

    REDIS_URL=redis://127.0.0.1:6379/0 python redis_domains.py

In main.cf: ``virtual_mailbox_domains = socketmap:inet:127.0.0.1:27823:domains``
"""

import os

import redis

from prefork_socketmap import Config, Server

server = Server(Config(lookup_timeout="10s"))


@server.on_worker_start
def connect():
    """Make a client for this worker; with an error here the server would not start."""
    global client
    client = redis.Redis.from_url(
        os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), socket_timeout=5, socket_connect_timeout=5
    )
    client.ping()


@server.map("domains")
def domains(key):
    """Tell whether a domain is ours. An exception, when the server is away, is TEMP: Postfix defers the mail."""
    return "found" if client.sismember("domains", key.lower()) else None


if __name__ == "__main__":
    server.listen_and_serve()
