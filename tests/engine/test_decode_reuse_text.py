"""Second turns of chats in the decode engine: only what is new is shipped, and the text is that of a cold run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_helpers import BUSHY, VOCAB, TinyPipeline
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config
from test_prefix_reuse import SIZE, kv, text

from branchline.config import EngineConfig, ModelConfig
from branchline.core import InvalidRequestError, KvPart, KvSpan, Request, SamplingParams
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.prefill import PrefillRunner

pytestmark = pytest.mark.models

DYNAMIC = "dynamic:4,3,12"


def cold(models: Models, tree: str = BUSHY) -> TinyPipeline:
    return TinyPipeline(models, tree, prefix_caching=False)


def kept(pipeline: TinyPipeline, tokens: tuple[int, ...]) -> list[int]:
    """The decode side's blocks that a context of these tokens finds."""
    return pipeline.decode.pool.find(pipeline.decode.keys(tokens) or ())


def rows(pipeline: TinyPipeline, blocks: list[int], part: KvPart) -> torch.Tensor:
    """What the decode side has there: all rows of the target's, those from 1 on of the draft's."""
    geometry = pipeline.decode.target_kv if part is KvPart.TARGET else pipeline.decode.draft_kv
    assert geometry is not None
    start = 0 if part is KvPart.TARGET else 1
    span = KvSpan(part, (0, geometry.num_layers), (0, geometry.num_kv_heads), (start, len(blocks) * SIZE))
    return torch.frombuffer(bytearray(pipeline.decode.caches.read(blocks, span)), dtype=geometry.dtype)


def shipped(pipeline: TinyPipeline, context: int, held: int) -> int:
    """Bytes of a hand-off of which the first `held` tokens are there."""
    target, draft = pipeline.decode.target_kv, pipeline.decode.draft_kv
    assert draft is not None
    return (context - held) * target.bytes_per_token + (context + 1 - max(1, held)) * draft.bytes_per_token


