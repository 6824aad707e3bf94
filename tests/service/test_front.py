"""What surrounds every request: a burst begins a few at a time."""

import asyncio

from service.front import BEGUN_AT_ONCE, Turns


def test_a_burst_begins_a_few_at_a_time_in_its_order() -> None:
    begun: list[int] = []
    seen: list[int] = []

    async def request(number: int) -> None:
        await turns.take()
        begun.append(number)

    async def burst() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(request(number))
            while len(begun) < 100:
                seen.append(len(begun))
                await asyncio.sleep(0)

    turns = Turns()
    asyncio.run(asyncio.wait_for(burst(), timeout=10))
    assert begun == list(range(100))
    assert max(later - earlier for earlier, later in zip(seen, [*seen[1:], 100], strict=True)) <= BEGUN_AT_ONCE


def test_requests_that_come_apart_wait_for_nothing() -> None:
    async def one_after_another() -> int:
        turns, steps = Turns(), 0
        for _ in range(5 * BEGUN_AT_ONCE):
            taken = turns.take()
            try:
                while True:
                    taken.send(None)
                    steps += 1
            except StopIteration:
                await asyncio.sleep(0)
        return steps

    assert asyncio.run(one_after_another()) == 0
