"""What an iteration costs, phase by phase, and beside vLLM's engine: for batch x tree x context.

    python -m benchmarks.engine > result.json              # the default model on the CPU, beside vLLM
    python -m benchmarks.engine --quick                    # tries everything out, measures nothing well
    python -m benchmarks.engine --device cuda --provider reference
    python -m benchmarks.engine --device cuda --shape llama-3.1-8b

A table goes to standard error, JSON to standard output. Every round times every case once, in turn, so that what else
happens on the machine hits all alike. With the reference provider the iteration is also held against the time that
reading the weights takes (benchmarks/engine_floor.py). `--shape` takes random weights of that shape, made in memory,
and forces every iteration to emit `--acceptance` tokens (benchmarks/engine_shapes.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.engine_report import Case
    from benchmarks.engine_rig import Rig, Timing
    from branchline.engine.models.protocol import Models
    from branchline.engine.tree import TreeTopology

#: Sixteen nodes of depth four: the likeliest of the default head's guesses, parents first.
STATIC_16 = "[[0],[1],[0,0],[2],[3],[0,1],[1,0],[4],[0,0,0],[5],[0,2],[0,3],[2,0],[0,0,1],[1,1],[0,0,0,0]]"
CPU_TREES = ("none", "default", "chain:3", STATIC_16, "dynamic:2,6,16", "dynamic:3,4,16", "dynamic:4,4,16")
GPU_TREES = ("none", "default", "chain:3", "dynamic:4,4,16", "dynamic:4,8,32", "dynamic:6,8,32", "dynamic:6,8,64")
ROUNDS, STEPS, VLLM_ROUNDS = 30, 60, 6
#: What isn't said on the command line, by its name there.
FULL: dict[str, Any] = {
    "contexts": [128, 512, 2048],
    "batches": [1, 8],
    "rounds": ROUNDS,
    "steps": STEPS,
    "vllm_rounds": VLLM_ROUNDS,
}
QUICK = FULL | {
    "trees": [STATIC_16, "dynamic:2,6,16"],
    "contexts": [128, 512],
    "rounds": 2,
    "steps": 6,
    "vllm_rounds": 1,
}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    from benchmarks import engine_report, machine
    from benchmarks.engine_floor import floor_table
    from benchmarks.engine_plain import plain_table
    from branchline.engine.tree_spec import parse_tree

    models = load(options)
    trees = {name_of(spec): parse_tree(spec) for spec in options.trees}
    timings = phases(options, models, trees)
    entries, targets = engine_report.rows(timings, trees), engine_report.targets(timings, trees)
    report: dict[str, Any] = {
        "command": "python -m benchmarks.engine " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine.facts(),
        "settings": {name: value for name, value in vars(options).items() if name != "trees"},
        "trees": dict(zip(trees, options.trees, strict=True)),
        "iterations": entries,
        "targets": targets if models.device.type == "cpu" and not options.shape else [],
    }
    say("\n" + engine_report.table(entries) + "\n")
    if report["targets"]:
        say(engine_report.target_table(targets) + "\n")
        report["products"] = products(options, trees)
        if report["products"]:
            say(engine_report.product_table(report["products"]) + "\n")
    if options.provider == "reference":
        report["floor"] = floor(options, models, trees)
        say("\n" + floor_table(report["floor"]["by_tree"]) + "\n")
    if options.vllm:
        report["plain_decoding"] = beside_vllm(options, models)
        say("\n" + plain_table(report["plain_decoding"]) + "\n")
    print(json.dumps(report, indent=2))
    return 0


def load(options: argparse.Namespace) -> Models:
    """The model that is measured: loaded, or made up."""
    import torch

    from benchmarks.engine_shapes import random_models
    from branchline.config import Config
    from branchline.engine.assemble import assemble
    from branchline.engine.models.load import pick_device

    if options.shape:
        return random_models(
            options.shape, pick_device(options.device), getattr(torch, options.dtype), options.acceptance
        )
    fields = ("model", "draft", "dtype", "provider", "device")
    flags = {f"model.{name}": getattr(options, name) for name in fields} | {"engine.compile": options.compile}
    config = Config().override(**flags)
    return assemble(config, say)[0]


def phases(options: argparse.Namespace, models: Models, trees: dict[str, TreeTopology]) -> dict[Case, list[Timing]]:
    """Every case, `--rounds` times, in turn, after a round that doesn't count."""
    from benchmarks.engine_report import Case
    from benchmarks.engine_rig import Rig

    longest = max(options.contexts)
    rigs = {name: Rig(models, tree, max(options.batches), longest) for name, tree in trees.items()}
    cases = [Case(name, batch, context) for batch in options.batches for context in options.contexts for name in trees]
    timings: dict[Case, list[Timing]] = {case: [] for case in cases}
    for number in range(options.rounds + 1):
        say(f"phases, round {number} of {options.rounds}")
        for case in cases:
            timing = rigs[case.tree].at(case.batch, case.context)
            if number > 0:
                timings[case].append(timing)
    return timings


