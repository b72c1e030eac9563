from branchline.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request", "decode_address", "lease_id", "ship_draft", "samples", "priority", "queued_ms", "held_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SHIP_DRAFT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: _types_pb2.Request
    decode_address: str
    lease_id: str
    ship_draft: bool
    samples: int
    priority: int
    queued_ms: int
    held_tokens: int
    def __init__(self, request: _Optional[_Union[_types_pb2.Request, _Mapping]] = ..., decode_address: _Optional[str] = ..., lease_id: _Optional[str] = ..., ship_draft: _Optional[bool] = ..., samples: _Optional[int] = ..., priority: _Optional[int] = ..., queued_ms: _Optional[int] = ..., held_tokens: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("first_token", "handed_off")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    first_token: FirstToken
    handed_off: HandedOff
    def __init__(self, first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., handed_off: _Optional[_Union[HandedOff, _Mapping]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "finish_reason", "sample", "logprobs", "cached_tokens")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    finish_reason: _types_pb2.FinishReason
    sample: int
    logprobs: _types_pb2.TokenLogprobs
    cached_tokens: int
    def __init__(self, token_id: _Optional[int] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., sample: _Optional[int] = ..., logprobs: _Optional[_Union[_types_pb2.TokenLogprobs, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class HandedOff(_message.Message):
    __slots__ = ("kv_bytes", "frames", "tree_nodes")
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    TREE_NODES_FIELD_NUMBER: _ClassVar[int]
    kv_bytes: int
    frames: int
    tree_nodes: int
    def __init__(self, kv_bytes: _Optional[int] = ..., frames: _Optional[int] = ..., tree_nodes: _Optional[int] = ...) -> None: ...

class PrefillServiceGetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillServiceGetStatusResponse(_message.Message):
    __slots__ = ("incarnation", "fingerprint", "model", "max_model_len", "blocks_total", "blocks_used", "queued", "tasks", "prefilled_tokens")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    fingerprint: _types_pb2.Fingerprint
    model: str
    max_model_len: int
    blocks_total: int
    blocks_used: int
    queued: int
    tasks: int
    prefilled_tokens: int
    def __init__(self, incarnation: _Optional[str] = ..., fingerprint: _Optional[_Union[_types_pb2.Fingerprint, _Mapping]] = ..., model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_used: _Optional[int] = ..., queued: _Optional[int] = ..., tasks: _Optional[int] = ..., prefilled_tokens: _Optional[int] = ...) -> None: ...
