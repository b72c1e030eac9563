"""`branchline explain`: one prompt through the real engine, in this process, each step's draft tree drawn.

Prefill and decode run as in the workers, with the hand-off's KV between them. What is shown is read from the engine:
the slot's tree before a step, and the step's own result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from branchline.config import Config, ConfigError
from branchline.core import FinishReason, InvalidRequestError, KvPart, KvSpan, Request, SamplingParams, SpeculationStats
from cluster.flags import config_from
from cluster.tree_view import COLOURED, LEGEND, PLAIN, StepView, draw, to_json, visible

if TYPE_CHECKING:
    from branchline.engine.decode import Allocation
    from branchline.engine.prefill import FirstChoice, PrefillTask

EXIT_OK, EXIT_USAGE, EXIT_INTERRUPTED = 0, 2, 130


def run(arguments: argparse.Namespace) -> int:
    """Explains what the parsed flags ask for; returns the exit code."""
    from branchline.engine.models.errors import ModelError

    out = sys.stdout
    try:
        config = config_from(arguments, {}).override(**{"engine.max_batch": 1})
        with contextlib.redirect_stdout(sys.stderr):  # whatever loading says
            explainer = Explainer(config)
        explainer.explain(arguments, out)
    except (ConfigError, ModelError, InvalidRequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


class Explainer:
    """A loaded engine that shows its steps."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError and ModelError."""
        from branchline.engine.assemble import assemble
        from branchline.engine.decode import DecodeRunner
        from branchline.engine.models.locate import locate_model
        from branchline.engine.prefill import PrefillRunner
        from gateway.tokens import Tokens

        models, tree = assemble(config, lambda line: print(line, file=sys.stderr))
        self.tokens = Tokens.load(locate_model(config.model.model))
        self.prefill = PrefillRunner(models, config.engine, tree)
        self.decode = DecodeRunner(models, config.engine, tree)
        self._tree = tree

    def explain(self, arguments: argparse.Namespace, out: TextIO) -> None:
        """Prints up to `arguments.steps` steps, and the totals. Raises InvalidRequestError for a wrong request."""
        request = self._request(arguments)
        allocation, first = self._hand_off(request)
        if not arguments.json:
            token = visible(self.tokens.piece(first.token_id), first.token_id)
            print(LEGEND, f"prefill: {len(request.prompt)} tokens, first token {token}", sep="\n\n", file=out)
        token_ids, stats, finish = [first.token_id], SpeculationStats(), first.finish
        for view in self._steps(allocation, arguments.steps) if finish is None else ():
            if arguments.json:
                print(json.dumps(to_json(view, self.tokens.piece), ensure_ascii=False), file=out)
            else:
                style = COLOURED if out.isatty() else PLAIN
                print("", *draw(view, self.tokens.piece, style), sep="\n", file=out)
            token_ids += view.token_ids
            stats += SpeculationStats(1, len(view.tree), len(view.token_ids) - 1)
            finish = view.finish
        self.decode.release(allocation)
        text = self.tokens.decode(token_ids)
        print(_totals(token_ids, stats, finish, text, arguments.json), file=out)

    def _steps(self, allocation: Allocation, count: int) -> Iterator[StepView]:
        """The next iterations, each as it was done."""
        for number in range(1, count + 1):
            state, slot, length = self.decode.state, allocation.slot, allocation.length
            root, tree = int(state.root[slot]), state.tree(slot)
            (result,) = self.decode.step().results
            yield StepView(number, length, allocation.length, root, tree, result.token_ids, result.finish)
            if result.finish is not None:
                return

    def _hand_off(self, request: Request) -> tuple[Allocation, FirstChoice]:
        """Prefills, ships KV and the first tree as a prefill worker does, and starts decoding."""
        (allocation,) = self.decode.allocate(len(request.context), request.max_length)
        task = self.prefill.begin(request)
        while not task.done:
            self._ship(task, allocation, KvPart.TARGET, self.prefill.advance(task))
        first = self.prefill.first_token(task)
        if first.finish is None:
            tree = self.prefill.draft(task)
            if self.prefill.draft_kv is not None:
                self._ship(task, allocation, KvPart.DRAFT, (1, len(request.context) + 1))
            self.decode.start(allocation, request, first.token_id, tree, self.prefill.draft_kv is not None)
        self.prefill.release(task)
        return allocation, first

    def _ship(self, task: PrefillTask, allocation: Allocation, part: KvPart, rows: tuple[int, int]) -> None:
        kv = self.prefill.target_kv if part is KvPart.TARGET else self.prefill.draft_kv
        assert kv is not None
        span = KvSpan(part, (0, kv.num_layers), (0, kv.num_kv_heads), rows)
        self.decode.import_kv(allocation, span, self.prefill.export(task, span))

    def _request(self, arguments: argparse.Namespace) -> Request:
        """Encoded as the gateway does it, with room for every step to accept a whole path."""
        from gateway.conversation import Conversation

        if arguments.steps < 1:
            raise InvalidRequestError(f"--steps must be at least 1, got {arguments.steps}")
        if arguments.chat:
            chat = Conversation(({"role": "user", "content": arguments.prompt},))
            prompt = asyncio.run(self.tokens.encode_chat(chat))
        else:
            prompt = asyncio.run(self.tokens.encode(arguments.prompt))
        max_tokens = 1 + arguments.steps * (self._tree.depth + 1)
        sampling = SamplingParams(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed)
        return Request("explain", prompt, max_tokens, sampling, stop_token_ids=self.tokens.eos_ids)


def _totals(
    token_ids: list[int], stats: SpeculationStats, finish: FinishReason | None, text: str, as_json: bool
) -> str:
    if as_json:
        totals = {
            "tokens": len(token_ids),
            "target_forwards": stats.target_forwards,
            "acceptance_length": round(stats.acceptance_length, 4),
            "drafted": stats.drafted,
            "finish": finish,
            "text": text,
        }
        return json.dumps(totals, ensure_ascii=False)
    return (
        f"\ntext: {text!r}\n"
        f"total: {len(token_ids)} tokens, the first by prefill; {stats.target_forwards} target forwards, "
        f"acceptance length {stats.acceptance_length:.2f}; {stats.drafted} nodes drafted"
    )
