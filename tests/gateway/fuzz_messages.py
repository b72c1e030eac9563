"""Random protobuf messages: of a request's type with values at the borders, and bytes that are none."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

#: How deep messages within messages go, and how many items a list has at most, unless it is a long one.
_DEPTH, _ITEMS, _LONG = 4, 4, 3000
_TEXTS = (
    "",
    "a",
    "the quick brown fox",
    "<|end|>",
    "\x00",
    "\ufffd",
    "👩‍👩‍👧‍👦",
    "ß" * 200,
    "{{ x }}{% raw %}",
    "user",
    "a" * 9000,
)

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    # Numbers that the enum doesn't have are carried as well.
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def message(draw: random.Random, kind: Descriptor, depth: int = _DEPTH) -> Message:
    """Any message of this type: every field is left out or set, of a oneof the last one counts."""
    built: Message = GetMessageClass(kind)()
    density = draw.random()
    for field in kind.fields:
        if draw.random() < density and (field.message_type is None or depth):
            _set(draw, built, field, depth)
    return built


def bytes_of(
    draw: random.Random, kind: Descriptor, plausible: Callable[[random.Random], Message] | None = None
) -> bytes:
    """A message on the wire: as it is, with a field that nobody knows, or damaged. `plausible` makes one in three."""
    make = plausible if plausible is not None and draw.random() < 1 / 3 else None
    data = bytearray((make(draw) if make else message(draw, kind)).SerializeToString())
    match draw.randrange(6):
        case 0:
            data += b"\xfa\x3e\x03new"  # field 1007
        case 1:
            del data[draw.randrange(len(data) + 1) :]
        case 2:
            for _ in range(draw.randrange(1, 8)):
                if data:
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 3:
            data = bytearray(draw.randbytes(draw.randrange(64)))
    return bytes(data)


def _set(draw: random.Random, built: Message, field: FieldDescriptor, depth: int) -> None:
    if not field.is_repeated:
        if field.message_type is None:
            setattr(built, field.name, _scalar(draw, field))
        else:
            getattr(built, field.name).CopyFrom(message(draw, field.message_type, depth - 1))
        return
    items = getattr(built, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        if value.message_type is None:
            for _ in range(draw.randrange(_ITEMS)):
                items[_scalar(draw, key)] = _scalar(draw, value)
    elif field.message_type is not None:
        items.extend(message(draw, field.message_type, depth - 1) for _ in range(draw.randrange(_ITEMS)))
    else:
        count = _LONG if draw.random() < 0.02 else draw.randrange(_ITEMS)
        one = _scalar(draw, field)
        items.extend(one if count == _LONG else _scalar(draw, field) for _ in range(count))


def _scalar(draw: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return draw.randbytes(draw.randrange(32))
        case FieldDescriptor.CPPTYPE_STRING:
            return draw.choice(_TEXTS)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return draw.choice(
                (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-30, 1e30, math.nan, math.inf, -math.inf, draw.random())
            )
    low, high = _INTEGERS[field.cpp_type]
    return draw.choice((low, high, 0, 1, 2, 3, 7, draw.randrange(300), max(low, -1), draw.randint(low, high)))
