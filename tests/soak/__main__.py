"""``python -m tests.soak --minutes N``: run it, print what was counted; the exit status is 1 if anything was lost."""

from __future__ import annotations

import argparse
import sys
import time

from tests.soak.campaign import Campaign


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Let a server suffer, and count.")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="how long (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what happens when (default: the time)")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with Campaign(options.seed) as campaign:
        result = campaign.run(options.minutes * 60)
        problems = result.problems()
        print(result)
        if problems:
            print(campaign.logs())
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
