"""A system on this machine answers three questions: `python -m cluster.demo [flags of branchline serve]`.

Starts it, streams the answers with their figures, stops it, and checks that no process, port or temporary file is
left. Exit code 0 when all of that went well, 1 when something was left or an answer failed, otherwise that of
`cluster.launch`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from branchline.client import BranchlineError, Client, Completion, GenerateOptions
from cluster.access import add_access_flags, connect
from cluster.ask import stream
from cluster.flags import add_serve_flags
from cluster.launch import EXIT_FAILED, EXIT_OK, fail, run

if TYPE_CHECKING:
    from cluster.system import Stopping, System

PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the capital of France, and what is it known for?",
)
MAX_TOKENS = 96
ANSWER_TIMEOUT_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__.split("\n")[0])
    add_serve_flags(parser)
    add_access_flags(parser)
    arguments = parser.parse_args(argv)
    if not arguments.ray_address:
        arguments.ray_address = "local"
    # All temporary files of this process and its children go where they can be seen.
    directory = Path(tempfile.mkdtemp(prefix="bl-demo-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
    demo = Demo(arguments)
    code = run(arguments, demo.ask_all)
    left = leftovers(demo.addresses, directory)
    if left:
        return fail("left behind: " + "; ".join(left), EXIT_FAILED)
    directory.rmdir()
    if code == EXIT_OK and demo.addresses:
        print("no process, port or temporary file is left", file=sys.stderr)
    return code


class Demo:
    """Asks the questions and remembers the addresses that must be closed afterwards."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.addresses: list[str] = []

    def ask_all(self, system: System, stopping: Stopping, out: TextIO) -> int:
        try:
            with connect(system.gateways[0], self._arguments, os.environ) as client, contextlib.redirect_stdout(out):
                self.addresses = [*system.gateways, *system.http, *(worker.address for worker in client.info().workers)]
                for prompt in PROMPTS:
                    if stopping():
                        break
                    _ask(client, prompt)
        except BranchlineError as error:
            return fail(str(error), EXIT_FAILED)
        return EXIT_OK


def _ask(client: Client, prompt: str) -> None:
    print(f"\n> {prompt}\n")
    options = GenerateOptions(messages=[{"role": "user", "content": prompt}], max_tokens=MAX_TOKENS)
    result = stream(client, options, ANSWER_TIMEOUT_S)
    print(f"\n\n  {figures(result)}", flush=True)


def figures(result: Completion) -> str:
    """The figures of one answer in a line."""
    tokens = result.usage.completion_tokens
    decode_s = result.duration_s - result.time_to_first_token_s
    speed = f"{(tokens - 1) / decode_s:.1f} tokens/s" if tokens > 1 and decode_s > 0 else "one token"
    return (
        f"{tokens} tokens · time to first token {result.time_to_first_token_s * 1000:.0f} ms · {speed} · "
        f"mean acceptance length {result.speculation.acceptance_length:.2f}"
    )


def leftovers(addresses: Sequence[str], directory: Path) -> list[str]:
    """What still exists of a system that has ended: child processes, listening ports, temporary files."""
    processes = [f"process {child.pid}" for child in psutil.Process().children(recursive=True)]
    ports = [f"port {address}" for address in addresses if _listens(address)]
    files = [f"file {path}" for path in directory.iterdir()]
    return processes + ports + files


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0


if __name__ == "__main__":
    sys.exit(main())
