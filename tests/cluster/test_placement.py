"""What each actor may use. No Ray is started."""

from __future__ import annotations

import itertools

import pytest

from branchline.config import Config, ConfigError
from cluster.actors import reachable
from cluster.cores import Cores
from cluster.placement import Seat, needed_resources, plan


def seats(cores: range = range(0), **flags: object) -> dict[str, Seat]:
    return {seat.name: seat for seat in plan(Config().override(**flags), list(cores))}


def test_workers_come_before_gateways() -> None:
    names = list(seats(**{"prefill.replicas": 2, "gateway.replicas": 2}))
    assert names == ["prefill-0", "prefill-1", "decode-0", "gateway-0", "gateway-1"]


def test_few_cores_are_shared() -> None:
    placed = seats(range(2))
    assert [seat.cores for seat in placed.values()] == [(), (), ()]
    assert [seat.config.engine.threads for seat in placed.values()] == [2, 1, 1]  # prefill, decode, gateway


@pytest.mark.parametrize("cores", [4, 7, 16])
@pytest.mark.parametrize("replicas", [(1, 1), (1, 3), (2, 2)])
def test_each_worker_gets_cores_of_its_own(cores: int, replicas: tuple[int, int]) -> None:
    placed = seats(range(cores), **{"prefill.replicas": replicas[0], "decode.replicas": replicas[1]})
    workers = [seat for seat in placed.values() if seat.role != "gateway"]
    assert sorted(itertools.chain.from_iterable(seat.cores for seat in workers)) == list(range(cores))
    assert all(seat.config.engine.threads == len(seat.cores) >= 1 for seat in workers)
    assert placed["gateway-0"].cores == ()


def test_cores_follow_num_cpus() -> None:
    placed = seats(range(8), **{"prefill.num_cpus": 1, "decode.num_cpus": 3})
    assert (placed["prefill-0"].cores, placed["decode-0"].cores) == ((0, 1), (2, 3, 4, 5, 6, 7))


def test_workers_on_gpus_are_not_pinned() -> None:
    placed = seats(range(8), **{"prefill.num_gpus": 1, "decode.num_gpus": 0})
    assert (placed["prefill-0"].cores, placed["decode-0"].cores) == ((), tuple(range(8)))


def test_cuda_without_a_claim_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^decode.num_gpus: must be above 0"):
        seats(**{"model.device": "cuda", "prefill.num_gpus": 1})


def test_on_a_shared_ray_threads_follow_the_claim() -> None:
    placed = seats(**{"decode.num_cpus": 6.5, "prefill.num_cpus": 0.5})
    assert placed["decode-0"].config.engine.threads == 6
    assert placed["prefill-0"].config.engine.threads == 1


def test_a_fixed_thread_count_stays() -> None:
    placed = seats(range(8), **{"engine.threads": 3})
    assert [placed[name].config.engine.threads for name in ("prefill-0", "decode-0", "gateway-0")] == [3, 3, 1]


def test_fixed_ports_count_up_and_zero_stays() -> None:
    placed = seats(**{"decode.port": 7000, "decode.replicas": 2, "gateway.grpc_port": 8000, "gateway.replicas": 2})
    assert (placed["decode-0"].config.decode.port, placed["decode-1"].config.decode.port) == (7000, 7001)
    assert (placed["gateway-0"].config.gateway.grpc_port, placed["gateway-1"].config.gateway.grpc_port) == (8000, 8001)
    assert placed["prefill-0"].config.prefill.port == 0
    for port, expected in ((-1, [-1, -1]), (0, [0, 0]), (9000, [9000, 9001])):
        placed = seats(**{"gateway.http_port": port, "gateway.replicas": 2})
        assert [placed[f"gateway-{index}"].config.gateway.http_port for index in range(2)] == expected


def test_with_a_resource_of_its_own_each_worker_has_the_same_port() -> None:
    placed = seats(**{"decode.port": 7000, "decode.replicas": 2, "decode.resource": "decoder", "prefill.port": 8000})
    assert [placed[f"decode-{index}"].config.decode.port for index in range(2)] == [7000, 7000]
    both: dict[str, object] = {"gateway.grpc_port": 8000, "gateway.http_port": 9000, "gateway.replicas": 2}
    gateways = seats(**both, **{"gateway.resource": "door"})
    ports = [(seat.config.gateway.grpc_port, seat.config.gateway.http_port) for seat in list(gateways.values())[-2:]]
    assert ports == [(8000, 9000)] * 2
    assert [placed[name].claims.resource for name in ("prefill-0", "decode-0", "decode-1", "gateway-0")] == [
        *("", "decoder", "decoder", ""),
    ]
    assert needed_resources(list(placed.values())) == {"CPU": 4, "GPU": 0, "decoder": 2}


def test_claims_add_up() -> None:
    placed = list(seats(**{"prefill.replicas": 2, "prefill.num_gpus": 0.5, "decode.num_cpus": 4}).values())
    assert needed_resources(placed) == {"CPU": 7, "GPU": 1}


@pytest.mark.parametrize(
    ("address", "expected"),
    [("0.0.0.0:5", "10.1.2.3:5"), ("[::]:5", "10.1.2.3:5"), ("127.0.0.1:5", "127.0.0.1:5"), ("box:5", "box:5")],
)
def test_a_wildcard_host_becomes_the_nodes_own(address: str, expected: str) -> None:
    assert reachable(address, "10.1.2.3") == expected


def test_ports_for_metrics_count_up_where_they_are_fixed() -> None:
    placed = seats(**{"decode.replicas": 2, "decode.metrics_port": 9100, "prefill.metrics_port": 0})
    ports = [getattr(seat.config, seat.role).metrics_port for seat in placed.values()]
    assert ports == [0, 9100, 9101, -1]


def test_cores_are_given_once_and_come_back() -> None:
    cores = Cores()
    assert cores.take("a", "node", range(6), 4) == (0, 1, 2, 3)
    assert cores.take("b", "node", range(6), 4) == (), "too few are left"
    assert cores.take("b", "node", range(6), 2) == (4, 5)
    assert cores.take("c", "other", range(6), 4) == (0, 1, 2, 3)
    assert cores.take("d", "small", range(3), 1) == (), "three cores are shared by all"
    assert cores.take("a", "other", range(6), 2) == (4, 5), "restarted elsewhere"
    for name in "abc":
        cores.give_back(name)
    assert cores.given == 0
