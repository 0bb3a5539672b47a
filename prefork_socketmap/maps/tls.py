"""The TLS settings of the map types whose drivers use Python's ssl module, named as in mysql_table(5)."""

from __future__ import annotations

import ssl

from prefork_socketmap import settings
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.setting import setting


class TlsSettings(Map):
    """A base class for the map types; ``uses_tls`` tells whether any of the settings asks for TLS."""

    tls = setting(settings.boolean, False)
    """Whether to speak TLS. Any of the files below implies it."""
    tls_CAfile = setting(settings.text, "")  # noqa: N815 - Postfix's name
    """Certificates, in PEM, of the authorities that are believed. Default: the system's."""
    tls_CApath = setting(settings.text, "")  # noqa: N815
    """A directory of such certificates, as c_rehash(1) makes it."""
    tls_cert_file = setting(settings.text, "")
    """The client's certificate."""
    tls_key_file = setting(settings.text, "")
    """Its key."""
    tls_verify_cert = setting(settings.boolean, True)
    """Whether the server's certificate must be valid and name the server. Postfix's default is no, which protects
    from nobody who can be between the two machines."""

    @property
    def uses_tls(self) -> bool:
        """Whether any of the settings asks for TLS."""
        return self.tls or any((self.tls_CAfile, self.tls_CApath, self.tls_cert_file, self.tls_key_file))

    def tls_context(self) -> ssl.SSLContext:
        """Return a new context by the settings. Raises SettingError when a file is missing or wrong."""
        try:
            context = verifying_context(self._path(self.tls_CAfile), self._path(self.tls_CApath))
        except OSError as error:
            raise self._wrong("tls_CAfile", error) from error
        if not self.tls_verify_cert:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate := self._path(self.tls_cert_file):
            try:
                context.load_cert_chain(certificate, self._path(self.tls_key_file))
            except OSError as error:
                raise self._wrong("tls_cert_file", error) from error
        return context

    def _path(self, file: str) -> str | None:
        return str(self.base / file) if file else None

    def _wrong(self, key: str, error: OSError) -> settings.SettingError:
        return settings.SettingError(f"maps.{self.name}.{key}", f"cannot be used: {error}")


def verifying_context(ca_file: str | None = None, ca_path: str | None = None) -> ssl.SSLContext:
    """Return a context that verifies certificates as Postfix does. Raises OSError when they cannot be read.

    From 3.13 on, Python by default refuses those without all extensions of RFC 5280, which many a private authority
    leaves out. No other program does, and whoever gets a new Python shall not lose mail by it.
    """
    context = ssl.create_default_context(cafile=ca_file, capath=ca_path)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
