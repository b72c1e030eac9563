"""How a step's tokens are shared out among prompts, on paper and by the real engine loop."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config

from branchline.config import EngineConfig, ModelConfig
from branchline.core import Request
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.prefill import PrefillRunner, PrefillTask
from branchline.engine.tree_spec import parse_tree
from prefill_worker.engine_loop import MAX_FAILURES, Computed, Drafted, Event, Failed, FirstToken, PrefillLoop
from prefill_worker.schedule import Waiting, share

SIZE, BUDGET = 4, 16
PROMPTS = st.lists(
    st.builds(
        Waiting,
        job_id=st.integers(0, 99),
        rank=st.floats(-100, 100),
        left=st.integers(1, 300),
        next_block=st.sampled_from([None, None, b"a", b"b"]),
    ),
    max_size=12,
    unique_by=lambda one: one.job_id,
)


@given(PROMPTS, st.integers(1, 100))
def test_the_budget_is_kept_and_not_wasted(waiting: list[Waiting], budget: int) -> None:
    turns = dict(share(budget, waiting))
    by_id = {one.job_id: one for one in waiting}
    assert all(1 <= tokens <= by_id[job_id].left for job_id, tokens in turns.items())
    assert sum(turns.values()) <= budget
    blocks = Counter(by_id[job_id].next_block for job_id in turns)
    assert all(count == 1 for block, count in blocks.items() if block is not None), "a block is computed twice"
    if any(turns.get(one.job_id, 0) < one.left and by_id[one.job_id].next_block is None for one in waiting):
        assert sum(turns.values()) == budget


@given(PROMPTS.filter(bool), st.integers(1, 100))
def test_the_first_gets_half_and_the_shortest_the_rest(waiting: list[Waiting], budget: int) -> None:
    waiting = [dataclasses.replace(one, next_block=None) for one in waiting]
    turns = dict(share(budget, waiting))
    first = min(waiting, key=lambda one: (one.rank, one.job_id))
    others = [one for one in waiting if one is not first]
    assert turns[first.job_id] >= min(first.left, max(1, budget // 2))
    if turns[first.job_id] > max(1, budget // 2):
        assert all(turns[one.job_id] == one.left for one in others), "somebody waits, and the first got more than half"
    for one in others:
        for other in others:
            if one.left < other.left and other.job_id in turns:
                assert turns[one.job_id] == one.left, "a longer one was served before"


@given(PROMPTS, st.integers(1, 40), st.data())
def test_everybody_ends(waiting: list[Waiting], budget: int, data: st.DataObject) -> None:
    """Those of the beginning, though others keep coming: in no more steps than the first halves give them."""
    steps = sum(-(-one.left // max(1, budget // 2)) for one in waiting)
    last = max((one.rank for one in waiting), default=0.0)
    left = {one.job_id: one for one in waiting}
    for step in range(steps):
        late = data.draw(st.lists(st.integers(1, 20), max_size=3), "those who come later") if step < 10 else [1]
        newcomers = [Waiting(1000 + step * 10 + index, last + 1 + step, tokens) for index, tokens in enumerate(late)]
        for job_id, tokens in share(budget, [*left.values(), *newcomers]):
            if job_id in left and left[job_id].left == tokens:
                del left[job_id]
            elif job_id in left:
                left[job_id] = dataclasses.replace(left[job_id], left=left[job_id].left - tokens)
    assert not left


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory = tmp_path_factory.mktemp("prefill")
    save_tiny_model(directory / "model", tiny_config(max_position_embeddings=512))
    head = save_head(directory / "head", head_config(), head_tensors())
    config = ModelConfig(
        model=str(directory / "model"), draft=str(head), dtype="float32", provider="reference", device="cpu"
    )
    return load_models(config, EngineConfig(threads=1))


class House:
    """The real loop; `events` are what each job was told, and `steps` how many have been made."""

    def __init__(self, models: Models, **engine: object) -> None:
        settings = EngineConfig(**{"kv_cache_mib": 8, "block_size": SIZE, "prefill_chunk_tokens": BUDGET} | engine)
        self.runner = PrefillRunner(models, settings, parse_tree("[[0],[1],[0,0]]"))
        self.loop = PrefillLoop(models, self.runner, settings.prefill_chunk_tokens)
        self.events: dict[int, list[Event]] = {}
        self.ended: dict[int, int] = {}
        self.steps = 0

    def begin(self, length: int, rank: float = 0.0, first: int = 1, samples: int = 1) -> int:
        job_id = len(self.events)
        prompt = tuple((first + index * index) % 60 for index in range(length))
        events = self.events[job_id] = []
        self.loop.begin(job_id, Request(str(job_id), prompt, 8), samples, True, rank, events.append)
        return job_id

    def run(self) -> None:
        while self.loop.step():
            self.steps += 1
            for job_id, events in self.events.items():
                if events and isinstance(events[-1], (Drafted, Failed)):
                    self.ended.setdefault(job_id, self.steps)
            assert self.steps < 1000

    def close(self) -> None:
        self.loop.close()
        assert self.runner.pool.used == 0

    def computed(self, job_id: int) -> list[tuple[int, int]]:
        return [(event.start, event.end) for event in self.events[job_id] if isinstance(event, Computed)]


@pytest.mark.models
def test_a_short_prompt_does_not_wait_for_a_long_one(models: Models) -> None:
    house = House(models)
    long = house.begin(400, rank=0.0)
    short = house.begin(8, rank=1.0, first=30)
    middle = house.begin(50, rank=2.0, first=31)
    house.run()
    assert house.ended[short] == 2, "one step computes it, the next drafts"
    assert house.ended[short] < house.ended[middle] < house.ended[long]
    assert house.ended[long] <= 2 * 400 // BUDGET + 3 + 1
    house.close()


@pytest.mark.models
def test_a_long_prompt_ends_while_short_ones_keep_coming(models: Models) -> None:
    house = House(models)
    long = house.begin(100, rank=0.0)
    for number in range(60):
        house.begin(12, rank=1.0 + number, first=2 + number % 50)
    house.run()
    assert house.ended[long] <= 60
    assert len(house.ended) == 61
    house.close()


@pytest.mark.models
def test_the_smaller_rank_gets_on(models: Models) -> None:
    house = House(models)
    late = house.begin(300, rank=5.0)
    early = house.begin(200, rank=-5.0, first=7)
    house.run()
    assert house.ended[early] < house.ended[late]
    house.close()


@pytest.mark.models
def test_chunks_come_in_order_and_once(models: Models) -> None:
    house = House(models)
    jobs = [house.begin(length, first=3 + length, samples=2) for length in (1, 4, 5, 33, 70)]
    house.run()
    for job_id, length in zip(jobs, (1, 4, 5, 33, 70), strict=True):
        spans = house.computed(job_id)
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == length
        rest = [type(event) for event in house.events[job_id][len(spans) :]]
        assert rest == [FirstToken, FirstToken, Drafted, Drafted]
    assert house.loop.prefilled_tokens == 1 + 4 + 5 + 33 + 70
    house.close()


@pytest.mark.models
def test_a_prompt_that_comes_many_times_is_computed_once(models: Models) -> None:
    """All at once, before any of it is known; and once more, when it is shipped before anything is computed."""
    house = House(models)
    jobs = [house.begin(65, rank=float(number)) for number in range(4)]
    house.run()
    assert house.loop.prefilled_tokens == 65 + 3
    assert [house.events[job_id][-2].cached_tokens for job_id in jobs] == [0, 64, 64, 64]  # type: ignore[union-attr]
    assert len({house.events[job_id][-2].choice for job_id in jobs}) == 1  # type: ignore[union-attr]
    assert house.computed(house.begin(70)) == [(0, 64)]
    house.close()


@pytest.mark.models
def test_what_is_cached_is_given_up_for_new_prompts(models: Models) -> None:
    house = House(models, kv_cache_mib=1, max_model_len=320, prefill_chunk_tokens=512)
    total = house.runner.pool.total
    count = 2 * total * SIZE // 300
    assert 3 < count < 60, "each prompt needs another beginning"
    for number in range(count):
        job = house.begin(300, first=number)
        house.run()
        house.loop.release(job)
        house.runner.check_integrity()
    assert 300 // SIZE < house.runner.pool.cached <= total
    assert house.loop.prefilled_tokens == 300 * count
    for number, cached in ((count - 1, 296), (0, 0)):
        job = house.begin(300, first=number)
        house.run()
        assert house.events[job][-2].cached_tokens == cached  # type: ignore[union-attr]
    house.close()


@pytest.mark.models
def test_without_prefix_caching_everything_is_computed(models: Models) -> None:
    house = House(models, prefix_caching=False)
    for _ in range(2):
        house.begin(30)
        house.run()
    assert house.loop.prefilled_tokens == 60
    assert house.runner.pool.cached == 0
    house.close()


@pytest.mark.models
def test_only_the_prompt_at_fault_is_lost(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over several that fails is tried again with each alone."""
    house = House(models)
    jobs = [house.begin(12, first=first) for first in (1, 20, 40)]
    advance = PrefillRunner.advance_many

    def choosy(self: PrefillRunner, turns: list[tuple[PrefillTask, int]]) -> int:
        if any(task.request.request_id == str(jobs[1]) for task, _ in turns):
            raise RuntimeError("not this one")
        return advance(self, turns)

    monkeypatch.setattr(PrefillRunner, "advance_many", choosy)
    house.run()
    assert isinstance(house.events[jobs[1]][-1], Failed)
    assert all(isinstance(house.events[job_id][-1], Drafted) for job_id in (jobs[0], jobs[2]))
    house.close()


@pytest.mark.models
def test_an_engine_that_fails_for_all_is_given_up(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a broken device")

    monkeypatch.setattr(PrefillRunner, "advance_many", broken)
    house = House(models)
    jobs = [house.begin(12, first=first) for first in range(MAX_FAILURES + 1)]
    with pytest.raises(RuntimeError, match="a broken device"):
        house.run()
    failed = [job_id for job_id in jobs if any(isinstance(event, Failed) for event in house.events[job_id])]
    assert len(failed) == MAX_FAILURES
    house.close()
