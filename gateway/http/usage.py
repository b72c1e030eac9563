"""Tokens counted, over all samples and prompts of a request."""

from __future__ import annotations

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from branchline.v1 import gateway_pb2


class UsageSum:
    """`accepted` and `rejected` draft tokens stand where OpenAI counts those of predicted outputs."""

    def __init__(self, prompts: list[int]) -> None:
        """`prompts`: the length of each, in tokens."""
        self._prompt_tokens = sum(prompts)
        self._cached: dict[int, int] = {}
        self._completion_tokens = self._accepted = self._rejected = 0

    def add(self, prompt: int, finished: gateway_pb2.Completion) -> None:
        """What a sample of a prompt took: the prompt's part of it once."""
        self._cached[prompt] = finished.usage.cached_tokens
        self._completion_tokens += finished.usage.completion_tokens
        self._accepted += finished.speculation.accepted
        self._rejected += max(0, finished.speculation.drafted - finished.speculation.accepted)

    @property
    def usage(self) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=self._accepted, rejected_prediction_tokens=self._rejected
            ),
        )

    def running(self, completion_tokens: int) -> CompletionUsage:
        """In the middle of a stream."""
        return CompletionUsage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
        )
