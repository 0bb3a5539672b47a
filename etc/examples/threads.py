"""A program with other things to do: it serves in a thread, and takes in a new map while it does.

python threads.py
"""

import sys
import threading

from prefork_socketmap import Server, StartError

server = Server()


@server.map("domains")
def domains(key):
    """Tell whether a domain is ours."""
    return "found" if key.lower() == "example.com" else None


def main(endpoint):
    """Serve at *endpoint* until a line is read that says so."""
    server.listen(endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for line in sys.stdin:
        name, _, value = line.strip().partition(" ")
        if name == "stop":
            break
        try:
            # New workers that know it prove themselves before those that do not leave.
            server.register_map(name, {"key": value}.get)
            print(f"{name} is served", flush=True)
        except (ValueError, StartError) as error:
            print(error, flush=True)
    server.shutdown()
    thread.join()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "inet:127.0.0.1:27823")
