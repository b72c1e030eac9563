"""Why a choice ended, in OpenAI's words."""

from __future__ import annotations

from typing import Literal

from branchline.v1 import gateway_pb2, types_pb2

Reason = Literal["stop", "length", "tool_calls"]


def finish_reason(finished: gateway_pb2.Completion, *, called: bool = False) -> Reason:
    """`called`: whether it called tools."""
    if finished.finish_reason == types_pb2.FINISH_REASON_LENGTH:
        return "length"
    return "tool_calls" if called else "stop"
