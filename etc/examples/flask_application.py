"""A Flask application whose process serves Postfix beside the browser.

    python flask_application.py

The server's workers are processes of their own, so that what they answer from has to be somewhere else: here, in an
SQLite database, which the application writes and the maps read.
"""

import os
import sqlite3

from flask import Flask, request

from prefork_socketmap import Server

application = Flask(__name__)
server = Server()


def database():
    """Open the database, and make it if it is not there yet."""
    connection = sqlite3.connect(os.environ.get("DATABASE", "domains.sqlite"), isolation_level=None)
    connection.execute("CREATE TABLE IF NOT EXISTS domains (name TEXT PRIMARY KEY)")
    return connection


@application.put("/domains/<name>")
def add(name):
    """Take in a domain."""
    database().execute("INSERT OR IGNORE INTO domains VALUES (?)", [name.lower()])
    return "", 204


@application.get("/status")
def status():
    """Tell where Postfix finds us."""
    return {"endpoints": running.endpoints, "client": request.remote_addr}


@server.on_worker_start
def connect():
    """Open the database for this worker."""
    global connection
    connection = database()


@server.map("domains")
def domains(key):
    """Tell whether a domain is ours."""
    return "found" if connection.execute("SELECT 1 FROM domains WHERE name = ?", [key.lower()]).fetchone() else None


if __name__ == "__main__":
    server.listen(os.environ.get("ENDPOINT", "inet:127.0.0.1:27823"))
    with server.start() as running:  # it ends with this process, however that ends
        application.run(port=int(os.environ.get("PORT", "5000")))
