"""TLS policy by hand: to which domains Postfix may send over a verified connection only.

    python tls_policy.py

In main.cf: ``smtp_tls_policy_maps = socketmap:inet:127.0.0.1:27823:tls``

Postfix asks for the next hop: the recipient's domain, and then each domain above it with a dot before it
(``mail.example.com``, ``.example.com``, ``.com``); or what transport(5) names, as it is (``[mail.example.com]:587``).
See smtp_tls_policy_maps in postconf(5) for the answers.
"""

from prefork_socketmap import Reply, Server

POLICY = {
    "example.com": "secure match=.example.net:example.net",
    "[mail.example.org]:587": "verify",
    ".bank.example": "dane-only",  # whatever lies below it
    "old.example": "may",
}
LEVELS = {"none", "may", "encrypt", "dane", "dane-only", "fingerprint", "verify", "secure"}

server = Server()


@server.map("tls")
def tls(key):
    """Return the policy for a next hop. With a wrong one nothing is sent: better than to send it in the clear."""
    policy = POLICY.get(key.lower())
    if policy and policy.split()[0] not in LEVELS:
        return Reply.perm_fail("there is no such security level")
    return policy


if __name__ == "__main__":
    server.listen_and_serve()