def products(options: argparse.Namespace, trees: dict[str, TreeTopology]) -> dict[str, Any]:
    """The matrix products alone: what a tree's rows cost beside one. Nothing for models that aren't Llama's kind."""
    import torch

    from benchmarks.engine_products import measure
    from branchline.engine.models.checkpoint import read_config
    from branchline.engine.models.locate import locate_model
    from branchline.engine.models.protocol import ModelError
    from branchline.engine.models.reference_config import parse_target

    try:
        config = parse_target(read_config(locate_model(options.model)))
    except ModelError as error:
        say(f"matrix products alone: left out, {error}")
        return {}
    nodes = sorted({tree.num_nodes for tree in trees.values()} - {0})
    return measure(config, getattr(torch, options.dtype), nodes, options.rounds)


def floor(options: argparse.Namespace, models: Models, trees: dict[str, TreeTopology]) -> dict[str, Any]:
    """Iterations as a worker runs them, captured where there is a GPU, beside the time to read the weights."""
    from benchmarks.engine_floor import copy_bandwidth, measure

    bandwidth = copy_bandwidth(models.device)
    context = options.contexts[len(options.contexts) // 2]
    measured = {}
    for name, tree in trees.items():
        say(f"floor, tree {name}")
        rig = worker_rig(models, tree, 1, context)
        measured[name] = measure(models, rig, context, options.steps, bandwidth)
    return {"copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 2), "by_tree": measured}


def beside_vllm(options: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Plain decoding by both engines, with the same number of threads."""
    import torch

    from benchmarks.engine_plain import VllmEngine, compare
    from branchline.engine.tree_spec import parse_tree

    context = options.contexts[len(options.contexts) // 2]
    most = max(options.batches)
    rig = worker_rig(models, parse_tree("none"), most, context)
    say("starting vLLM's engine")
    with VllmEngine(
        model=options.model,
        dtype=options.dtype,
        context=context,
        max_batch=most,
        threads=torch.get_num_threads(),
        eager=options.vllm_eager,
    ) as vllm:
        return compare(
            rig,
            vllm,
            batches=options.batches,
            context=context,
            output_tokens=options.output_tokens,
            rounds=options.vllm_rounds,
            progress=say,
        )


def worker_rig(models: Models, tree: TreeTopology, max_batch: int, context: int) -> Rig:
    from benchmarks.engine_rig import Rig

    return Rig(models, tree, max_batch, context, phases=False)


def name_of(spec: str) -> str:
    return "static 16, depth 4" if spec == STATIC_16 else spec


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="default", help="a directory, a Hugging Face id, or default")
    add("--draft", default="default", help="an EAGLE-3 head's directory, or default")
    add("--shape", choices=["llama-3.1-8b", "tiny"], help="random weights of this shape instead of a model")
    add("--acceptance", type=int, default=3, help="with --shape: tokens that each iteration emits (%(default)s)")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--provider", choices=["vllm", "reference"], help="default: vllm on the CPU, reference on CUDA")
    add("--compile", action="store_true", help="compile the model, as vLLM's engine does by default")
    add("--threads", type=int, default=0, help="compute threads; 0 leaves it to PyTorch and OMP_NUM_THREADS")
    add(
        "--tree",
        action="append",
        dest="trees",
        help="may be repeated, as may the next two; plain decoding is always in",
    )
    add("--context", action="append", type=int, dest="contexts", help="tokens in the cache")
    add("--batch", action="append", type=int, dest="batches")
    add("--rounds", type=int, help=f"timings of each case (default: {ROUNDS})")
    add("--steps", type=int, help=f"iterations in a row, for the floor (default: {STEPS})")
    add("--no-vllm", dest="vllm", action="store_false", help="don't run vLLM's engine beside")
    add("--vllm-rounds", type=int, help=f"turns of each engine (default: {VLLM_ROUNDS})")
    add(
        "--vllm-eager",
        action="store_true",
        help="vLLM without its compilation, which takes a minute or two and helps it",
    )
    add("--output-tokens", type=int, default=48, help="tokens of each request beside vLLM (%(default)s)")
    add("--quick", action="store_true", help="few cases, few rounds: to see that it runs")
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    options.provider = "reference" if options.shape else options.provider or ("vllm" if on_cpu else "reference")
    options.vllm = options.vllm and on_cpu and not options.shape
    sizes = QUICK if options.quick else FULL
    for name, value in (*sizes.items(), ("trees", CPU_TREES if on_cpu else GPU_TREES)):
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.trees = list(dict.fromkeys(["none", *options.trees]))
    return options


if __name__ == "__main__":
    sys.exit(main())
