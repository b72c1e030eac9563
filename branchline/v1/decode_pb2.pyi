from branchline.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvPart(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_PART_UNSPECIFIED: _ClassVar[KvPart]
    KV_PART_TARGET: _ClassVar[KvPart]
    KV_PART_DRAFT: _ClassVar[KvPart]
KV_PART_UNSPECIFIED: KvPart
KV_PART_TARGET: KvPart
KV_PART_DRAFT: KvPart

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "context_length", "max_length", "fingerprint", "attempt", "samples", "priority", "queued_ms", "wait_ms", "context")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    context_length: int
    max_length: int
    fingerprint: _types_pb2.Fingerprint
    attempt: int
    samples: int
    priority: int
    queued_ms: int
    wait_ms: int
    context: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., context_length: _Optional[int] = ..., max_length: _Optional[int] = ..., fingerprint: _Optional[_Union[_types_pb2.Fingerprint, _Mapping]] = ..., attempt: _Optional[int] = ..., samples: _Optional[int] = ..., priority: _Optional[int] = ..., queued_ms: _Optional[int] = ..., wait_ms: _Optional[int] = ..., context: _Optional[_Iterable[int]] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("lease_id", "ttl_ms", "accepts_draft", "sibling_lease_ids", "held_tokens")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_DRAFT_FIELD_NUMBER: _ClassVar[int]
    SIBLING_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    ttl_ms: int
    accepts_draft: bool
    sibling_lease_ids: _containers.RepeatedScalarFieldContainer[str]
    held_tokens: int
    def __init__(self, lease_id: _Optional[str] = ..., ttl_ms: _Optional[int] = ..., accepts_draft: _Optional[bool] = ..., sibling_lease_ids: _Optional[_Iterable[str]] = ..., held_tokens: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("lease_id", "request")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    request: _types_pb2.Request
    def __init__(self, lease_id: _Optional[str] = ..., request: _Optional[_Union[_types_pb2.Request, _Mapping]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("attached", "tokens", "finished", "preempted")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    tokens: Tokens
    finished: Finished
    preempted: Preempted
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., preempted: _Optional[_Union[Preempted, _Mapping]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("index", "token_ids", "speculation", "logprobs")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    speculation: _types_pb2.Speculation
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., speculation: _Optional[_Union[_types_pb2.Speculation, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Preempted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: _types_pb2.FinishReason
    def __init__(self, reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ...) -> None: ...

class HandoffRequest(_message.Message):
    __slots__ = ("header", "kv", "draft", "commit")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    header: HandoffHeader
    kv: KvFrame
    draft: DraftFrame
    commit: CommitFrame
    def __init__(self, header: _Optional[_Union[HandoffHeader, _Mapping]] = ..., kv: _Optional[_Union[KvFrame, _Mapping]] = ..., draft: _Optional[_Union[DraftFrame, _Mapping]] = ..., commit: _Optional[_Union[CommitFrame, _Mapping]] = ...) -> None: ...

class HandoffHeader(_message.Message):
    __slots__ = ("lease_id", "kv_dtype", "stream", "crc32c")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    kv_dtype: str
    stream: int
    crc32c: int
    def __init__(self, lease_id: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., stream: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class KvFrame(_message.Message):
    __slots__ = ("index", "part", "layer_start", "layer_end", "head_start", "head_end", "token_start", "token_end", "crc32c", "data", "sample")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    index: int
    part: KvPart
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int
    crc32c: int
    data: bytes
    sample: int
    def __init__(self, index: _Optional[int] = ..., part: _Optional[_Union[KvPart, str]] = ..., layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., head_start: _Optional[int] = ..., head_end: _Optional[int] = ..., token_start: _Optional[int] = ..., token_end: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ..., sample: _Optional[int] = ...) -> None: ...

class DraftFrame(_message.Message):
    __slots__ = ("index", "first_token", "tree_tokens", "tree_parents", "tree_scores", "sample", "first_logprobs", "crc32c")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TREE_PARENTS_FIELD_NUMBER: _ClassVar[int]
    TREE_SCORES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    index: int
    first_token: int
    tree_tokens: _containers.RepeatedScalarFieldContainer[int]
    tree_parents: _containers.RepeatedScalarFieldContainer[int]
    tree_scores: _containers.RepeatedScalarFieldContainer[float]
    sample: int
    first_logprobs: _types_pb2.TokenLogprobs
    crc32c: int
    def __init__(self, index: _Optional[int] = ..., first_token: _Optional[int] = ..., tree_tokens: _Optional[_Iterable[int]] = ..., tree_parents: _Optional[_Iterable[int]] = ..., tree_scores: _Optional[_Iterable[float]] = ..., sample: _Optional[int] = ..., first_logprobs: _Optional[_Union[_types_pb2.TokenLogprobs, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class CommitFrame(_message.Message):
    __slots__ = ("frames", "kv_bytes", "crc32c")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    frames: int
    kv_bytes: int
    crc32c: int
    def __init__(self, frames: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class HandoffResponse(_message.Message):
    __slots__ = ("next_index", "ready", "resend", "crc32c")
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    next_index: int
    ready: bool
    resend: _containers.RepeatedScalarFieldContainer[int]
    crc32c: int
    def __init__(self, next_index: _Optional[int] = ..., ready: _Optional[bool] = ..., resend: _Optional[_Iterable[int]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("lease_id", "reason")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    reason: str
    def __init__(self, lease_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeServiceGetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeServiceGetStatusResponse(_message.Message):
    __slots__ = ("incarnation", "fingerprint", "model", "max_model_len", "blocks_total", "blocks_used", "leases", "running", "max_batch", "tasks", "tree", "speculation", "emitted_tokens", "cold_starts", "queued", "preemptions", "reused_tokens")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COLD_STARTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    fingerprint: _types_pb2.Fingerprint
    model: str
    max_model_len: int
    blocks_total: int
    blocks_used: int
    leases: int
    running: int
    max_batch: int
    tasks: int
    tree: str
    speculation: _types_pb2.Speculation
    emitted_tokens: int
    cold_starts: int
    queued: int
    preemptions: int
    reused_tokens: int
    def __init__(self, incarnation: _Optional[str] = ..., fingerprint: _Optional[_Union[_types_pb2.Fingerprint, _Mapping]] = ..., model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_used: _Optional[int] = ..., leases: _Optional[int] = ..., running: _Optional[int] = ..., max_batch: _Optional[int] = ..., tasks: _Optional[int] = ..., tree: _Optional[str] = ..., speculation: _Optional[_Union[_types_pb2.Speculation, _Mapping]] = ..., emitted_tokens: _Optional[int] = ..., cold_starts: _Optional[int] = ..., queued: _Optional[int] = ..., preemptions: _Optional[int] = ..., reused_tokens: _Optional[int] = ...) -> None: ...
