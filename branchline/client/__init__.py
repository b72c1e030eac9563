"""The SDK: a synchronous and an asyncio client for Branchline's gateway, light enough for any program.

from branchline.client import Client

with Client("127.0.0.1:50051") as client:
    for chunk in client.generate(messages=[{"role": "user", "content": "Hello!"}]):
        print(chunk.text, end="", flush=True)
"""

from branchline.client.aio import AsyncClient, AsyncStream
from branchline.client.chat import Answer, ChatChunk, ChatCompletion, ChatOptions, ToolCall
from branchline.client.errors import (
    AuthenticationError,
    BranchlineError,
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)
from branchline.client.options import GenerateOptions
from branchline.client.results import (
    Chunk,
    Completion,
    GatewayStatus,
    Model,
    RunningRequest,
    Sample,
    ServerInfo,
    Usage,
    Worker,
)
from branchline.client.sync import Client, Stream
from branchline.client.tls import Tls
from branchline.core import FinishReason, SpeculationStats, TokenLogprobs

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BranchlineError",
    "CancelledError",
    "ChatChunk",
    "ChatCompletion",
    "ChatOptions",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "FinishReason",
    "GatewayStatus",
    "GenerateOptions",
    "InvalidRequestError",
    "Model",
    "OverloadedError",
    "RunningRequest",
    "Sample",
    "ServerError",
    "ServerInfo",
    "SpeculationStats",
    "Stream",
    "Tls",
    "TokenLogprobs",
    "ToolCall",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "Worker",
]
