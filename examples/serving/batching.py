"""Requests that wait, put together to one call of a program."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from parsing import Asked
from served import SIZES, Served


class Waiting(NamedTuple):
    """A request that waits for its answer."""

    name: str
    asked: Asked
    future: asyncio.Future


class Batcher:
    """Puts rows of waiting requests together, runs them in one thread, and parts the results.

    Args:
        served: what is run.
    """

    def __init__(self, served: Served):
        self.served = served
        self.waiting: list[Waiting] = []
        self.more = asyncio.Event()
        self.thread = ThreadPoolExecutor(1)

    async def ask(self, name: str, asked: Asked) -> dict[str, Any]:
        """Return what a program returns of rows, and their novelty, by the programs' names."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(name, asked, future))
        self.more.set()
        return await future

    async def serve(self) -> None:
        """Answer for good."""
        while await self.more.wait():
            together = self.choose()
            if not self.waiting:
                self.more.clear()
            name, asked = together[0].name, [each.asked for each in together]
            run = asyncio.get_running_loop().run_in_executor(self.thread, self.run, name, asked)
            try:
                results = await run
            except Exception as error:  # of any kind: the next requests are answered all the same
                results = [error] * len(together)
            for each, result in zip(together, results, strict=True):
                if each.future.done():  # as the client has gone
                    continue
                if isinstance(result, Exception):
                    each.future.set_exception(result)
                else:
                    each.future.set_result(result)

    def choose(self) -> list[Waiting]:
        """Take out the request that waits longest, and those that can be run with it."""
        first, chosen, left = self.waiting[0], list[Waiting](), list[Waiting]()
        room = SIZES[-1]
        for each in self.waiting:
            rows = len(each.asked.numbers)
            if each.name == first.name and rows <= room and self.is_alike(first, each):
                chosen.append(each)
                room -= rows
            else:
                left.append(each)
        self.waiting = left
        return chosen

    def is_alike(self, one: Waiting, other: Waiting) -> bool:
        """Return whether two requests have the same of all that rows share."""
        shared = [name for name in one.asked.inputs if self.served.row_axis(name) is None]
        pairs = ((one.asked.inputs[name], other.asked.inputs[name]) for name in shared)
        return all(np.array_equal(*pair) for pair in pairs)

    def run(self, name: str, all_asked: list[Asked]) -> list[dict[str, Any]]:
        """Run a program and the novelty on the rows of several requests."""
        keys, numbers = (
            np.concatenate([getattr(asked, what) for asked in all_asked])
            for what in ("keys", "numbers")
        )
        inputs = {key: self.join(key, all_asked) for key in all_asked[0].inputs}
        names = {name, "novelty"} & self.served.programs.keys()
        found = {name: self.served.run(name, inputs, keys, numbers) for name in names}
        stops = np.cumsum([len(asked.numbers) for asked in all_asked])
        rows = map(slice, [0, *stops[:-1]], stops)
        return [{name: self.served.cut(name, found[name], each) for name in found} for each in rows]

    def join(self, name: str, all_asked: list[Asked]) -> np.ndarray:
        """Return an input of several requests."""
        axis, arrays = self.served.row_axis(name), [asked.inputs[name] for asked in all_asked]
        return arrays[0] if axis is None else np.concatenate(arrays, axis)
