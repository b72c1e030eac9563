"""Waits until a gateway's requests have ended: `python -m gateway.drain --target HOST:PORT --timeout S`.

For whoever is about to stop it and has told the clients to go elsewhere (the Helm chart's preStop hook). The gateway is
not told: requests that still come are served, and waited for within the time. Exit code 0 when none was left or nobody
answers, 1 when the time was up first. A gateway that answers but won't say what it serves is given the whole time: one
with TLS or API keys is asked by `--metrics URL` instead, on the port that needs no key. Its certificate is not checked,
since nothing is told to it and nothing but a number is believed.
"""

from __future__ import annotations

import argparse
import functools
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from branchline.client import BranchlineError, Client, UnavailableError

POLL_S = 1.0
#: Seconds for one answer.
_ANSWER_S = 5.0
_RUNNING = re.compile(rb"^branchline_gateway_requests_running (\S+)$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway.drain", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--target", metavar="HOST:PORT", help="the gateway")
    asked.add_argument("--metrics", metavar="URL", help="its metrics, where it has TLS or keys")
    add("--timeout", type=float, required=True, metavar="S", help="seconds to wait at most")
    add("--settle", type=float, default=0.0, metavar="S", help="seconds before the first look: clients learn meanwhile")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.timeout
    time.sleep(min(arguments.settle, arguments.timeout))
    if arguments.metrics:
        return _wait(functools.partial(_counts, arguments.metrics), arguments.timeout, deadline)
    with Client(arguments.target) as client:
        return _wait(functools.partial(_serves, client), arguments.timeout, deadline)


def _wait(serves: Callable[[float], bool], timeout_s: float, deadline: float) -> int:
    """The exit code. `serves` takes the seconds that its answer may take."""
    while serves(min(_ANSWER_S, max(0.1, deadline - time.monotonic()))):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"requests are left after {timeout_s:g} s", file=sys.stderr)
            return 1
        time.sleep(min(POLL_S, left))
    return 0


def _counts(url: str, timeout_s: float) -> bool:
    """Whether the page at `url` counts requests, as far as can be known."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=timeout_s, context=context) as answer:
            found = _RUNNING.search(answer.read())
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return not isinstance(error.reason, ConnectionRefusedError)
    except OSError:
        return True
    return found is None or float(found[1]) > 0


def _serves(client: Client, timeout_s: float) -> bool:
    """Whether there is a request that must be waited for, as far as can be known."""
    try:
        return bool(client.status(timeout=timeout_s).requests)
    except UnavailableError:
        return False  # it is gone, and its requests with it
    except BranchlineError:
        return True


if __name__ == "__main__":
    sys.exit(main())
