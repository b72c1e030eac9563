"""How KV gets from a cache into the bytes of a frame and back: by one copy in host memory, or through pinned buffers
from a GPU's.

Both ways have the same two calls. `read` fills writable buffers with the wire's canonical order, `[layers, 2, tokens,
heads, head_dim]`; `load` is the inverse. The slots of the tokens are given as runs without gaps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from branchline.engine.cache import PagedKvCache

Buffer = bytes | memoryview

#: Pinned buffers on each way. One is filled by the device while another is emptied by the host.
STAGING_BUFFERS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A rectangle of a cache: half-open ranges of layers and heads, and the slots of its tokens."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    runs: Sequence[range]


class KvCopies(Protocol):
    def read(self, pieces: Iterable[tuple[Place, memoryview]]) -> Iterator[None]:
        """Fills each buffer, which has its place's size. Yields once for each that is complete, in their order."""

    def load(self, place: Place, data: Buffer) -> None:
        """`data`, of the place's size, may be dropped when this returns."""


def copies_of(cache: PagedKvCache) -> KvCopies:
    """The way that fits the cache's memory."""
    return HostCopies(cache) if cache.storage.device.type == "cpu" else StagedCopies(cache)


class HostCopies:
    """For a cache in host memory: rows go straight between it and the buffer. A row of one head is moved as an opaque
    item, so its type doesn't matter and the buffer need not be aligned."""

    def __init__(self, cache: PagedKvCache) -> None:
        self._cache = cache
        self._row = np.dtype((np.void, cache.geometry.head_dim * cache.geometry.dtype.itemsize))

    def read(self, pieces: Iterable[tuple[Place, memoryview]]) -> Iterator[None]:
        for place, out in pieces:
            for rows, frame in self._pairs(place, out):
                frame[...] = rows
            yield

    def load(self, place: Place, data: Buffer) -> None:
        for rows, frame in self._pairs(place, data):
            rows[...] = frame

    def _pairs(self, place: Place, data: Buffer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each run its rows in the cache and in the frame, both `[layers, 2, tokens, heads]`."""
        rows = self._cache.storage.view(torch.uint8).numpy().view(self._row)[..., 0]  # [layers, 2, heads, slots]
        part = rows[slice(*place.layers), :, slice(*place.heads)]
        layers, _, heads, _ = part.shape
        frame = np.frombuffer(data, self._row).reshape(layers, 2, -1, heads)
        at = 0
        for run in place.runs:
            yield part[:, :, :, run.start : run.stop].swapaxes(2, 3), frame[:, :, at : at + len(run)]
            at += len(run)


@dataclass(eq=False)
class _Staging:
    """A host buffer between the device and a frame; `done` is behind the last copy from or to it."""

    buffer: torch.Tensor
    done: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


class StagedCopies:
    """For a cache on a GPU: pinned buffers, copies on a stream of their own, which waits for the computation's and is
    waited for by it. While one buffer is on its way, the host takes out the last one and the next rows are gathered.

    On a CPU, where tests run it, buffers aren't pinned and copies are done at once.
    """

    def __init__(self, cache: PagedKvCache) -> None:
        self._cache = cache
        self._device = cache.storage.device
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._ring: deque[_Staging] = deque(_Staging(self._host(0)) for _ in range(STAGING_BUFFERS))

    def read(self, pieces: Iterable[tuple[Place, memoryview]]) -> Iterator[None]:
        under_way: deque[tuple[_Staging, memoryview]] = deque()
        for place, out in pieces:
            if len(under_way) == STAGING_BUFFERS:
                _take_out(*under_way.popleft())
                yield
            rows = self._cache.read(place.layers, place.heads, place.runs).view(torch.uint8).view(-1)
            staging = self._next(out.nbytes)
            self._copy(staging, staging.buffer[: out.nbytes], rows)
            under_way.append((staging, out))
        while under_way:
            _take_out(*under_way.popleft())
            yield

    def load(self, place: Place, data: Buffer) -> None:
        source = np.frombuffer(data, np.uint8)
        staging = self._next(source.nbytes)
        staging.wait()  # its last load may be on the way yet
        staging.buffer[: source.nbytes].numpy()[...] = source
        rows = torch.empty(source.nbytes, dtype=torch.uint8, device=self._device)
        self._copy(staging, rows, staging.buffer[: source.nbytes])
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        geometry = self._cache.geometry
        heads = place.heads[1] - place.heads[0]
        shaped = rows.view(geometry.dtype).view(place.layers[1] - place.layers[0], 2, -1, heads, geometry.head_dim)
        self._cache.load(place.layers, place.heads, place.runs, shaped)

    def _copy(self, staging: _Staging, target: torch.Tensor, source: torch.Tensor) -> None:
        """Behind what the computation's stream has been given so far."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            staging.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            staging.done.record(self._stream)
        on_device = source if source.is_cuda else target
        on_device.record_stream(self._stream)  # its memory isn't given to others before the copy is done

    def _next(self, size: int) -> _Staging:
        """The buffer whose turn it is, grown to `size` bytes."""
        staging = self._ring[0]
        self._ring.rotate(-1)
        if len(staging.buffer) < size:
            staging.wait()
            staging.buffer = self._host(size)
        return staging

    def _host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)


def _take_out(staging: _Staging, out: memoryview) -> None:
    staging.wait()
    np.frombuffer(out, np.uint8)[...] = staging.buffer[: out.nbytes].numpy()
