"""The head in training against the engine's own, its attention against plain autograd, its loss against PyTorch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import HEAD_DIM, HIDDEN, MAX_POSITION, VOCAB, DenseAttention, head_config, head_tensors, save_head

from branchline.engine.models.eagle3 import Eagle3Head, load_eagle3
from branchline.engine.models.eagle3_config import read_eagle3_config
from branchline.engine.models.protocol import KvGeometry, TargetSpec
from tools.draft_head.causal import CausalAttention, Spans, context_attention
from tools.draft_head.checkpoint import HeadTensors, read_head, write_head
from tools.draft_head.head import DraftHead, Rows
from tools.draft_head.loss import OutputRows, StepTargets

pytestmark = pytest.mark.models

CPU = torch.device("cpu")
TARGET = TargetSpec(KvGeometry(8, 2, HEAD_DIM, torch.float32), VOCAB, HIDDEN, MAX_POSITION, (2,))
STEPS = 4


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


EMBEDDING = random(VOCAB, HIDDEN, seed=5)


def token_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def head_dir(tmp_path: Path) -> Path:
    return save_head(tmp_path / "head", head_config(), head_tensors())


@pytest.fixture
def engine_head(head_dir: Path) -> Eagle3Head:
    return load_eagle3(head_dir, TARGET, EMBEDDING, CPU, torch.float32)


@pytest.fixture
def head(head_dir: Path) -> DraftHead:
    config = read_eagle3_config(head_dir)
    trained = DraftHead(config.decoder, config.draft_vocab_size, MAX_POSITION + STEPS)
    trained.load_state_dict(read_head(head_dir, TARGET).parameters)
    return trained


def conversation(tokens: torch.Tensor, auxiliary: torch.Tensor, answer: int) -> tuple[list[torch.Tensor], Spans]:
    """The context part and the learned part of a conversation's rows, as `batches` lays them out."""
    border, end = answer - 1, len(tokens) - 2
    positions = torch.arange(end)
    parts = [tokens[1:answer], tokens[answer : end + 1], auxiliary[:border], auxiliary[border:end]]
    return [*parts, positions[:border], positions[border:]], Spans((border,), (end - border,))


def test_every_step_is_what_the_engine_drafts(head: DraftHead, engine_head: Eagle3Head) -> None:
    """Two conversations in one batch: each row of each step equals the engine's pass over the rows before it and a
    chain of drafts behind."""
    lengths, answers = (24, 17), (9, 1)
    tokens = [token_ids(length, seed) for seed, length in enumerate(lengths)]
    auxiliary = [random(length, 3 * HIDDEN, seed=seed) for seed, length in enumerate(lengths, 10)]
    laid_out = [conversation(*entry) for entry in zip(tokens, auxiliary, answers, strict=True)]
    columns = list(zip(*(parts for parts, _ in laid_out), strict=True))
    rows = Rows(
        tokens=torch.cat([*columns[0], *columns[1], torch.zeros(STEPS, dtype=torch.int64)]),
        auxiliary=torch.cat([*columns[2], *columns[3]]),
        positions=torch.cat([*columns[4], *columns[5]]),
        spans=Spans(
            *(
                sum(lengths, ())
                for lengths in zip(*((s.context_lengths, s.learned_lengths) for _, s in laid_out), strict=True)
            )
        ),
    )
    states = list(head(rows, EMBEDDING, STEPS))
    for index, (_, learned) in enumerate(rows.spans):
        for row in range(learned.stop - learned.start):
            last = answers[index] - 1 + row
            expected = engine_chain(engine_head, tokens[index], auxiliary[index], last)
            actual = [states[step][learned][row] for step in range(len(expected))]
            torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=1e-4, atol=1e-4)


def engine_chain(
    engine_head: Eagle3Head, tokens: torch.Tensor, auxiliary: torch.Tensor, last: int
) -> list[torch.Tensor]:
    """The engine's states for row `last`, and for the tokens that follow it as drafts."""
    attention, states = DenseAttention(), []
    normed, recurrent = engine_head.forward(
        tokens[1 : last + 2], engine_head.fuse(auxiliary[: last + 1]), torch.arange(last + 1), attention
    )
    states.append(normed[-1])
    for step in range(1, min(STEPS, len(tokens) - last - 2)):
        token, position = tokens[last + 1 + step][None], torch.tensor([last + step])
        normed, recurrent = engine_head.forward(token, recurrent[-1:], position, attention)
        states.append(normed[-1])
    return states


