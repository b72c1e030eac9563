"""Waits until a gateway's requests have ended: `python -m gateway.drain --target HOST:PORT --timeout S`.

For whoever is about to stop it and has told the clients to go elsewhere (the Helm chart's preStop hook). The gateway is
not told: requests that still come are served, and waited for within the time. Exit code 0 when none was left or nobody
answers, 1 when the time was up first. A gateway that answers but won't say what it serves is given the whole time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from branchline.client import BranchlineError, Client, UnavailableError

POLL_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway.drain", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--target", required=True, metavar="HOST:PORT", help="the gateway")
    add("--timeout", type=float, required=True, metavar="S", help="seconds to wait at most")
    add("--settle", type=float, default=0.0, metavar="S", help="seconds before the first look: clients learn meanwhile")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.timeout
    time.sleep(min(arguments.settle, arguments.timeout))
    with Client(arguments.target) as client:
        while _serves(client, max(0.1, deadline - time.monotonic())):
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"requests are left after {arguments.timeout:g} s", file=sys.stderr)
                return 1
            time.sleep(min(POLL_S, left))
    return 0


def _serves(client: Client, timeout_s: float) -> bool:
    """Whether there is a request that must be waited for, as far as can be known."""
    try:
        return bool(client.status(timeout=min(5.0, timeout_s)).requests)
    except UnavailableError:
        return False  # it is gone, and its requests with it
    except BranchlineError:
        return True


if __name__ == "__main__":
    sys.exit(main())
