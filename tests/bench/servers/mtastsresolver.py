"""postfix-mta-sts-resolver: ``python -m tests.bench.servers.mtastsresolver PORT PROGRAM RESOLVER CAFILE``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_CONFIG = """\
host: 127.0.0.1
port: {port}
cache: {{ type: internal, options: {{ cache_size: 10000 }} }}
cache_grace: 3600
default_zone: {{ strict_testing: false, timeout: 4 }}
"""


def main(port: str, program: str, resolver: str, ca_file: str) -> None:
    """Become the server. It knows no resolver but that of resolv.conf, so it gets one of its own."""
    directory = Path(tempfile.mkdtemp(prefix="socketmap-bench-"))
    (directory / "config.yml").write_text(_CONFIG.format(port=port))
    (directory / "resolv.conf").write_text(f"nameserver {resolver}\n")
    mount = f"mount --bind {directory}/resolv.conf /etc/resolv.conf"
    start = f"exec {program} -c {directory}/config.yml -v error"
    os.environ["SSL_CERT_FILE"] = ca_file
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", f"{mount} && {start}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
