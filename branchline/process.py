"""What every worker process does around its `serve`: flags, environment, signals, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import yaml

from branchline.config import CORES_TO_SHARE_OUT, Config, ConfigError, load
from branchline.observe import logs
from branchline.wire.memory import keep_large_buffers

#: Exit code for what the user can mend: the configuration, the model, the port.
USER_ERROR = 2


class Serve(Protocol):
    def __call__(
        self, config: Config, *, ready: Callable[..., None], stop: asyncio.Event, progress: Callable[[str], None]
    ) -> Awaitable[None]: ...


def run(
    role: str,
    argv: Sequence[str] | None = None,
    *,
    user_errors: tuple[type[Exception], ...] = (),
) -> int:
    """Runs `<role>.serve.serve` until SIGTERM or SIGINT; returns the exit code.

    `user_errors` are more exceptions that are the user's to mend. Prints `ready grpc=HOST:PORT` to stdout once it
    serves, a gateway with OpenAI's API also ` http=HOST:PORT`; progress and logs go to stderr. The role's modules are
    imported only after the environment of the compute threads has been set.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {role}")
    parser.add_argument("--config", metavar="FILE", help="YAML configuration; without it the defaults apply")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="overrides a field; may be repeated"
    )
    arguments = parser.parse_args(argv)
    try:
        config = read_config(arguments.config, arguments.set)
    except ConfigError as error:
        return _user_error(error)
    logs.set_up(config.logging, role.removesuffix("_worker"), logging.INFO)
    cores = len(os.sched_getaffinity(0))
    shared = cores < CORES_TO_SHARE_OUT
    set_thread_environment(config.engine.threads_for(role.removesuffix("_worker"), cores, shared))
    keep_large_buffers()

    from branchline.engine.models.errors import ModelError
    from branchline.wire.server import BindError

    told_in_one_line: tuple[type[Exception], ...] = (ConfigError, ModelError, BindError, *user_errors)
    try:
        asyncio.run(_serve(importlib.import_module(f"{role}.serve").serve, config))
    except told_in_one_line as error:
        return _user_error(error)
    return 0


def read_config(path: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of a file with `section.field=value` laid over. Raises ConfigError."""
    config = load(path) if path else Config()
    flags: dict[str, Any] = {}
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator or "." not in name:
            raise ConfigError(f"--set {override}: must be SECTION.FIELD=VALUE")
        if name.partition(".")[0] not in Config.__dataclass_fields__:
            raise ConfigError(f"--set {override}: unknown section")
        try:
            flags[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: not a YAML value") from error
    return config.override(**flags)


def set_thread_environment(threads: int) -> None:
    """For the compute threads of this process, before torch is imported. What the caller's environment says stays.

    Waiting threads must sleep: several workers share one machine, and OpenMP's spinning ones stall each other.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


async def _serve(serve: Serve, config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(
        config,
        ready=lambda grpc, http="": print(f"ready grpc={grpc}" + (f" http={http}" if http else ""), flush=True),
        stop=stop,
        progress=_progress(config),
    )


def _progress(config: Config) -> Callable[[str], None]:
    if config.logging.format == "json":  # nothing else goes to where machines read
        return logging.getLogger("progress").info
    return lambda line: print(line, file=sys.stderr, flush=True)


def _user_error(error: Exception) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return USER_ERROR
