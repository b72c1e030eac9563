"""The commands that steer a running system: status, scale, drain, update, stop. They talk to its launcher."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import yaml

from branchline.client import InvalidRequestError
from branchline.v1 import control_pb2, control_pb2_grpc
from cluster.access import add_tls_flags, tls_of
from cluster.ask import EXIT_DEADLINE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE
from cluster.status_view import as_json, as_table

#: Where the launcher said that its control is.
CONTROL_VARIABLE = "BRANCHLINE_CONTROL"
CALL_TIMEOUT_S = 15.0
POLL_S = 1.0
#: Written before each table but the first: to the top left corner, and clear.
_REDRAW = "\x1b[H\x1b[J"

_EXIT_CODES = {
    grpc.StatusCode.UNAVAILABLE: EXIT_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: EXIT_DEADLINE,
    grpc.StatusCode.INVALID_ARGUMENT: EXIT_USAGE,
    grpc.StatusCode.NOT_FOUND: EXIT_USAGE,
    grpc.StatusCode.FAILED_PRECONDITION: EXIT_USAGE,
}


def add_operate_flags(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument
    add(
        "--control",
        metavar="HOST:PORT",
        help=f"what the launcher told as `control at …` (default: ${CONTROL_VARIABLE})",
    )
    if command == "status":
        add("--json", action="store_true", help="print one JSON object")
        add(
            "--once",
            action="store_true",
            help="print the table once; otherwise it is renewed on a terminal until Ctrl-C",
        )
    if command == "scale":
        for role in ("prefill", "decode", "gateway"):
            add(
                f"--{role}", type=_count, metavar="N", help="as many as there are to be (default: as many as there are)"
            )
        add("--model", default="", metavar="NAME", help="of which of the other models (default: the main one)")
    if command == "drain":
        add("id", metavar="ID", help="as `status` shows it, such as decode-1")
    if command == "update":
        add("--config", metavar="FILE", help="YAML with what is to change, in the shape of a whole configuration")
        add("--set", action="append", default=[], metavar="FIELD=VALUE", help="one field, such as engine.max_batch=16")
        add("--draft", metavar="DRAFT", help="the same as --set model.draft=DRAFT")
        add("--tree", metavar="TREE", help="the same as --set model.tree=TREE")
    if command != "status":
        add("--grace", type=_seconds, default=60.0, metavar="S", help="for requests that run (default: %(default)g s)")
        add(
            "--wait",
            type=_seconds,
            default=600.0,
            metavar="S",
            help="for it to be done (default: %(default)g s, 0: not)",
        )
    add_tls_flags(parser.add_argument_group("access to a launcher on another machine"))


def run(arguments: argparse.Namespace) -> int:
    """Does what the flags say; returns the exit code."""
    try:
        with _connected(arguments) as stub:
            return _COMMANDS[arguments.command](stub, arguments)
    except InvalidRequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except grpc.RpcError as error:
        print(f"error: {error.details()}", file=sys.stderr)
        return _EXIT_CODES.get(error.code(), EXIT_FAILED)
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DEADLINE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _connected(arguments: argparse.Namespace) -> Iterator[Any]:
    """The stub. Raises InvalidRequestError."""
    target = arguments.control or os.environ.get(CONTROL_VARIABLE, "")
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidRequestError(f"--control: must be HOST:PORT, got {target!r}")
    tls = tls_of(arguments)
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    channel = (
        grpc.secure_channel(target, tls.credentials(), options=[*options, *tls.options])
        if tls
        else grpc.insecure_channel(target, options=options)
    )
    with channel:
        yield control_pb2_grpc.ControlServiceStub(channel)


def _look(stub: Any) -> control_pb2.GetClusterResponse:
    answer: control_pb2.GetClusterResponse = stub.GetCluster(control_pb2.GetClusterRequest(), timeout=CALL_TIMEOUT_S)
    return answer


def _status(stub: Any, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(as_json(_look(stub))))
        return EXIT_OK
    print(as_table(_look(stub)))
    while sys.stdout.isatty() and not arguments.once:
        time.sleep(POLL_S)
        print(_REDRAW + as_table(_look(stub)), flush=True)
    return EXIT_OK


def _scale(stub: Any, arguments: argparse.Namespace) -> int:
    counts = {role: getattr(arguments, role) for role in ("prefill", "decode", "gateway")}
    asked = {role: count for role, count in counts.items() if count is not None}
    if not asked:
        raise InvalidRequestError("scale: --prefill, --decode or --gateway is needed")
    request = control_pb2.ScaleRequest(grace_ms=_ms(arguments.grace), model=arguments.model, **asked)
    answer = stub.Scale(request, timeout=CALL_TIMEOUT_S)
    for word, ids in (("added", answer.added), ("draining", answer.draining)):
        if ids:
            print(f"{word}: {', '.join(ids)}", flush=True)

    def done() -> bool:
        states = {process.id: process.state for process in _look(stub).processes}
        return all(states.get(name) == "ready" for name in answer.added) and not states.keys() & set(answer.draining)

    _await(done, arguments.wait, "not all are there, or gone")
    return EXIT_OK


def _drain(stub: Any, arguments: argparse.Namespace) -> int:
    stub.Drain(control_pb2.DrainRequest(id=arguments.id, grace_ms=_ms(arguments.grace)), timeout=CALL_TIMEOUT_S)

    def gone() -> bool:
        return all(process.id != arguments.id for process in _look(stub).processes)

    _await(gone, arguments.wait, f"{arguments.id} is still there")
    return EXIT_OK


def _update(stub: Any, arguments: argparse.Namespace) -> int:
    request = control_pb2.UpdateRequest(changes=_changes(arguments), grace_ms=_ms(arguments.grace))
    stub.Update(request, timeout=CALL_TIMEOUT_S)
    progress = control_pb2.UpdateProgress()

    def over() -> bool:
        before = progress.detail
        progress.CopyFrom(_look(stub).update)
        if progress.detail != before:
            print(f"{progress.state}: {progress.detail}", flush=True)
        return progress.state not in ("rolling", "rolling back")

    _await(over, arguments.wait, "it is under way still")
    return EXIT_OK if progress.state in ("done", "") else EXIT_FAILED


def _changes(arguments: argparse.Namespace) -> dict[str, str]:
    """Values as YAML by their fields' paths; flags override the file. Raises InvalidRequestError."""
    found: dict[str, str] = {}
    if arguments.config:
        try:
            with open(arguments.config, encoding="utf-8") as file:
                tree = yaml.safe_load(file) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidRequestError(f"--config: {arguments.config}: {error}") from None
        if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
            raise InvalidRequestError(f"--config: {arguments.config}: must be sections with fields")
        found = {f"{section}.{name}": _yaml(v) for section, part in tree.items() for name, v in part.items()}
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidRequestError(f"--set: must be FIELD=VALUE, got {text!r}")
        found[name] = value
    given = {"model.draft": arguments.draft, "model.tree": arguments.tree}
    return found | {name: _yaml(value) for name, value in given.items() if value is not None}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True)


def _stop(stub: Any, arguments: argparse.Namespace) -> int:
    stub.Stop(control_pb2.StopRequest(grace_ms=_ms(arguments.grace)), timeout=CALL_TIMEOUT_S)

    def gone() -> bool:
        try:
            _look(stub)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
        return False

    _await(gone, arguments.wait, "it is still there")
    return EXIT_OK


_COMMANDS = {"status": _status, "scale": _scale, "drain": _drain, "update": _update, "stop": _stop}


def _await(done: Callable[[], bool], wait_s: float, otherwise: str) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + wait_s
    while wait_s and not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} after {wait_s:g} s; `branchline status` shows how far it is")
        time.sleep(POLL_S / 4)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 10000, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"must be from 0 to 86400 seconds, got {text!r}")
    return value
