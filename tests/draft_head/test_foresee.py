"""What is foreseen is what the engine does, and what is counted beside it is what it reports."""

from __future__ import annotations

import pytest
from tiny_chat import save_agreeing_pair

from branchline.config import EngineConfig, ModelConfig
from branchline.core import Request, SamplingParams
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.offline import Pipeline
from branchline.engine.tree import DynamicTree, StaticTree
from tools.draft_head.foresee import Text, accept, foresee, node_counts
from tools.draft_head.measure import Meter, Tally
from tools.draft_head.shapes import Path

pytestmark = pytest.mark.models

SHAPE: tuple[Path, ...] = (
    *((rank,) for rank in range(5)),
    *((first, rank) for first in range(3) for rank in range(3 - first)),
    *((0, first, rank) for first in range(2) for rank in range(3)),
    *((0, 0, 0, rank) for rank in range(3)),
)
ENGINE = EngineConfig(threads=1, kv_cache_mib=8, block_size=4, max_batch=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    model, head = save_agreeing_pair(tmp_path_factory.mktemp("pair"))
    names = ModelConfig(model=str(model), draft=str(head), dtype="float32", provider="reference", device="cpu")
    return load_models(names, ENGINE)


def requests(temperature: float, stop: tuple[int, ...] = ()) -> list[Request]:
    return [
        Request(str(number), (3, 1, number), 24, SamplingParams(temperature, seed=number), stop_token_ids=stop)
        for number in range(7)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("stop", [(), (5,)])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[:4], ((0,), (0, 0), (0, 0, 0))])
def test_what_is_foreseen_comes_about(
    models: Models, temperature: float, stop: tuple[int, ...], shape: tuple[Path, ...]
) -> None:
    """Told from plain decoding's texts, iteration by iteration, category by category."""
    asked = [(request, "odd" if int(request.request_id) % 2 else "even") for request in requests(temperature, stop)]
    outputs = Pipeline(models, StaticTree("none", ()), ENGINE).run([request for request, _ in asked], 3)
    texts = [foresee(models, category, request, outputs[request.request_id].token_ids) for request, category in asked]
    told, run = accept(texts, set(shape)), meter(models, shape).measure(asked)
    assert (told.forwards, told.accepted) == (run.forwards, run.accepted)
    assert told.lengths[: len(run.lengths)] == run.lengths
    assert not any(told.lengths[len(run.lengths) :])
    assert {name: sums for name, sums in told.categories.items() if any(sums)} == run.categories
    assert run.accepted > 5  # there was something to foresee


def test_nodes_are_counted_at_every_place() -> None:
    texts = [Text("a", ((0, 3), (), (1,))), Text("b", ()), Text("b", ((0,),))]
    counts = node_counts(texts)
    assert counts.steps == 4
    assert {path: count for path, count in counts.accepted.items() if count} == {(0,): 2, (0, 3): 1, (1,): 1}
    assert counts.accepted.keys() >= {(9,), (0, 0), (1, 9), (0, 3, 9)}
    assert (2, 0) not in counts.accepted


def test_the_loop_goes_on_behind_what_it_accepted() -> None:
    places = ((0, 1, 0), (1, 0), (0,), (), (0, 0), (0,), ())
    # 2 and the model's own, then none and its own, then 2 that end the request with the model's own.
    told = accept([Text("a", places)], {(0,), (0, 1), (0, 0)})
    assert (told.forwards, told.accepted, told.lengths[:4]) == (3, 4, (1, 0, 2, 0))
    # As many, but the last accepted token ends it.
    told = accept([Text("a", places[:6])], {(0,), (0, 1), (0, 0)})
    assert (told.forwards, told.accepted, told.lengths[:4]) == (3, 3, (1, 1, 1, 0))


def test_a_meter_sums_by_category_and_times_the_loop_alone(models: Models) -> None:
    tree = DynamicTree("dynamic:3,3,8", 3, 3, 8)
    one = Meter(models, tree, ENGINE)
    first, second = requests(0.0)[:4], requests(0.0)[4:]
    total = one.measure([(request, "a") for request in first]) + one.measure([(request, "b") for request in second])
    together = meter_of(models, tree).measure([*((r, "a") for r in first), *((r, "b") for r in second)])
    assert (total.forwards, total.accepted) == (together.forwards, together.accepted)
    assert total.lengths == together.lengths
    assert total.categories == together.categories
    assert sum(forwards for forwards, _ in total.categories.values()) == total.forwards
    assert total.tokens == 7 * 23  # the first token of each is prefill's
    assert total.seconds > 0
    assert total.tokens_per_s == pytest.approx(total.tokens / total.seconds)


def test_plain_decoding_has_no_depths(models: Models) -> None:
    tally = meter(models, ()).measure([(requests(0.0)[0], "any")])
    assert (tally.acceptance_length, tally.by_depth) == (1.0, [])
    assert (Tally() + tally).figures() == tally.figures()


def meter(models: Models, shape: tuple[Path, ...]) -> Meter:
    return meter_of(models, StaticTree("measured", shape))


def meter_of(models: Models, tree: StaticTree | DynamicTree) -> Meter:
    return Meter(models, tree, ENGINE)
