"""The features stage: what the draft head reads of the target, for every token of every conversation.

The target runs once over each conversation, through the engine's provider; so the head is trained on the very numbers
that it will be fed. One file of features for each file of conversations:

    tokens     int32 `[T]`                 prompts and answers, one after the other
    starts     int64 `[n + 1]`             where each conversation begins, and the end
    answers    int64 `[n]`                 offset of an answer's first token in its conversation
    choices    int32 `[T]`                 the target's first choice for the token after each answer token, -1 elsewhere
    auxiliary  bfloat16 `[T, 3 * hidden]`  the auxiliary states, as the head's `fc` takes them
    hidden     bfloat16 `[T, hidden]`      after the final norm
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
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
    total = sum(_tokens(entry) for shard in missing for entry in work.open_conversations(shard))
    with Progress(total, "tokens", say) as progress:
        for shard in missing:
            conversations = list(work.open_conversations(shard))
            tensors = compute(models, conversations, recipe.features.max_tokens_per_pass, progress.add)
            with work.writing(work.feature_shard(shard)) as temporary:
                save_file(tensors, temporary)


def load_for_features(recipe: Recipe, say: Callable[[str], None]) -> Models:
    """The target, made to give the auxiliary states: a provider gives them to a draft head, so it gets a blank one."""
    with tempfile.TemporaryDirectory() as directory:
        blank = write_blank_head(locate_model(recipe.model, say), Path(directory))
        model = ModelConfig(recipe.model, str(blank), recipe.dtype, recipe.provider, recipe.device)
        engine = EngineConfig(
            prefill_chunk_tokens=recipe.features.max_tokens_per_pass, max_batch=1, threads=recipe.threads
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
    starts = torch.tensor([0, *(_tokens(entry) for entry in conversations)]).cumsum(0)
    total, hidden_size = int(starts[-1]), models.target.spec.hidden_size
    tokens = torch.tensor([token for entry in conversations for token in (*entry.prompt, *entry.answer)])
    answers = torch.tensor([len(entry.prompt) for entry in conversations])
    auxiliary = torch.empty((total, 3 * hidden_size), dtype=torch.bfloat16)
    hidden = torch.empty((total, hidden_size), dtype=torch.bfloat16)
    choices = torch.full((total,), -1, dtype=torch.int32)
    start = 0
    for group in passes(conversations, max_tokens):
        lengths = tuple(_tokens(entry) for entry in group)
        rows = slice(start, start + sum(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths]).to(models.device)
        output = models.target.forward(tokens[rows].to(models.device), positions, CausalAttention(lengths))
        assert output.auxiliary is not None
        auxiliary[rows], hidden[rows] = output.auxiliary, output.hidden
        in_answer = torch.cat([torch.arange(_tokens(entry)) >= len(entry.prompt) for entry in group])
        answered = in_answer.nonzero()[:, 0]
        choices[rows][answered] = _first_choices(models, output.hidden[answered.to(models.device)])
        start = rows.stop
        done(sum(lengths))
    tensors = {"tokens": tokens.int(), "starts": starts, "answers": answers, "choices": choices}
    return tensors | {"auxiliary": auxiliary, "hidden": hidden}


def passes(conversations: list[Conversation], max_tokens: int) -> Iterator[list[Conversation]]:
    """Neighbours, as many as fit; one that is longer goes alone."""
    group: list[Conversation] = []
    for entry in conversations:
        if group and sum(map(_tokens, group)) + _tokens(entry) > max_tokens:
            yield group
            group = []
        group.append(entry)
    yield group


def _first_choices(models: Models, hidden: torch.Tensor) -> torch.Tensor:
    vocab = models.target.spec.vocab_size
    chosen = [models.target.logits(rows)[:, :vocab].argmax(-1) for rows in torch.split(hidden, _LOGIT_ROWS)]
    return torch.cat(chosen).to("cpu", torch.int32)


def _tokens(conversation: Conversation) -> int:
    return len(conversation.prompt) + len(conversation.answer)
