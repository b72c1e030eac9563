"""What is counted beside the engine is what the engine reports, node by node."""

from __future__ import annotations

import pytest
from tiny_chat import save_agreeing_pair

from branchline.config import EngineConfig, ModelConfig
from branchline.core import Request, SamplingParams
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.tree import DynamicTree, StaticTree
from tools.draft_head.measure import Meter, Tally
from tools.draft_head.probe import probe
from tools.draft_head.shapes import expected_length, probe_shape

pytestmark = pytest.mark.models

SHAPE = probe_shape(24, guesses=5, depth=4)
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
def test_a_probe_says_how_long_its_tree_accepts(models: Models, temperature: float, stop: tuple[int, ...]) -> None:
    counts = probe(models, ENGINE, SHAPE, requests(temperature, stop))
    tally = meter(models, SHAPE).measure([(request, "any") for request in requests(temperature, stop)])
    # The same texts, decoded alone and together.
    assert counts.steps == tally.forwards
    assert expected_length(SHAPE, counts) == pytest.approx(tally.acceptance_length)
    by_depth = [sum(counts.accepted[path] for path in SHAPE if len(path) == depth) for depth in range(1, 5)]
    assert [round(count / counts.steps, 4) for count in by_depth] == tally.by_depth
    assert tally.accepted > 10  # there was something to count


def test_a_part_of_the_probe_accepts_what_its_nodes_say_if_steps_were_the_same(models: Models) -> None:
    """A smaller tree goes through other steps, so its length is near, not equal, to what the probe expects of it."""
    counts = probe(models, ENGINE, SHAPE, requests(0.0))
    tally = meter(models, SHAPE[:6]).measure([(request, "any") for request in requests(0.0)])
    assert tally.acceptance_length == pytest.approx(expected_length(SHAPE[:6], counts), rel=0.25)


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


def meter(models: Models, shape: tuple[tuple[int, ...], ...]) -> Meter:
    return meter_of(models, StaticTree("measured", shape))


def meter_of(models: Models, tree: StaticTree | DynamicTree) -> Meter:
    return Meter(models, tree, ENGINE)
