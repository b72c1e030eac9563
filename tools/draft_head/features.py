"""The features stage: what the draft head reads of the target, for every token of every conversation.

The numbers come from the engine's provider; so the head is trained on the very ones that it will be fed. They are kept
while the conversations are written (`of_written`); for those that have none any more the target runs once over each
(`compute`). One file of features for each file of conversations:

    tokens     int32 `[T]`                 prompts and answers, one after the other
    starts     int64 `[n + 1]`             where each conversation begins, and the end
    begun      int64 `[n]`                 offset of a conversation's first token that the model wrote
    choices    int32 `[T]`                 the target's first choice for the token after each of those, -1 elsewhere
    auxiliary  bfloat16 `[T, 3 * hidden]`  the auxiliary states, as the head's `fc` takes them
    hidden     bfloat16 `[T, hidden]`      after the final norm
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from branchline.config import EngineConfig, ModelConfig
from branchline.engine.models.load import load_models
from branchline.engine.models.locate import locate_model
from branchline.engine.models.protocol import Models
from tools.draft_head.causal import CausalAttention
from tools.draft_head.checkpoint import HeadTensors, write_head
from tools.draft_head.head import DraftHead
from tools.draft_head.progress import Progress
from tools.draft_head.recipe import Recipe
from tools.draft_head.store import Conversation, Work
from tools.draft_head.target import read_target
from tools.draft_head.writer import Written

#: Rows whose logits are computed at once: over a whole vocabulary they are large.
_LOGIT_ROWS = 256
#: Entries of the head that is loaded for its place only.
_BLANK_ENTRIES = 64


def run(work: Work, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Computes the features of the conversations that have none yet."""
    shards = work.data_shards()
    missing = [shard for shard in shards if not work.feature_shard(shard).exists()]
    if not missing:
        say(f"features: all {len(shards)} files are there")
        return
    models = load_for_features(recipe, say)
    # Reading twice is cheap beside the model, and holds one file's conversations in memory at a time.
    total = sum(len(entry) for shard in missing for entry in work.open_conversations(shard))
    with Progress(total, "tokens", say) as progress:
        for shard in missing:
            conversations = list(work.open_conversations(shard))
            tensors = compute(models, conversations, recipe.features.max_tokens_per_pass, progress.add)
            write(work, shard, tensors)


def write(work: Work, data_shard: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The features file of a data shard."""
    with work.writing(work.feature_shard(data_shard)) as temporary:
        save_file(tensors, temporary)


def load_for_features(recipe: Recipe, say: Callable[[str], None], *, compiled: bool = False) -> Models:
    """The target, made to give the auxiliary states: a provider gives them to a draft head, so it gets a blank one."""
    with tempfile.TemporaryDirectory() as directory:
        blank = write_blank_head(locate_model(recipe.model, say), Path(directory))
        model = ModelConfig(recipe.model, str(blank), recipe.dtype, recipe.provider, recipe.device)
        engine = EngineConfig(
            prefill_chunk_tokens=max(recipe.features.max_tokens_per_pass, recipe.data.in_flight),
            max_batch=1,
            threads=recipe.threads,
            compile=compiled and recipe.provider == "vllm",
        )
        return load_models(model, engine, say)


def write_blank_head(model_dir: Path, directory: Path) -> Path:
    target = read_target(model_dir)
    ids = torch.arange(min(_BLANK_ENTRIES, target.config.vocab_size))
    head = DraftHead(target.head_config, len(ids), 1)
    write_head(directory, target.head_config, HeadTensors(head.state_dict(), ids), (), torch.bfloat16)
    return directory


@torch.inference_mode()
def compute(
    models: Models, conversations: list[Conversation], max_tokens: int, done: Callable[[int], None] = lambda _: None
) -> dict[str, torch.Tensor]:
    """A file's tensors, on the CPU. Whole conversations share a pass of up to `max_tokens` tokens."""
    tensors, hidden_size = _places(conversations), models.target.spec.hidden_size
    tokens, total = tensors["tokens"].long(), len(tensors["tokens"])
    auxiliary = torch.empty((total, 3 * hidden_size), dtype=torch.bfloat16)
    hidden = torch.empty((total, hidden_size), dtype=torch.bfloat16)
    choices = torch.full((total,), -1, dtype=torch.int32)
    start = 0
    for group in passes(conversations, max_tokens):
        lengths = tuple(len(entry) for entry in group)
        rows = slice(start, start + sum(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths]).to(models.device)
        output = models.target.forward(tokens[rows].to(models.device), positions, CausalAttention(lengths))
        assert output.auxiliary is not None
        auxiliary[rows], hidden[rows] = output.auxiliary, output.hidden
        written = torch.cat([torch.arange(len(entry)) >= entry.begun for entry in group])
        chosen = written.nonzero()[:, 0]
        choices[rows][chosen] = _first_choices(models, output.hidden[chosen.to(models.device)])
        start = rows.stop
        done(sum(lengths))
    return tensors | {"choices": choices, "auxiliary": auxiliary, "hidden": hidden}


def of_written(conversations: Sequence[Conversation], texts: Sequence[Written]) -> dict[str, torch.Tensor]:
    """A file's tensors, of what was kept while the conversations were written. Nobody read a conversation's last token:
    its row is zeros, and nothing is learned there."""
    states = torch.cat([torch.cat([text.states, torch.zeros_like(text.states[:1])]) for text in texts]).bfloat16()
    hidden_size = states.shape[1] // 4
    return _places(conversations) | {
        "choices": torch.cat([text.choices for text in texts]),
        "auxiliary": states[:, : 3 * hidden_size].contiguous(),
        "hidden": states[:, 3 * hidden_size :].contiguous(),
    }


def _places(conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """Tokens, and where each conversation is."""
    return {
        "tokens": torch.tensor([token for entry in conversations for token in (*entry.prompt, *entry.answer)]).int(),
        "starts": torch.tensor([0, *map(len, conversations)]).cumsum(0),
        "begun": torch.tensor([entry.begun for entry in conversations]),
    }


def passes(conversations: list[Conversation], max_tokens: int) -> Iterator[list[Conversation]]:
    """Neighbours, as many as fit; one that is longer goes alone."""
    group: list[Conversation] = []
    for entry in conversations:
        if group and sum(map(len, group)) + len(entry) > max_tokens:
            yield group
            group = []
        group.append(entry)
    yield group


def _first_choices(models: Models, hidden: torch.Tensor) -> torch.Tensor:
    vocab = models.target.spec.vocab_size
    chosen = [models.target.logits(rows)[:, :vocab].argmax(-1) for rows in torch.split(hidden, _LOGIT_ROWS)]
    return torch.cat(chosen).to("cpu", torch.int32)
