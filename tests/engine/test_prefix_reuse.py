"""A prefill that begins with cached blocks gives what a cold one gives: KV, first token, tree and acceptance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from engine_helpers import BUSHY, VOCAB, TinyPipeline
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config

from branchline.config import EngineConfig, ModelConfig
from branchline.core import DraftTree, KvPart, KvSpan, Request, SamplingParams
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.prefill import PrefillRunner, PrefillTask

pytestmark = pytest.mark.models

SIZE = 4


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def runner(models: Models, **engine: object) -> PrefillRunner:
    return TinyPipeline(models, BUSHY, block_size=SIZE, **engine).prefill


def kv(runner: PrefillRunner, task: PrefillTask, part: KvPart, start: int, end: int) -> torch.Tensor:
    geometry = runner.target_kv if part is KvPart.TARGET else runner.draft_kv
    assert geometry is not None
    span = KvSpan(part, (0, geometry.num_layers), (0, geometry.num_kv_heads), (start, end))
    return torch.frombuffer(bytearray(runner.export(task, span)), dtype=geometry.dtype)


@dataclasses.dataclass(frozen=True)
class Result:
    """What leaves a prefill worker."""

    target: torch.Tensor
    draft: torch.Tensor
    first_token: int
    tree: DraftTree

    @classmethod
    def of(cls, runner: PrefillRunner, task: PrefillTask) -> Result:
        """Of a task that is done; releases it."""
        first, tree = runner.first_token(task).token_id, runner.draft(task)
        target = kv(runner, task, KvPart.TARGET, 0, task.length)
        draft = kv(runner, task, KvPart.DRAFT, 1, task.length + 1)
        runner.release(task)
        return cls(target, draft, first, tree)

    def check(self, cold: Result) -> None:
        torch.testing.assert_close(self.target, cold.target, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(self.draft, cold.draft, atol=2e-5, rtol=1e-4)
        assert self.first_token == cold.first_token
        assert (self.tree.tokens, self.tree.parents) == (cold.tree.tokens, cold.tree.parents)
        assert self.tree.scores == pytest.approx(cold.tree.scores, abs=1e-4)


def prefill(runner: PrefillRunner, prompt: tuple[int, ...]) -> tuple[Result, int]:
    """With the number of tokens that were found."""
    task = runner.begin(Request("r", prompt, 5))
    while not task.done:
        runner.advance(task)
    return Result.of(runner, task), task.cached


@pytest.fixture(scope="module", params=["reference", "vllm"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory: Path = tmp_path_factory.mktemp("either")
    save_tiny_model(directory / "model", tiny_config())
    head = save_head(directory / "head", head_config(), head_tensors())
    config = ModelConfig(
        model=str(directory / "model"), draft=str(head), dtype="float32", provider=request.param, device="cpu"
    )
    return load_models(config, EngineConfig(threads=1))


@pytest.mark.parametrize("chunk", [3, 4, 64])
@pytest.mark.parametrize(("common", "length"), [(3, 9), (4, 9), (11, 23), (12, 13), (12, 12), (16, 17), (20, 40)])
def test_a_hit_equals_a_cold_run(either: Models, chunk: int, common: int, length: int) -> None:
    prompt = text(1, length)
    warm = runner(either, prefill_chunk_tokens=chunk)
    other = (prompt[common] + 1) % VOCAB if common < length else 0
    prefill(warm, (*prompt[:common], other, *text(2, 7)))
    result, cached = prefill(warm, prompt)
    assert cached == min(common // SIZE, (length - 1) // SIZE) * SIZE
    cold, nothing = prefill(runner(either, prefill_chunk_tokens=chunk, prefix_caching=False), prompt)
    assert nothing == 0
    result.check(cold)
    again, cached = prefill(warm, prompt)
    assert cached == (length - 1) // SIZE * SIZE
    again.check(cold)
    assert warm.pool.used == 0


def test_a_prompt_takes_over_what_another_computes_meanwhile(tiny: Models) -> None:
    """Both begin before anything is known; the second one goes on behind the first, from the middle of a block."""
    prompts = [(*text(3, 17), *text(seed, 9)) for seed in (4, 5)]
    warm = runner(tiny)
    first, second = (warm.begin(Request(str(index), prompt, 5)) for index, prompt in enumerate(prompts))
    warm.advance_many([(second, 6)])
    assert second.report() == (0, 6)
    warm.advance_many([(first, 15)])
    assert (first.computed, first.cached) == (4 + 15, 4), "whole blocks alone are found, and one was complete"
    warm.advance_many([(first, 100)])
    warm.advance_many([(second, 1)])
    assert second.computed == 17
    assert second.cached == 16 - 6
    assert second.report() == (6, 17)
    assert first.blocks[:4] == second.blocks[:4]
    assert set(first.blocks[4:]).isdisjoint(second.blocks[4:])
    warm.check_integrity()
    while not second.done:
        warm.advance(second)
    for task, prompt in zip((first, second), prompts, strict=True):
        Result.of(warm, task).check(prefill(runner(tiny, prefix_caching=False), prompt)[0])
    warm.check_integrity()
    assert warm.pool.used == 0


def test_shared_blocks_are_never_written(tiny: Models) -> None:
    """Neither by the chunks, nor by the rows of trees and samples."""
    for length in (16, 17, 19, 20):
        warm = runner(tiny)
        prompt = text(6, 40)
        owner = warm.begin(Request("owner", prompt, 5))
        while not owner.done:
            warm.advance(owner)
        before = kv(warm, owner, KvPart.TARGET, 0, 40), kv(warm, owner, KvPart.DRAFT, 1, 40)
        guest = warm.begin(Request("guest", prompt[:length], 5, SamplingParams(1.0, seed=1)), 3)
        assert guest.cached > 0
        while not guest.done:
            warm.advance(guest)
        for sample in range(3):
            warm.first_token(guest, sample)
            warm.draft(guest, sample)
        after = kv(warm, owner, KvPart.TARGET, 0, 40), kv(warm, owner, KvPart.DRAFT, 1, 40)
        assert all(map(torch.equal, before, after))


def test_acceptance_after_a_hit_equals_a_cold_run(tiny: Models) -> None:
    """Over whole texts, and at the first step alone."""
    turns = [Request(str(index), (*text(7, 30), *text(index, 5)), 40) for index in range(8)]
    cold, warm = TinyPipeline(tiny, BUSHY, prefix_caching=False), TinyPipeline(tiny, BUSHY)
    texts = cold.run_text(turns)
    for _ in range(2):
        assert warm.run_text(turns) == texts
        assert warm.forwards == cold.forwards
    accepted = []
    for pipeline in (cold, warm):
        first_steps = []
        for request in turns:
            sample = pipeline.hand_off(request)
            (result,) = pipeline.decode.step().results
            first_steps.append(len(result.token_ids))
            pipeline.decode.release(sample.allocation)
        accepted.append(first_steps)
    assert accepted[0] == accepted[1]
    assert max(accepted[0]) > 1, "nothing was ever accepted: nothing was tested"
    assert cold.prefill.pool.cached == 0 < warm.prefill.pool.cached


def test_a_prompt_that_does_not_fit_takes_nothing(tiny: Models) -> None:
    warm = runner(tiny)
    prompt = text(8, 30)
    prefill(warm, prompt)
    cached = warm.pool.cached
    others = warm.pool.allocate(warm.pool.free - cached)
    with pytest.raises(OutOfBlocksError):
        warm.begin(Request("r", (*prompt, *text(9, 60)), 5))
    assert warm.pool.used == len(others)
    assert warm.pool.cached == cached
    warm.check_integrity()


class ReuseMachine(RuleBasedStateMachine):
    """Prompts over two tokens come, advance together, end early or late, in a pool that holds only few of them."""

    def __init__(self, models: Models, cold: dict[tuple[int, ...], Result]) -> None:
        super().__init__()
        self.models, self.cold = models, cold
        self.runner = runner(models, max_model_len=40)
        pool = self.runner.pool
        pool.allocate(pool.total - 40)  # of nobody; the rest makes room for three or four
        self.held = pool.used
        self.tasks: list[PrefillTask] = []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=22).map(tuple))
    def begin(self, prompt: tuple[int, ...]) -> None:
        free, used = self.runner.pool.free, self.runner.pool.used
        try:
            self.tasks.append(self.runner.begin(Request("r", prompt, 5)))
        except OutOfBlocksError:
            assert (free, used) == (self.runner.pool.free, self.runner.pool.used)

    @rule(tokens=st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def advance(self, tokens: list[int]) -> None:
        turns = [(task, count) for task, count in zip(self.tasks, tokens, strict=False) if not task.done]
        if turns:
            self.runner.advance_many(turns)
        for task in [task for task in self.tasks if task.done]:
            self.tasks.remove(task)
            prompt = tuple(task.token_ids.tolist())
            if prompt not in self.cold:
                self.cold[prompt] = prefill(runner(self.models, prefix_caching=False), prompt)[0]
            Result.of(self.runner, task).check(self.cold[prompt])

    @rule(pick=st.integers(0, 9), really=st.sampled_from([False, False, True]))
    def give_up(self, pick: int, really: bool) -> None:
        if self.tasks and really:
            task = self.tasks.pop(pick % len(self.tasks))
            self.runner.release(task)
            self.runner.release(task)

    @rule()
    def evict(self) -> None:
        self.runner.pool.forget_free()

    @invariant()
    def every_block_is_counted(self) -> None:
        self.runner.check_integrity()
        held = {block for task in self.tasks for block in task.blocks}
        assert self.runner.pool.used == self.held + len(held)
        for task in self.tasks:
            assert task.block_table[0].tolist() == task.blocks
            assert len(set(task.blocks)) == len(task.blocks)
            assert task.computed >= task.cached

    def teardown(self) -> None:
        while self.tasks:
            self.advance([5, 7, 4, 9])
        assert self.runner.pool.used == self.held


def test_random_orders_of_prompts_equal_cold_runs(tiny: Models) -> None:
    cold: dict[tuple[int, ...], Result] = {}
    run_state_machine_as_test(
        lambda: ReuseMachine(tiny, cold),
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert len(cold) >= 3, "hardly any prompt came to its end"
