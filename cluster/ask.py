"""The commands that talk to a running gateway: generate, chat, info. Imports the SDK only."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from branchline.client import (
    AuthenticationError,
    BranchlineError,
    Client,
    Completion,
    DeadlineExceededError,
    GenerateOptions,
    InvalidRequestError,
    OverloadedError,
    ServerInfo,
    UnavailableError,
)
from cluster.access import connect
from cluster.options import options_from, sample_options_from

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_DEADLINE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

_EXIT_CODES: tuple[tuple[type[BranchlineError], int], ...] = (
    (InvalidRequestError, EXIT_USAGE),
    (AuthenticationError, EXIT_USAGE),
    (UnavailableError, EXIT_UNAVAILABLE),
    (OverloadedError, EXIT_UNAVAILABLE),
    (DeadlineExceededError, EXIT_DEADLINE),
)
INFO_TIMEOUT_S = 10.0


def run(arguments: argparse.Namespace) -> int:
    """Runs the command that the flags name; returns the exit code."""
    try:
        if arguments.command == "info":
            return info(arguments)
        with connect(arguments.target, arguments, os.environ) as client:
            if arguments.command == "chat":
                return chat(client, arguments)
            return generate(client, arguments)
    except BranchlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has gone: `branchline generate … | head`
        sys.stderr.close()
        return EXIT_FAILED


def exit_code(error: BranchlineError) -> int:
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)


def generate(client: Client, arguments: argparse.Namespace) -> int:
    prompt = _standard_input() if arguments.prompt == "-" else arguments.prompt
    options = options_from(arguments)
    options.update(sample_options_from(arguments))
    if arguments.chat or arguments.system is not None:
        options["messages"] = [*_system(arguments.system), {"role": "user", "content": prompt}]
    else:
        options["prompt"] = prompt
    if arguments.json:
        result = client.complete(timeout=arguments.timeout, **options)
        print(json.dumps(completion_object(result), ensure_ascii=False))
    elif arguments.n is None or arguments.n == 1:
        stream(client, options, arguments.timeout)
        print()
    else:
        print_samples(client, options, arguments.timeout)
    return EXIT_OK


def chat(client: Client, arguments: argparse.Namespace) -> int:
    """A loop of question and answer. Ctrl-C ends the answer, and at the prompt the loop."""
    history: list[dict[str, str]] = _system(arguments.system)
    options = options_from(arguments)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return EXIT_OK
        if line.strip() == "/exit":
            return EXIT_OK
        if line.strip() == "/reset":
            history = _system(arguments.system)
            continue
        if not line.strip():
            continue
        messages = [*history, {"role": "user", "content": line}]
        options["messages"] = messages
        parts: list[str] = []
        try:
            stream(client, options, arguments.timeout, parts)
        except KeyboardInterrupt:
            print(" [cancelled]", end="")
        except BranchlineError as error:
            # One failed answer does not end the conversation, but the question is not kept.
            print(f"error: {error}", file=sys.stderr)
            continue
        print()
        history = [*messages, {"role": "assistant", "content": "".join(parts)}]


def info(arguments: argparse.Namespace) -> int:
    with connect(arguments.target, arguments, os.environ) as client:
        answer = client.info(timeout=arguments.timeout or INFO_TIMEOUT_S)
    print(json.dumps(dataclasses.asdict(answer)) if arguments.json else info_table(answer))
    return EXIT_OK


def stream(
    client: Client, options: GenerateOptions, timeout: float | None, parts: list[str] | None = None
) -> Completion:
    """Prints the text as it comes; also adds it to `parts`. Leaving early cancels the request."""
    with client.generate(timeout=timeout, **options) as chunks:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            if parts is not None:
                parts.append(chunk.text)
        return chunks.result


def print_samples(client: Client, options: GenerateOptions, timeout: float | None) -> None:
    """Prints each sample when it is finished, headed by its number."""
    texts: dict[int, str] = {}
    with client.generate(timeout=timeout, **options) as chunks:
        for chunk in chunks:
            texts[chunk.sample] = texts.get(chunk.sample, "") + chunk.text
            if chunk.finish_reason:
                print(f"--- sample {chunk.sample} ---\n{texts.pop(chunk.sample)}", flush=True)


def completion_object(result: Completion) -> dict[str, Any]:
    """What --json prints."""
    values = result.to_dict()
    timing = {name: values.pop(name) for name in ("time_to_first_token_s", "duration_s")}
    return {**values, "timing": timing}


def info_table(answer: ServerInfo) -> str:
    head = (
        f"Branchline {answer.version}, model {answer.model}, up to {answer.max_model_len} tokens, "
        f"tree {answer.tree}, {answer.active_requests} active requests"
    )
    rows = [("ROLE", "ADDRESS", "HEALTHY", "BLOCKS", "REQUESTS", "TASKS")]
    rows += [
        (
            w.role,
            w.address,
            "yes" if w.healthy else "no",
            f"{w.blocks_used}/{w.blocks_total}",
            str(w.requests),
            str(w.tasks),
        )
        for w in answer.workers
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *lines])


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"prompt: standard input is not UTF-8 at byte {error.start}") from None
