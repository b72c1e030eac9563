"""The two ways between a cache and the bytes of a frame; the one for GPUs runs here without a stream of its own."""

from __future__ import annotations

import pytest
import torch

from branchline.engine.cache import PagedKvCache
from branchline.engine.kv_copies import STAGING_BUFFERS, HostCopies, KvCopies, Place, StagedCopies, copies_of
from branchline.engine.models.protocol import KvGeometry

KINDS = [HostCopies, StagedCopies]


def cache(dtype: torch.dtype = torch.bfloat16, head_dim: int = 5) -> PagedKvCache:
    made = PagedKvCache(KvGeometry(3, 2, head_dim, dtype), 12, 4, torch.device("cpu"))
    made.storage.normal_(generator=torch.Generator().manual_seed(0))
    return made


def rows(of: PagedKvCache, place: Place) -> torch.Tensor:
    """What `read` is to bring, row by row."""
    slots = [slot for run in place.runs for slot in run]
    return of.storage[slice(*place.layers), :, slice(*place.heads)][:, :, :, slots].transpose(2, 3).contiguous()


def read(copies: KvCopies, pieces: list[tuple[Place, int]]) -> list[bytes]:
    """With an odd distance from the buffer's begin, as in a message."""
    buffers = [bytearray(size + 7) for _, size in pieces]
    asked = [(place, memoryview(one)[7:]) for (place, _), one in zip(pieces, buffers, strict=True)]
    done = 0
    for _ in copies.read(asked):
        done += 1
        assert any(buffers[done - 1][7:])
    assert done == len(pieces)
    return [bytes(one[7:]) for one in buffers]


PLACES = [
    Place((0, 3), (0, 2), [range(4, 9)]),
    Place((1, 2), (1, 2), [range(20, 24), range(4, 8), range(9, 10)]),
    Place((0, 1), (0, 2), [range(at, at + 2) for at in range(44, 4, -4)]),
    Place((2, 3), (0, 1), [range(30, 31)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_the_rows_in_canonical_order(kind: type[KvCopies], dtype: torch.dtype) -> None:
    ours = cache(dtype)
    expected = [rows(ours, place).view(torch.uint8).numpy().tobytes() for place in PLACES]
    pieces = [(place, len(data)) for place, data in zip(PLACES, expected, strict=True)]
    assert len(pieces) > STAGING_BUFFERS, "buffers are to be used again"
    assert read(kind(ours), pieces) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_lies_where_it_was_and_nowhere_else(kind: type[KvCopies]) -> None:
    ours, theirs = cache(), cache()
    theirs.storage.zero_()
    copies = kind(theirs)
    expected = torch.zeros_like(ours.storage)
    for place in PLACES:
        data = memoryview(bytes(3) + rows(ours, place).view(torch.uint8).numpy().tobytes())[3:]
        copies.load(place, data)
        slots = [slot for run in place.runs for slot in run]
        part = (slice(*place.layers), slice(None), slice(*place.heads), slots)
        expected[part] = ours.storage[part]
    assert torch.equal(theirs.storage, expected)


def test_a_cache_in_host_memory_is_not_staged() -> None:
    assert isinstance(copies_of(cache()), HostCopies)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_cache_gives_and_takes_the_same_bytes() -> None:
    ours, device = cache(head_dim=64), torch.device("cuda")
    theirs = PagedKvCache(ours.geometry, 12, 4, device)
    theirs.storage.copy_(ours.storage)
    copies = copies_of(theirs)
    assert isinstance(copies, StagedCopies)
    expected = [rows(ours, place).view(torch.uint8).numpy().tobytes() for place in PLACES]
    pieces = [(place, len(data)) for place, data in zip(PLACES, expected, strict=True)]
    assert read(copies, pieces) == expected
    before = theirs.storage.clone()
    for place, data in zip(PLACES, expected, strict=True):
        copies.load(place, data)
    assert torch.equal(theirs.storage, before)
