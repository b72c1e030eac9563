"""Running generations, for both clients: what comes, its sum, and going on where a gateway failed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self

import grpc

from branchline.client import transport
from branchline.client.collect import ChunkT, Collects, ResultT, whole
from branchline.client.errors import (
    BranchlineError,
    CancelledError,
    OverloadedError,
    UnavailableError,
    from_rpc_error,
)
from branchline.client.recovery import Recovery

#: Makes the call, and makes it again, given the target that has failed. Returns gRPC's call, and to whom it goes.
Start = Callable[[str | None], tuple[Any, str]]


class Stream(Generic[ChunkT, ResultT]):
    """A running generation: an iterator of chunks which knows the whole result after its end.

    It is cancelled, and everything it holds on the workers is freed, by `close()`, by leaving its `with` block, or
    when the last reference to it goes (so `for chunk in client.generate(…): break` is enough).
    """

    def __init__(self, start: Start, recovery: Recovery[Any], collector: Collects[ChunkT, ResultT]) -> None:
        self._start = start
        self._recovery = recovery
        self._collector = collector
        self._closed = threading.Event()
        self._call, self._target = start(None)

    def __iter__(self) -> Iterator[ChunkT]:
        return self

    def __next__(self) -> ChunkT:
        while True:
            try:
                with mapped_errors(self._target):
                    response = next(self._call, None)
            except (OverloadedError, UnavailableError) as error:
                self._go_on(error)
                continue
            if response is None:
                self._collector.finish()
                raise StopIteration
            chunk = self._collector.add(response)
            if chunk is not None:
                return chunk

    def _go_on(self, error: BranchlineError) -> None:
        """Makes the call again when its time has come. Raises `error` when it isn't to be, or the stream is closed."""
        if self._closed.wait(self._recovery.pause(error)):
            raise error
        self._call, self._target = self._start(self._target if isinstance(error, UnavailableError) else None)
        if self._closed.is_set():  # meanwhile
            self._call.cancel()

    @property
    def result(self) -> ResultT:
        """All of it together. Raises RuntimeError before the stream has ended."""
        return whole(self._collector)

    def request_id(self) -> str:
        """What `abort` and `status` call it. Waits until the gateway has read the request."""
        with mapped_errors(self._target):
            return transport.request_id(self._call.initial_metadata())

    def close(self) -> None:
        """Cancels the generation unless it has ended. Idempotent."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # absent when the call could not be made
            self.close()


@contextlib.contextmanager
def mapped_errors(target: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from error


class AsyncStream(Generic[ChunkT, ResultT]):
    """A running generation: an asynchronous iterator of chunks which knows the whole result after its end.

    It is cancelled, and everything it holds on the workers is freed, by `close()`, by leaving its `async with`
    block, by cancelling the task that waits for it, or when the last reference to it goes.
    """

    def __init__(self, start: Start, recovery: Recovery[Any], collector: Collects[ChunkT, ResultT]) -> None:
        self._start = start
        self._recovery = recovery
        self._collector = collector
        self._closed = False
        self._call, self._target = start(None)

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        while True:
            try:
                with aio_mapped_errors(self._target):
                    response = await self._call.read()
            except (OverloadedError, UnavailableError) as error:
                await self._go_on(error)
                continue
            if response is grpc.aio.EOF:
                self._collector.finish()
                raise StopAsyncIteration
            chunk = self._collector.add(response)
            if chunk is not None:
                return chunk

    async def _go_on(self, error: BranchlineError) -> None:
        """Makes the call again when its time has come. Raises `error` when it isn't to be, or the stream is closed."""
        await asyncio.sleep(self._recovery.pause(error))
        if self._closed:
            raise error
        self._call, self._target = self._start(self._target if isinstance(error, UnavailableError) else None)

    @property
    def result(self) -> ResultT:
        """All of it together. Raises RuntimeError before the stream has ended."""
        return whole(self._collector)

    async def request_id(self) -> str:
        """What `abort` and `status` call it. Waits until the gateway has read the request."""
        with aio_mapped_errors(self._target):
            return transport.request_id(await self._call.initial_metadata())

    async def close(self) -> None:
        """Cancels the generation unless it has ended. Idempotent."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # absent when the call could not be made
            self._call.cancel()


@contextlib.contextmanager
def aio_mapped_errors(target: str) -> Iterator[None]:
    """Around an await of gRPC's. A call that somebody else cancels ends for gRPC as if this task had been cancelled;
    its caller must not believe that.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CancelledError("the call or its client was closed", "CANCELLED") from None
