"""A sample map for prefork-socketmap.toml: a function that takes the key and returns the value, or None."""

from __future__ import annotations


def transport(key: str) -> str | None:
    """Deliver mail for example.net, whoever it is for, through a host of its own."""
    _user, _at, domain = key.rpartition("@")
    # Postfix asks for transports with the letters as they were typed.
    return "smtp:[mail.example.net]" if domain.lower() == "example.net" else None
