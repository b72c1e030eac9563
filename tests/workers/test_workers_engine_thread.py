"""The engine's thread: order, turns between commands and steps, failure and stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from branchline.engine.thread import ITERATION_BUDGET, EngineStoppedError, EngineThread


@pytest.fixture
async def thread() -> AsyncIterator[EngineThread]:
    thread = EngineThread("test-engine")
    yield thread
    assert await thread.stop(5.0)


async def test_commands_run_in_order_on_one_thread_and_answer(thread: EngineThread) -> None:
    ran: list[int] = []
    idents = await asyncio.gather(
        *(thread.submit(lambda number=number: (ran.append(number), threading.get_ident())[1]) for number in range(20))
    )
    assert ran == list(range(20))
    assert len(set(idents)) == 1
    assert idents[0] != threading.get_ident()


async def test_an_error_reaches_the_caller_and_the_thread_goes_on(thread: EngineThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await thread.submit(lambda: 1 // 0)
    assert await thread.submit(lambda: 7) == 7


async def test_a_cancelled_caller_does_not_cancel_the_command(thread: EngineThread) -> None:
    gate, ran = threading.Event(), []
    thread.submit(gate.wait, 5.0)
    thread.submit(ran.append, 1).cancel()
    gate.set()
    assert await thread.submit(lambda: list(ran)) == [1]


async def test_bulk_commands_give_way_to_steps(thread: EngineThread) -> None:
    """Between two steps no more than the budget is moved, however much waits."""
    trace: list[str] = []
    gate = threading.Event()

    def step() -> bool:
        trace.append("step")
        return len(trace) < 40

    thread.submit(lambda: (thread.use(step), gate.wait(5.0)))
    last = [thread.submit_bulk(ITERATION_BUDGET // 2, trace.append, "bulk") for _ in range(8)][-1]
    gate.set()
    await last
    await thread.submit(lambda: None)
    runs = "".join("b" if entry == "bulk" else "s" for entry in trace).split("s")
    assert max(map(len, runs)) == 2
    assert sum(map(len, runs)) == 8


async def test_it_sleeps_while_there_is_no_work(thread: EngineThread) -> None:
    steps = 0

    def step() -> bool:
        nonlocal steps
        steps += 1
        return False

    await thread.submit(thread.use, step)
    await asyncio.sleep(0.1)
    assert steps <= 2


async def test_a_step_that_fails_for_good_refuses_whoever_waits() -> None:
    thread = EngineThread("test-engine")

    def step() -> bool:
        raise MemoryError("no more")

    await thread.submit(thread.use, step)
    with pytest.raises(MemoryError):
        await asyncio.wait_for(thread.failed, 5.0)
    with pytest.raises(EngineStoppedError):
        await thread.submit(lambda: 1)
    assert await thread.stop(5.0)


async def test_stop_runs_what_was_submitted_before_and_refuses_the_rest() -> None:
    thread = EngineThread("test-engine")
    ran: list[int] = []
    thread.submit(ran.append, 1)
    assert await thread.stop(5.0)
    assert ran == [1]
    with pytest.raises(EngineStoppedError):
        await thread.submit(ran.append, 2)
    assert ran == [1]