def test_the_steps_follow_gradients_back(head: DraftHead) -> None:
    """The gradient of all steps, by autograd through the attention's own backward, against finite differences."""
    head = head.double()
    parts, spans = conversation(token_ids(9, 1), random(9, 3 * HIDDEN, seed=2, dtype=torch.float64), 4)
    tokens = torch.cat([parts[0], parts[1], torch.zeros(STEPS, dtype=torch.int64)])
    rows = Rows(tokens, torch.cat(parts[2:4]), torch.cat(parts[4:6]), spans)

    def loss() -> torch.Tensor:
        states = list(head(rows, EMBEDDING.double(), 3))
        return sum((state.square() * (step + 1)).sum() for step, state in enumerate(states))  # type: ignore[return-value]

    loss().backward()
    for name, parameter in head.named_parameters():
        if name == "lm_head.weight":
            continue
        direction = random(*parameter.shape, seed=3, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
            values.append(loss().item())
            with torch.no_grad():
                parameter.sub_(direction, alpha=sign * 1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert parameter.grad is not None
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4), name


def test_attention_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scores with a mask over everything, for conversations of several tiles and one without context."""
    monkeypatch.setattr("tools.draft_head.causal.TILE", 4)
    spans = Spans((3, 0, 5), (6, 5, 4))
    shapes = [(spans.learned, 4), (spans.context, 2), (spans.context, 2), (spans.learned, 2), (spans.learned, 2)]
    inputs = [random(*shape, HEAD_DIM, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes)]
    leaves = [entry.requires_grad_() for entry in inputs]
    weights = random(spans.learned, 4, HEAD_DIM, seed=8), random(spans.learned, 4, seed=9)

    def total(attended: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
        return (attended * weights[0]).sum() + (log_sum * weights[1]).sum()

    plain = dense_attention(*leaves, spans)
    ours = context_attention(*leaves, spans)
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])
    expected = torch.autograd.grad(total(*plain), leaves)
    torch.testing.assert_close(torch.autograd.grad(total(*ours), leaves), expected)


def dense_attention(
    query: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
) -> tuple[torch.Tensor, torch.Tensor]:
    attended, log_sums = [], []
    for context, learned in spans:
        keys = torch.cat([context_key[context], key[learned]]).repeat_interleave(2, 1)
        values = torch.cat([context_value[context], value[learned]]).repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->qhk", query[learned], keys) * HEAD_DIM**-0.5
        count, before = learned.stop - learned.start, context.stop - context.start
        hidden = torch.ones(count, before + count, dtype=torch.bool).triu(before + 1)
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        attended.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), values))
        log_sums.append(scores.logsumexp(-1))
    return torch.cat(attended), torch.cat(log_sums)


@pytest.mark.parametrize("window", [None, 3, 50])
def test_attention_over_packed_sequences(window: int | None) -> None:
    lengths = (7, 1, 12)
    query, key, value = (random(20, heads, HEAD_DIM, seed=heads) for heads in (4, 2, 2))
    packed = CausalAttention(lengths).attend(0, query, key, value, window=window)
    alone = [
        DenseAttention().attend(0, *parts, window=window)
        for parts in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_loss_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PyTorch's cross-entropy with soft targets, in several pieces, with rows that don't count."""
    monkeypatch.setattr("tools.draft_head.loss.ROWS", 4)
    states = random(10, 6, seed=1, dtype=torch.float64).requires_grad_()
    weight = random(12, 6, seed=2, dtype=torch.float64).requires_grad_()
    wished = random(10, 12, seed=3, dtype=torch.float64).softmax(-1)
    choices = wished.argmax(-1)
    choices[3] = -1
    counted = torch.arange(10) != 7
    kept = [row for row in range(10) if row not in (3, 7)]
    logits = states @ weight.T
    expected = torch.nn.functional.cross_entropy(logits[kept], wished[kept], reduction="sum")
    gradients = torch.autograd.grad(expected * 0.5, [states, weight])
    targets = StepTargets(wished, choices, counted)
    rows = OutputRows(weight, torch.float64)
    for _ in range(2):  # its buffers are used again
        rows.begin()
        ours = rows.learn(states, targets, 0.2), rows.gradient
        rows.learn(states, targets, torch.tensor(0.3))
        torch.testing.assert_close(ours[0], gradients[0] * 0.4, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], gradients[1], rtol=1e-5, atol=1e-6)
    measured = rows.measure(states, targets)
    assert measured.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert measured.agreed.item() == (logits.argmax(-1) == wished.argmax(-1))[kept].sum().item()


def test_what_is_written_loads_in_the_engine(head: DraftHead, head_dir: Path, tmp_path: Path) -> None:
    """The same tensors come back in Branchline's loader, byte for byte, and in ours."""
    ids = torch.arange(40) * 2
    config = read_eagle3_config(head_dir).decoder
    write_head(tmp_path / "out", config, HeadTensors(head.state_dict(), ids), (2,), torch.float32)
    loaded = load_eagle3(tmp_path / "out", TARGET, EMBEDDING, CPU, torch.float32)
    assert torch.equal(loaded.target_token_ids, ids)
    before = load_eagle3(head_dir, TARGET, EMBEDDING, CPU, torch.float32)
    auxiliary, tokens = random(5, 3 * HIDDEN, seed=1), token_ids(5, 2)
    outputs = []
    for entry in (loaded, before):
        normed, _ = entry.forward(tokens, entry.fuse(auxiliary), torch.arange(5), DenseAttention())
        outputs.append(entry.logits(normed))
    assert torch.equal(*outputs)
    again = read_head(tmp_path / "out", TARGET)
    assert torch.equal(again.target_token_ids, ids)
    assert all(torch.equal(again.parameters[name], tensor) for name, tensor in head.state_dict().items())
