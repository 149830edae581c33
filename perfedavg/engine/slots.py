"""Training slots: threads of this process, each with models of its own, on which groups of clients train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import TypeVar

from perfedavg.training.client_models import ClientModels
from perfedavg.training.flat_model import FlatModel
from perfedavg.training.stacked_model import StackedModel

Result = TypeVar("Result")


class TrainingSlot:
    """What one thread trains with: a model for a single client, and models for a group, made when first needed."""

    def __init__(self, build_single: Callable[[], FlatModel], build_group: Callable[[], StackedModel]) -> None:
        self._single = build_single()
        self._build_group = build_group

    @cached_property
    def _group(self) -> StackedModel:
        return self._build_group()

    def models(self, num_clients: int, stacked: bool = False) -> ClientModels:
        """Models with room for so many clients. stacked: also a single client's are stacked ones."""
        return self._group if stacked or num_clients > 1 else self._single


class SlotPool:
    """The slots of this process.

    explain: turns what a user's own code raised into an error that says so, given the clients; None leaves it.
    """

    def __init__(
        self, slots: Sequence[TrainingSlot], explain: Callable[[Exception, Sequence[int]], Exception] | None
    ) -> None:
        self.num_slots = len(slots)
        self._explain = explain
        self._free: SimpleQueue[TrainingSlot] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._threads = ThreadPoolExecutor(self.num_slots, thread_name_prefix="slot")

    def run(self, group: Sequence[int], work: Callable[[TrainingSlot], Result]) -> Result:
        """Do a group's work in this thread, on the next free slot."""
        slot = self._free.get()
        try:
            return work(slot)
        except Exception as error:
            if self._explain is None:
                raise
            raise self._explain(error, group) from None
        finally:
            self._free.put(slot)

    def submit(self, work: Callable[[Sequence[int]], Result], group: Sequence[int]) -> Future[Result]:
        """Call `work` in a thread of the pool, behind what was submitted before."""
        return self._threads.submit(work, group)

    def map(self, work: Callable[[Sequence[int]], list[Result]], groups: Sequence[Sequence[int]]) -> list[Result]:
        """`work` for every group, in threads of the pool. With the largest first, the slots end together."""
        return [result for results in self._threads.map(work, groups) for result in results]