@pytest.fixture(scope="module", params=["reference", "vllm"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """With a vocabulary of a dozen tokens, of which the head knows all but one: drafts are accepted now and then."""
    directory: Path = tmp_path_factory.mktemp("either")
    save_tiny_model(directory / "model", tiny_config(vocab_size=VOCAB, initializer_range=0.25))
    vocabulary = {"d2t": torch.ones(VOCAB - 1, dtype=torch.int64), "t2d": torch.arange(VOCAB) > 0}
    config = head_config(vocab_size=VOCAB, draft_vocab_size=VOCAB - 1)
    head = save_head(directory / "head", config, head_tensors(draft_vocab=VOCAB - 1) | vocabulary)
    loaded = ModelConfig(
        model=str(directory / "model"), draft=str(head), dtype="float32", provider=request.param, device="cpu"
    )
    return load_models(loaded, EngineConfig(threads=1))


def test_a_second_turn_ships_what_is_new_and_goes_on_as_from_cold(either: Models) -> None:
    """Tokens, and the acceptance along them."""
    warm = TinyPipeline(either, BUSHY)
    accepted = 0
    for seed in range(2):
        context: tuple[int, ...] = ()
        held = 0
        for turn in range(3):
            context = (*context, *text(10 * seed + turn, 13 - turn))
            request, before, reference = Request(str(turn), context, 23), warm.shipped, cold(either)
            outputs = reference.run_text([request])
            assert warm.run_text([request]) == outputs
            assert warm.forwards == reference.forwards
            assert warm.shipped - before == shipped(warm, len(context), held)
            assert reference.shipped == shipped(warm, len(context), 0)
            accepted += 22 - warm.forwards
            context += tuple(outputs[str(turn)])
            held = (len(context) - 1) // SIZE * SIZE
    assert accepted > 0, "nothing was ever accepted: nothing was tested"


@pytest.mark.parametrize("tree", [BUSHY, DYNAMIC, "chain:2"])
@pytest.mark.parametrize("pipelined", [False, True])
def test_what_decoding_leaves_is_what_prefill_computes(tiny: Models, tree: str, pipelined: bool) -> None:
    """The rows of accepted paths, the draft head's from the target's states there, up to rounding; and neither the last
    token, which has no rows, nor what was drafted beyond it."""
    warm = TinyPipeline(tiny, tree, pipelined=pipelined)
    for seed in range(4):
        sampling = SamplingParams(0.8, seed=seed) if seed % 2 else SamplingParams()
        request = Request("r", text(seed, 9 + seed), 31, sampling, stop_token_ids=(3,) if seed > 2 else ())
        tokens = (*request.prompt, *warm.run_text([request])["r"])
        blocks = kept(warm, tokens)
        assert len(blocks) == (len(tokens) - 1) // SIZE
        runner: PrefillRunner = cold(tiny, tree).prefill
        task = runner.begin(Request("r", tokens, 5))
        while not task.done:
            runner.advance(task)
        end = len(blocks) * SIZE
        for part, start in ((KvPart.TARGET, 0), (KvPart.DRAFT, 1)):
            torch.testing.assert_close(
                rows(warm, blocks, part), kv(runner, task, part, start, end), atol=2e-5, rtol=1e-4
            )


def test_an_aborted_request_leaves_what_it_had(tiny: Models) -> None:
    warm = TinyPipeline(tiny, BUSHY)
    request = Request("r", text(1, 10), 40)
    sample = warm.hand_off(request)
    emitted = [sample.first_token]
    while len(emitted) < 12:
        emitted += warm.decode.step().results[0].token_ids
    warm.decode.release(sample.allocation)
    tokens = (*request.prompt, *emitted)
    assert len(kept(warm, tokens)) == (len(tokens) - 1) // SIZE
    again = Request("r", request.prompt, 40, emitted=tuple(emitted))
    assert warm.run_text([again]) == cold(tiny).run_text([again])


def test_rows_that_nobody_drafted_are_not_reused(tiny: Models) -> None:
    """Without draft KV nothing is kept; from where nodes are no longer drafted on, neither."""
    whole = text(2, 21)
    warm = TinyPipeline(tiny, BUSHY)
    warm.run_text([Request("cold", whole, 20)], ship_draft=False)
    assert warm.decode.pool.cached == 0
    request = Request("plain", whole, 20, draft_nodes=0)
    tokens = (*whole, *warm.run_text([request])["plain"])
    assert len(kept(warm, tokens)) == len(whole) // SIZE
    turn = Request("next", (*tokens, 1, 2), 20)
    reference = cold(tiny)
    assert warm.run_text([turn]) == reference.run_text([turn])
    assert warm.forwards == reference.forwards
    # A cold drafter may still begin with KV that is there.
    before = warm.shipped
    other = Request("other", (*tokens, 3), 20)
    assert warm.run_text([other], ship_draft=False) == cold(tiny).run_text([other])
    held = (len(tokens) - 1) // SIZE * SIZE  # `next` has completed them
    assert warm.shipped - before == (len(other.prompt) - held) * warm.decode.target_kv.bytes_per_token


def test_a_worker_that_does_not_draft_keeps_the_targets_kv(tiny: Models) -> None:
    warm, request = TinyPipeline(tiny, "none"), Request("r", text(3, 11), 20)
    tokens = (*request.prompt, *warm.run_text([request])["r"])
    assert len(kept(warm, tokens)) == (len(tokens) - 1) // SIZE
    turn = Request("next", (*tokens, 1, 2), 20)
    assert warm.run_text([turn]) == cold(tiny, "none").run_text([turn])


@pytest.mark.parametrize("pipelined", [False, True])
def test_what_is_kept_is_never_written(tiny: Models, pipelined: bool) -> None:
    """Neither by hand-offs, nor by trees, rewinds and other samples' rows."""
    warm, prompt = TinyPipeline(tiny, BUSHY, pipelined=pipelined), text(4, 40)
    warm.run_text([Request("owner", prompt, 20)])
    blocks = kept(warm, prompt)
    assert len(blocks) == 10
    before = [rows(warm, blocks, part) for part in KvPart]
    for length in (16, 17, 19, 20, 39):
        guests = warm.hand_off_samples(Request("guest", prompt[:length], 20, SamplingParams(1.0, seed=1)), 3)
        found = (length - 1) // SIZE
        assert all(guest.allocation.blocks[:found] == blocks[:found] for guest in guests)
        while any(guest.allocation.running for guest in guests):
            warm.decode.step()
            warm.decode.check_integrity()
        for guest in guests:
            warm.decode.release(guest.allocation)
    assert kept(warm, prompt) == blocks
    assert all(map(torch.equal, before, [rows(warm, blocks, part) for part in KvPart]))


def test_what_is_held_cannot_be_evicted_or_imported_over(tiny: Models) -> None:
    warm, prompt = TinyPipeline(tiny, BUSHY), text(5, 30)
    warm.run_text([Request("r", prompt, 9)])
    blocks = kept(warm, prompt)
    (allocation,) = warm.decode.allocate(30, 60, keys=warm.decode.keys(prompt))
    assert allocation.held == 28
    before = [rows(warm, blocks, part) for part in KvPart]
    others = warm.decode.pool.allocate(warm.decode.pool.free)
    assert set(others).isdisjoint(blocks)
    assert kept(warm, prompt) == blocks
    geometry = warm.decode.target_kv
    for start in (0, 27):
        span = KvSpan(KvPart.TARGET, (0, geometry.num_layers), (0, geometry.num_kv_heads), (start, start + 1))
        with pytest.raises(InvalidRequestError, match="shared blocks"):
            warm.decode.import_kv(allocation, span, bytes(geometry.bytes_per_token))
    assert all(map(torch.equal, before, [rows(warm, blocks, part) for part in KvPart]))
    warm.decode.release(allocation)
    warm.decode.pool.release(others)
    assert warm.decode.pool.used == 0


def test_a_prompt_that_is_being_decoded_is_shared_with_those_that_come(tiny: Models) -> None:
    """From its hand-off on; and of two that came at once, one copy stays."""
    warm, prompt = TinyPipeline(tiny, BUSHY), text(6, 24)
    keys = warm.decode.keys(prompt)
    (early,) = warm.decode.allocate(24, 60, keys=keys)
    first = warm.hand_off(Request("first", prompt, 20))
    assert warm.shipped == shipped(warm, 24, 0)
    second = warm.hand_off(Request("second", prompt, 20))
    assert warm.shipped == shipped(warm, 24, 0) + shipped(warm, 24, 20)
    assert second.allocation.blocks[:6] == first.allocation.blocks[:6]
    used = warm.decode.pool.used
    early_blocks = list(early.blocks)
    for part, geometry in ((KvPart.TARGET, warm.decode.target_kv), (KvPart.DRAFT, warm.decode.draft_kv)):
        assert geometry is not None
        start = 0 if part is KvPart.TARGET else 1
        span = KvSpan(part, (0, geometry.num_layers), (0, geometry.num_kv_heads), (start, 24))
        warm.decode.import_kv(early, span, warm.decode.caches.read(first.allocation.blocks, span))
    warm.decode.share_context([early], has_draft_kv=True)
    assert early.blocks[:6] == first.allocation.blocks[:6]
    assert warm.decode.pool.used == used - 6
    assert set(early_blocks[:6]).isdisjoint(kept(warm, prompt))
    expected = cold(tiny).run_text([Request("first", prompt, 20)])["first"]
    outputs = {first.allocation: [first.first_token], second.allocation: [second.first_token]}
    while warm.decode.running:
        for result in warm.decode.step().results:
            outputs[result.allocation] += result.token_ids
    assert list(outputs.values()) == [expected, expected]


def test_prefix_caching_can_be_switched_off(tiny: Models) -> None:
    off, prompt = cold(tiny), text(7, 30)
    for turn in range(2):
        off.run_text([Request("r", prompt, 9)])
        assert off.shipped == (turn + 1) * shipped(off, 30, 0)
    assert off.decode.keys(prompt) is None
    assert off.decode.pool.cached == 0
