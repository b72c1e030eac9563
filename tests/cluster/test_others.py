"""Several models in one configuration: what differs, what is taken over, and which processes that makes."""

from __future__ import annotations

from typing import Any

import pytest

from branchline.config import Config, ConfigError, from_mapping, to_mapping
from cluster.placement import Plan, plan
from cluster.rollout import refused

OTHERS = {
    "small-1.5": {"model": {"model": "there", "draft": "none"}, "decode": {"replicas": 2, "num_cpus": 2.0}},
    "org/large": {"engine": {"max_batch": 2}, "prefill": {"port": 7100}, "gateway": {"tool_parser": "hermes"}},
}
MAIN: dict[str, Any] = {
    "model": {"model": "here", "dtype": "float32"},
    "prefill": {"port": 7000, "metrics_port": 7001},
    "gateway": {"reasoning_parser": "qwen3", "prefill_workers": ["h:1"], "served_model_name": "mine"},
}


def test_they_take_over_all_but_what_is_the_main_ones_own() -> None:
    config = from_mapping({**MAIN, "others": OTHERS})
    main, small, large = config.each().values()
    assert main == from_mapping(MAIN)
    assert (small.model.model, small.model.dtype, small.decode.replicas) == ("there", "float32", 2)
    assert (small.gateway.served_model_name, small.gateway.reasoning_parser) == ("small-1.5", "")
    assert (small.prefill.port, small.prefill.metrics_port, small.decode.metrics_port) == (0, 0, -1)
    assert small.gateway.prefill_workers == ()
    assert (large.model.model, large.engine.max_batch, large.prefill.port) == ("here", 2, 7100)
    assert large.gateway.tool_parser == "hermes"
    assert not any(own.others for own in (main, small, large))


def test_ports_are_the_same_where_each_has_a_node_of_its_own() -> None:
    (_, other) = from_mapping({"decode": {"port": 7000, "resource": "decode"}, "others": {"x": {}}}).each().values()
    assert other.decode.port == 7000


def test_it_goes_through_yaml_and_flags() -> None:
    config = from_mapping({**MAIN, "others": OTHERS})
    assert from_mapping(to_mapping(config)) == config
    changed = config.override(**{"others.org/large.engine.max_batch": 3})
    assert changed.each()["org/large"].engine.max_batch == 3
    assert config.each()["org/large"].engine.max_batch == 2
    assert list(Config().each()) == [""]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"a b": {}}, r"others\.a b: a model's name has letters"),
        ({"": {}}, r"others\.: a model's name"),
        ({"mine": {}}, r"others\.mine: the main model has that name"),
        ({"x": 3}, r"others\.x: must be a mapping"),
        ([], "others: must be a mapping, got list"),
        ({"x": {"ray": {}}}, r"others\.x\.ray: can't differ"),
        ({"x": {"gateway": {"http_port": 1}}}, r"others\.x\.gateway\.http_port: can't differ"),
        ({"x": {"engine": {"max_batch": 0}}}, r"others\.x\.engine\.max_batch: must be at least 1"),
        ({"x": {"engine": {"batch": 1}}}, r"others\.x\.engine\.batch: unknown field"),
        ({"x": {"decode": 1}}, r"others\.x\.decode: must be a mapping"),
    ],
)
def test_mistakes_are_named(others: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({**MAIN, "others": others})


def test_each_model_has_workers_and_all_have_the_gateways() -> None:
    seats = plan(from_mapping({**MAIN, "others": OTHERS}))
    assert [(seat.name, seat.model) for seat in seats] == [
        ("prefill-0", ""),
        ("prefill-1", "small-1.5"),
        ("prefill-2", "org/large"),
        ("decode-0", ""),
        ("decode-1", "small-1.5"),
        ("decode-2", "small-1.5"),
        ("decode-3", "org/large"),
        ("gateway-0", ""),
    ]
    found = {seat.name: seat for seat in seats}
    assert found["prefill-1"].config.model.model == "there"
    assert found["prefill-2"].config.prefill.port == 7100
    assert found["decode-2"].claims.num_cpus == 2.0
    assert list(found["gateway-0"].config.others) == list(OTHERS)
    assert not found["decode-2"].config.others


def test_cores_are_shared_out_over_all_models() -> None:
    whole = Plan(from_mapping({"others": {"small": {}}}), tuple(range(8)))
    cores = [core for seat in whole.first() for core in seat.cores]
    assert sorted(cores) == list(range(8))


def test_a_later_worker_is_one_of_its_model() -> None:
    seat = Plan(from_mapping({**MAIN, "others": OTHERS})).seat("decode", 7, 2, "small-1.5")
    assert (seat.name, seat.model, seat.config.model.model) == ("decode-7", "small-1.5", "there")


def test_wrong_claims_name_the_model() -> None:
    with pytest.raises(ConfigError, match=r"^others\.x\.prefill\.num_gpus: must be above 0"):
        Plan(from_mapping({"others": {"x": {"model": {"device": "cuda"}}}})).check()


def test_what_may_change_while_serving() -> None:
    assert not refused(["others.x.engine.max_batch", "engine.max_batch"], ["x"])
    assert refused(["others.x.model.model"], ["x"]) == "others.x.model.model"
    assert refused(["others.y.engine.max_batch"], ["x"]) == "others.y.engine.max_batch"
