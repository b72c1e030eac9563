"""Edits of the target's logits: what a request favours, forbids and penalises.

In this order, in float32: logit bias is added; bans (bad words, and stop tokens before `min_tokens`) set -inf; the
repetition penalty divides positive and multiplies negative logits of tokens in prompt and output (Keskar et al. 2019);
presence and frequency penalties are subtracted for tokens in the output, as OpenAI's API defines them. If the bans left
no token at all, they are ignored for that choice.

Rows that ask for none of it come out bit for bit as they went in: every edit has an exact neutral element.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import torch

from branchline.core import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    InvalidRequestError,
    Request,
)

#: Stands for "no token": equals no token id. In the beginning of a bad word it matches anything.
_NONE = -1
_PREFIX = MAX_BAD_WORD_TOKENS - 1
#: Keeps the penalised logit finite and the product with -inf a number.
_SMALLEST_PENALTY = 1e-30


def needs_edits(request: Request) -> bool:
    sampling = request.sampling
    return bool(
        sampling.logit_bias
        or sampling.bad_words
        or request.min_tokens > 0
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def check_edits(request: Request, vocab_size: int) -> None:
    """Raises InvalidRequestError when logit_bias or bad_words name a token id outside the vocabulary."""
    named = {
        "logit_bias": [token_id for token_id, _ in request.sampling.logit_bias],
        "bad_words": [token_id for word in request.sampling.bad_words for token_id in word],
    }
    for field, token_ids in named.items():
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(f"{field}: token id {token_id} is not below the vocabulary size {vocab_size}")


@dataclass
class EditTensors:
    """The edits' settings and the sequences' progress on the device, one row per sequence."""

    repetition: torch.Tensor  # float32 [rows]
    presence: torch.Tensor  # float32 [rows]
    frequency: torch.Tensor  # float32 [rows]
    bias_ids: torch.Tensor  # int64 [rows, MAX_LOGIT_BIASES]: token 0 with bias 0 where there is none
    biases: torch.Tensor  # float32 [rows, MAX_LOGIT_BIASES]
    bad_prefixes: torch.Tensor  # int64 [rows, MAX_BAD_WORDS, _PREFIX]: all but the last token, at the right
    bad_lasts: torch.Tensor  # int64 [rows, MAX_BAD_WORDS]; _NONE where there is no word
    stop_ids: torch.Tensor  # int64 [rows, MAX_STOP_TOKEN_IDS]; _NONE where there is none
    min_tokens: torch.Tensor  # int64 [rows]
    in_prompt: torch.Tensor  # bool [rows, vocab]
    output_counts: torch.Tensor  # int32 [rows, vocab]: occurrences in the output
    output_length: torch.Tensor  # int64 [rows]
    recent: torch.Tensor  # int64 [rows, _PREFIX]: the output's last tokens, at the right

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device) -> EditTensors:
        """Rows that edit nothing."""

        def full(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            repetition=full(1.0, torch.float32),
            presence=full(0.0, torch.float32),
            frequency=full(0.0, torch.float32),
            bias_ids=full(0, torch.int64, MAX_LOGIT_BIASES),
            biases=full(0.0, torch.float32, MAX_LOGIT_BIASES),
            bad_prefixes=full(_NONE, torch.int64, MAX_BAD_WORDS, _PREFIX),
            bad_lasts=full(_NONE, torch.int64, MAX_BAD_WORDS),
            stop_ids=full(_NONE, torch.int64, MAX_STOP_TOKEN_IDS),
            min_tokens=full(0, torch.int64),
            in_prompt=full(False, torch.bool, vocab_size),
            output_counts=full(0, torch.int32, vocab_size),
            output_length=full(0, torch.int64),
            recent=full(_NONE, torch.int64, _PREFIX),
        )

    def load(self, row: int, request: Request, first_token: int | None) -> None:
        """Fills a row from the host; `first_token`, if any, counts as emitted. Raises InvalidRequestError for token
        ids outside the vocabulary."""
        vocab_size = self.in_prompt.shape[1]
        check_edits(request, vocab_size)
        sampling = request.sampling
        self.repetition[row] = max(sampling.repetition_penalty, _SMALLEST_PENALTY)
        self.presence[row] = sampling.presence_penalty
        self.frequency[row] = sampling.frequency_penalty
        self.bad_lasts[row] = _NONE
        self.biases[row] = 0.0
        self.min_tokens[row] = request.min_tokens
        if not needs_edits(request):
            return  # what the row's history holds has no effect now
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            _put(self.bias_ids[row], ids)
            _put(self.biases[row], biases)
        for index, word in enumerate(sampling.bad_words):
            prefix = word[:-1]
            _put(self.bad_prefixes[row, index], (*[_NONE] * (_PREFIX - len(prefix)), *prefix))
            self.bad_lasts[row, index] = word[-1]
        stops = [token_id for token_id in request.stop_token_ids if 0 <= token_id < vocab_size]
        self.stop_ids[row] = _NONE
        _put(self.stop_ids[row], stops)
        self._load_history(row, request, first_token)

    def _load_history(self, row: int, request: Request, first_token: int | None) -> None:
        output = request.emitted if first_token is None else (*request.emitted, first_token)
        self.in_prompt[row] = False
        self.in_prompt[row, self.recent.new_tensor(sorted(set(request.prompt)))] = True
        self.output_counts[row] = 0
        counts = Counter(output)
        self.output_counts[row, self.recent.new_tensor(list(counts))] = self.output_counts.new_tensor(
            list(counts.values())
        )
        self.output_length[row] = len(output)
        last = output[-_PREFIX:]
        _put(self.recent[row], (*[_NONE] * (_PREFIX - len(last)), *last))

    def select(self, index: torch.Tensor) -> EditTensors:
        return EditTensors(**{f.name: getattr(self, f.name).index_select(0, index) for f in fields(self)})

    def store(self, index: torch.Tensor, rows: EditTensors) -> None:
        """Writes a selection's progress back to the rows it came from."""
        self.output_counts.index_copy_(0, index, rows.output_counts)
        self.output_length.index_copy_(0, index, rows.output_length)
        self.recent.index_copy_(0, index, rows.recent)

    def advance(self, token_ids: torch.Tensor, keep: torch.Tensor) -> None:
        """A token (int64 `[rows]`) joins the output of each row where `keep` (bool `[rows]`), in place."""
        self.output_counts.scatter_add_(1, token_ids[:, None], keep[:, None].int())
        self.output_length.add_(keep)
        shifted = torch.cat([self.recent[:, 1:], token_ids[:, None]], 1)
        self.recent.copy_(torch.where(keep[:, None], shifted, self.recent))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The edited logits: `[rows, vocab]` of any float dtype -> float32 `[rows, vocab]`, never all -inf unless they
        were before."""
        biased = logits.float().scatter_add(1, self.bias_ids, self.biases)
        banned = self._ban(biased)
        any_left = banned.amax(-1, keepdim=True) > float("-inf")
        return self._penalise(torch.where(any_left, banned, biased))

    def _ban(self, logits: torch.Tensor) -> torch.Tensor:
        matches = (self.bad_prefixes == self.recent[:, None]) | (self.bad_prefixes == _NONE)
        words = torch.where(matches.all(2), self.bad_lasts, _NONE)
        early = (self.output_length < self.min_tokens)[:, None]
        banned_ids = torch.cat([words, torch.where(early, self.stop_ids, _NONE)], 1)
        # Adding zeros to token 0 for the entries that ban nothing keeps shapes fixed and the result exact.
        bans = torch.where(banned_ids == _NONE, 0.0, float("-inf"))
        return logits.scatter_add(1, banned_ids.clamp(min=0), bans)

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        in_output = self.output_counts > 0
        repetition = torch.where(self.in_prompt | in_output, self.repetition[:, None], 1.0)
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = logits - self.presence[:, None] * in_output
        return logits - self.frequency[:, None] * self.output_counts


def _put(row: torch.Tensor, values: tuple[float, ...] | list[int]) -> None:
    """The first entries of a one-dimensional tensor, in place."""
    row[: len(values)] = row.new_tensor(values)
