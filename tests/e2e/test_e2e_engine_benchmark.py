"""The engine's benchmark: its commands run, its contexts and phases are what they say, and so are its ratios."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import acceptance, engine
from benchmarks.engine_floor import copy_bandwidth, floor_bytes, weight_bytes
from benchmarks.engine_report import Case, overhead, rows, table, targets
from benchmarks.engine_rig import PHASES, Rig, Timing
from benchmarks.engine_shapes import SHAPES, random_models
from benchmarks.local_system import REPOSITORY
from branchline.engine.models.protocol import Models
from branchline.engine.tree_spec import parse_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> Models:
    return random_models("tiny", CPU, torch.float32, acceptance=3)


def timing(total: float, host: float = 0.0) -> Timing:
    return Timing(total, {"verify": total - host, "accept": 0.0, "rewind": 0.0, "draft": 0.0, "host": host}, 1)


def test_ratios_are_those_of_the_rounds() -> None:
    trees = {name: parse_tree(name) for name in ("none", "dynamic:4,4,16")}
    plain, tree, long = (Case(*key) for key in (("none", 1, 512), ("dynamic:4,4,16", 1, 512), ("none", 1, 2048)))
    timings = {
        plain: [timing(10.0), timing(100.0), timing(20.0)],  # the machine was busy in the second round
        tree: [timing(14.0, 0.7), timing(150.0, 7.5), timing(30.0, 3.0)],
        long: [timing(12.0), timing(130.0), timing(24.0)],
        Case("none", 1, 128): [timing(10.0), timing(100.0), timing(20.0)],
    }
    by_case = {(row["tree"], row["context"]): row for row in rows(timings, trees)}
    assert by_case["dynamic:4,4,16", 512]["to_plain"] == 1.5
    assert by_case["dynamic:4,4,16", 512]["overhead"] == 0.05
    assert by_case["none", 512]["ms"]["iteration"] == {"median": 20.0, "p90": 84.0}
    found = {(target["tree"], target["what"]): target for target in targets(timings, trees)}
    iteration = found["dynamic:4,4,16", "iteration / plain step"]
    assert (iteration["measured"], iteration["at_most"], iteration["met"]) == (1.5, 1.46, False)
    share = found["dynamic:4,4,16", "(accept + rewind + host) / iteration"]
    assert (share["measured"], share["at_most"], share["met"]) == (0.05, 0.06, True)
    growth = found["none", "iteration / at 128 tokens"]
    assert (growth["measured"], growth["at_most"], growth["met"]) == (1.2, 1.25, True)
    assert len(found) == 3
    assert len({len(line) for line in table(rows(timings, trees)).splitlines()}) == 1


def test_phases_of_unobserved_iterations_are_left_out() -> None:
    assert overhead([Timing(1.0, {}, 1)]) is None


@pytest.mark.models
@pytest.mark.parametrize("spec", ["none", "default", "chain:3", "dynamic:4,4,16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_iteration_is_timed_at_its_context(tiny: Models, spec: str, batch: int) -> None:
    rig = Rig(tiny, parse_tree(spec), max_batch=4, max_context=256)
    for context in (128, 256, 128):
        measured = rig.at(batch, context)
        emitted, left = divmod(measured.emitted, batch)
        assert left == 0, "a forced model does the same in every row"
        lengths = [allocation.length - emitted for allocation in rig.allocations]
        assert len(lengths) == batch
        assert all(context <= length <= context + rig.tree.depth for length in lengths)
        assert list(measured.phases) == list(PHASES)
        assert sum(measured.phases.values()) == pytest.approx(measured.total)
        assert min(measured.phases.values()) >= 0


@pytest.mark.models
@pytest.mark.parametrize("wanted", [1, 2, 4])
@pytest.mark.parametrize("spec", ["chain:3", "dynamic:3,4,16"])
def test_acceptance_is_forced(spec: str, wanted: int) -> None:
    rig = Rig(random_models("tiny", CPU, torch.float32, wanted), parse_tree(spec), 1, 128, phases=False)
    rig.place(1, 128)
    rig.run(4)  # the first steps find the run's beginning
    assert rig.run(10)[1] == 10 * wanted


@pytest.mark.models
def test_the_floor_counts_what_an_iteration_reads(tiny: Models) -> None:
    shape = SHAPES["tiny"]
    hidden, inner, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    layer = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * inner
    target = shape.num_layers * (layer + 2 * hidden) + hidden + hidden * shape.vocab_size
    head = layer + hidden * (hidden + 2 * kv) + 4 * hidden + hidden * shape.vocab_size
    fusing = 3 * hidden * hidden
    assert floor_bytes(tiny, 0) == 4 * target
    assert floor_bytes(tiny, 4) == 4 * (target + fusing + 4 * head)
    assert weight_bytes(None) == 0
    assert copy_bandwidth(CPU) > 1e8


#: Runs the benchmark, and fails when what a GPU machine may lack has been imported.
WITHOUT_VLLM = """
import sys
from benchmarks.engine import main
main(sys.argv[1:])
assert not {"vllm", "ray", "grpc"} & set(sys.modules)
"""


def run(*flags: str, program: tuple[str, ...] = ("-m", "benchmarks.engine")) -> dict[str, Any]:
    command = [sys.executable, *program, "--quick", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert "iteration" in done.stderr
    return report


@pytest.mark.models
def test_a_shape_runs_as_it_would_on_a_gpu() -> None:
    report = run("--shape", "tiny", "--dtype", "float32", "--threads", "1", program=("-c", WITHOUT_VLLM))
    assert {row["tree"] for row in report["iterations"]} == {"none", "static 16, depth 4", "dynamic:2,6,16"}
    assert {(row["batch"], row["context"]) for row in report["iterations"]} == {(1, 128), (1, 512), (8, 128), (8, 512)}
    assert all(row["to_plain"] == 1 for row in report["iterations"] if row["tree"] == "none")
    floors = report["floor"]["by_tree"]
    assert {name: entry["tokens_per_step"] for name, entry in floors.items()} == {
        "none": 1.0,
        "static 16, depth 4": 3.0,
        "dynamic:2,6,16": 3.0,
    }
    assert all(entry["ratio"] > 1 for entry in floors.values()), "faster than the memory"
    assert report["machine"]["threads"] == 1
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert "plain_decoding" not in report


@pytest.mark.models
def test_the_default_model_beside_vllm() -> None:
    sizes = ["--rounds", "1", "--context", "512", "--batch", "1", "--tree", "dynamic:2,6,16", "--output-tokens", "8"]
    report = run(*sizes, "--vllm-eager")
    assert {target["what"] for target in report["targets"]} == {
        "iteration / plain step",
        "(accept + rewind + host) / iteration",
    }
    (plain,) = report["plain_decoding"]["by_batch"]
    assert plain["ratio"] > 0
    assert min(plain["branchline_tokens_per_second"], plain["vllm_tokens_per_second"]) > 0
    assert report["plain_decoding"]["vllm"]["threads"] == report["machine"]["threads"]


@pytest.mark.models
def test_the_noise_helps_the_drafter(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--provider", "reference", "--dtype", "float32", "--limit", "6", "--max-tokens", "24", "--in-flight", "6"]
    assert acceptance.main([*flags, "--tree", "default", "--temperature", "1.0", "--draft-noise", "both"]) == 0
    report = json.loads(capsys.readouterr().out)
    shared, without = report["runs"]
    assert (shared["draft_noise"], without["draft_noise"]) == (True, False)
    assert shared["tokens"] == without["tokens"], "the drafter's ranking changed the text"
    (gain,) = report["gain_of_noise"]
    assert gain["ratio"] > 1.02


def test_the_command_line_fills_in_what_is_not_said() -> None:
    options = engine.parse(["--device", "cuda", "--shape", "llama-3.1-8b"])
    assert (options.provider, options.vllm, options.dtype) == ("reference", False, "bfloat16")
    assert options.trees[0] == "none"
    assert engine.parse([]).vllm
    assert engine.parse(["--tree", "chain:2"]).trees == ["none", "chain:2"]
