"""TLS that tells an answer that was cut off from a whole one, where nothing but the connection's end tells its end.

Who ends a connection says so first (RFC 8446, 6.1); without that, an answer that tells no length has to be taken for
incomplete (RFC 9112, 9.8). Python hides the difference, twice: ``suppress_ragged_eofs`` is its default, and before
3.11.3 OpenSSL was told not to look.
"""

from __future__ import annotations

import ssl
from typing import Any


class UncutSocket(ssl.SSLSocket):
    """Raises ssl.SSLEOFError, an OSError, where the other side has not said that it is the end."""

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - as the class above has it
        """Read, as all ways to receive do in the end."""
        self.suppress_ragged_eofs = False
        return super().read(len, buffer)


def refuse_cuts(context: ssl.SSLContext, kind: type[UncutSocket] = UncutSocket) -> None:
    """Have *context* make such sockets, of this *kind*."""
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.sslsocket_class = kind
