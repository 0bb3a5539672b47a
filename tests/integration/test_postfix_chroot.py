"""A chrooted Postfix, as on Debian: the socket lies in its queue directory, and main.cf names it from there."""

from __future__ import annotations

from prefork_socketmap import Server
from tests.integration.postfix import Postfix


def test_a_chrooted_postfix_finds_a_socket_in_its_queue_directory() -> None:
    server = Server()
    server.register_map("domains", {"example.com": "found"}.get)
    with Postfix({"virtual_mailbox_domains": "socketmap:unix:answers/socket:domains"}, chroot=True) as postfix:
        (postfix.queue_directory / "answers").mkdir()
        server.listen(f"unix:{postfix.queue_directory}/answers/socket")
        with server.start():
            postfix.start()
            with postfix.transaction() as session:
                assert session.try_recipient("user@example.com")[0] == 250
                assert session.try_recipient("user@elsewhere.test")[0] == 554
