"""Runs on a machine: asks a server again and again, over one connection and over new ones, until its input ends.

It prints how often it has asked, and then each answer that was not the right one, and each connection that was lost.
Nothing of the package is imported: it may be replaced meanwhile.
"""

import select
import socket
import sys

ENDPOINT = ("127.0.0.1", 27823)
AT_LEAST = 20
QUESTION, ANSWER = b"aliases info@example.com", b"OK alice@example.com"


def netstring(payload: bytes) -> bytes:
    return b"%d:%s," % (len(payload), payload)


def ask(connection: socket.socket) -> None:
    connection.sendall(netstring(QUESTION))
    wanted = netstring(ANSWER)
    received = b""
    while len(received) < len(wanted):
        data = connection.recv(len(wanted) - len(received))
        if not data:
            raise ConnectionResetError("closed")
        received += data
    if received != wanted:
        raise ValueError(received)


def main() -> None:
    asked, problems = 0, []
    lasting = socket.create_connection(ENDPOINT, timeout=30)
    ask(lasting)
    print("asking", flush=True)
    while asked < AT_LEAST or not select.select([sys.stdin], [], [], 0.005)[0]:
        for is_lasting in (True, False):
            try:
                if is_lasting:
                    ask(lasting)
                else:
                    with socket.create_connection(ENDPOINT, timeout=30) as connection:
                        ask(connection)
            except (OSError, ValueError) as error:
                problems.append(f"{'lasting' if is_lasting else 'new'}: {error!r}")
                if is_lasting:
                    lasting = socket.create_connection(ENDPOINT, timeout=30)
            asked += 1
    print(asked, *problems, sep="\n")


main()
