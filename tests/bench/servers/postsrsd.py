"""PostSRSd, in the place of this process."""

import os
import sys

from tests.integration.servers.postsrsd import PostSrsd

DOMAIN = "fwd.example"
SECRET = "a secret of the bench"

if __name__ == "__main__":
    server = PostSrsd(DOMAIN, [SECRET])
    server.port = int(sys.argv[1])
    command = server.command()
    os.execv(command[0], command)
