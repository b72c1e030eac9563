"""Runs a system until SIGINT or SIGTERM: `python -m cluster.launch --config FILE [flags]`.

Starts a local Ray or joins a running one; in a Ray job it joins the job's. Standard output carries one line
`ready grpc=HOST:PORT` when the first request can be answered (and `gateway grpc=HOST:PORT` for each further gateway),
with ` http=HOST:PORT` behind it where OpenAI's HTTP API is served, too; progress goes to standard error. Exit code 0
after a clean stop, 2 for a mistake in configuration, model or port, 1 for anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from branchline.config import ConfigError
from cluster.flags import add_serve_flags, config_from

if TYPE_CHECKING:
    from branchline.config import Config
    from cluster.system import Stopping, System

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.launch", description=__doc__.split("\n")[0])
    add_serve_flags(parser)
    return serve(parser.parse_args(argv))


def serve(arguments: argparse.Namespace) -> int:
    """Serves what the parsed flags say; returns the exit code."""
    return run(arguments, _serve_until_stopped)


def run(arguments: argparse.Namespace, use: Callable[[System, Stopping, TextIO], int]) -> int:
    """Starts the system that the parsed flags describe, hands it to `use` and ends it; returns the exit code.

    `use` gets the standard output, which meanwhile is nobody else's: Ray's notices go to standard error. It returns
    the exit code of its own part, and soon when its second argument turns true: after SIGINT or SIGTERM.
    """
    try:
        config = config_from(arguments, os.environ)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    stop = StopSignal()
    stop.install()
    progress = Progress()
    prepare_ray_environment(local=config.ray.address in ("", "local"))
    # Not before: Ray reads the environment when it is imported, and a mistake in a flag should be told at once.
    from branchline.engine.models.errors import ModelError
    from cluster.session import SessionError
    from cluster.supervisor import StartError, StartInterruptedError
    from cluster.system import running_system

    out = sys.stdout
    try:
        if config.ray.detached:
            return _detach(config, progress, stop, verbose=arguments.verbose)
        with (
            contextlib.redirect_stdout(sys.stderr),
            running_system(config, os.environ, progress, stop.is_set, verbose=arguments.verbose) as system,
        ):
            stop.install()  # ray.init has put its own handler in place
            code = use(system, stop.is_set, out)
    except StartInterruptedError:
        code = EXIT_OK
    except (ConfigError, ModelError) as error:
        return fail(str(error), EXIT_USAGE)
    except StartError as error:
        return fail(str(error), EXIT_USAGE if error.user_error else EXIT_FAILED)
    except SessionError as error:
        return fail(str(error), EXIT_FAILED)
    progress("stopped")
    return code


def _detach(config: Config, progress: Progress, stop: StopSignal, *, verbose: bool) -> int:
    """Starts a detached system and leaves it. Raises what `run` catches."""
    if config.ray.address in ("", "local"):
        raise ConfigError("ray.detached: needs a Ray that is running already, ray.address says which")
    from cluster import detached
    from cluster.session import joined_ray
    from cluster.system import in_job, passed_on

    out = sys.stdout
    with (
        contextlib.redirect_stdout(sys.stderr),
        joined_ray(config.ray.address, progress, in_job=in_job(os.environ), verbose=verbose),
    ):
        stop.install()
        found = detached.start(config, passed_on(os.environ), progress, stop.is_set)
        _tell_ready(found.gateways, found.http, out)
    progress("it runs on by itself; `branchline stop` ends it")
    return EXIT_OK


def fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _serve_until_stopped(system: System, stopping: Stopping, out: TextIO) -> int:
    _tell_ready(system.gateways, system.http, out)
    system.watch(stopping)
    return EXIT_OK


def _tell_ready(gateways: Sequence[str], http: Sequence[str], out: TextIO) -> None:
    words = ["ready", *["gateway"] * (len(gateways) - 1)]
    for word, grpc, also in zip(words, gateways, http or [""] * len(gateways), strict=True):
        print(f"{word} grpc={grpc}" + (f" http={also}" if also else ""), file=out, flush=True)


def prepare_ray_environment(*, local: bool) -> None:
    """What Ray must find in the environment before it is imported."""
    # Unset, a local Ray turns token authentication on and leaves a token behind that a later cluster trips over.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if local:
        # Ray's switch for machines without a cluster: all its servers stay on the loopback interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


class StopSignal:
    """Remembers that SIGINT or SIGTERM has come."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.is_set = self._event.is_set

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._event.set()


class Progress:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
