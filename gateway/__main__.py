"""`python -m gateway --config FILE`: a gateway by hand, without Ray."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from branchline.config import Config


def main() -> int:
    """The exit code: 0 after a clean stop, 2 with one line on stderr for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description="Runs one gateway until SIGTERM or SIGINT.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the configuration, YAML")
    path = parser.parse_args().config
    # The tokenizer's library imports torch, whose threads would otherwise spin on the workers' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    from branchline.config import ConfigError, load
    from branchline.core import InvalidRequestError
    from branchline.engine.models.errors import ModelError
    from branchline.wire.server import BindError
    from gateway.pool import WorkersNotReadyError

    try:
        asyncio.run(_run(load(path)))
    except (ConfigError, ModelError, BindError, WorkersNotReadyError, InvalidRequestError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    return 0


async def _run(config: Config) -> None:
    from gateway.serve import serve  # takes seconds: it comes after the configuration has been read

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await serve(
        config,
        ready=lambda address: print(f"ready grpc={address}", flush=True),
        stop=stop,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
