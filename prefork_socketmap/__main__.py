"""``python -m prefork_socketmap`` is the command ``prefork-socketmap``."""

import sys

from prefork_socketmap.daemon.cli import main

sys.exit(main())
