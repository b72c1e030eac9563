"""`branchline keys new`: an API key, and what the gateway's file says of it."""

from __future__ import annotations

import argparse
import sys

from branchline.config_base import ConfigError

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")
EXIT_OK, EXIT_USAGE = 0, 2


def add_keys_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "make a key: the first line printed is the key, the second one goes into the file security.api_keys"
    new = actions.add_parser("new", help=text, description=text)
    new.add_argument("name", metavar="NAME", help="who it is for: letters, digits and any of ._@-")
    for limit in LIMITS:
        new.add_argument(f"--{limit.replace('_', '-')}", type=int, default=0, metavar="N", help="default: no limit")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    from gateway.keys import KeyLimits, entry_of, new_key

    key = new_key()
    try:
        entry = entry_of(key, arguments.name, KeyLimits(**{limit: getattr(arguments, limit) for limit in LIMITS}))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(key, entry, sep="\n", flush=True)
    print("the key is not kept anywhere: give it to its user, and add the second line to the file", file=sys.stderr)
    return EXIT_OK
