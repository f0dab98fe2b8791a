"""Run the programs of a launch as a GPU might: several at once, begun in any order, each held up anywhere.

Triton's interpreter runs one program after the other, so that whatever a program waits for is there already, and what
it forgets to wait for as well. Here every program has a thread; one of them runs at a time, and at loads, stores and
atomics a seeded die passes the turn on. A schedule is repeated by its seed. What a memory model allows is not tried.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

from tests.support.interpreter import lean_interpreter

TURNS = ("create_masked_load", "create_masked_store", "create_atomic_rmw")
"""What a program does between which others may have their turn."""
MOST_TURNS = 5_000
"""After which nobody is taken to get on; a launch of the tests takes 1,000."""


class Hang(AssertionError):
    """Nobody gets on."""


class Schedule:
    """Runs programs by turns."""

    def __init__(self, seed: int, resident: int, chance: float) -> None:
        """Keep as many programs under way as a GPU has room for; at each memory operation pass on with this chance."""
        self._die, self._resident, self._chance = random.Random(seed), resident, chance
        self._own = threading.local()
        self._given_back = threading.Semaphore(0)
        self._failure: BaseException | None = None
        self.turns = 0

    def pass_on(self) -> None:
        """Let another program have its turn, perhaps."""
        turn = getattr(self._own, "turn", None)
        if turn is not None and self._die.random() < self._chance:
            self._given_back.release()
            turn.acquire()
            interpreter.interpreter_builder.set_grid_idx(*self._own.place)
            if self._failure is not None:
                raise SystemExit

    def run(self, program: Callable[[], None], grid: tuple[int, ...]) -> None:
        """Run it in all places of a grid; the first failure ends all."""
        places = list(itertools.product(*(range(size) for size in grid)))
        waiting = self._die.sample(places, len(places))
        running: list[tuple[threading.Thread, threading.Semaphore]] = []
        while waiting or running:
            while waiting and len(running) < self._resident and self._failure is None:
                turn = threading.Semaphore(0)
                thread = threading.Thread(target=self._program, args=(program, waiting.pop(), turn), daemon=True)
                thread.start()
                running.append((thread, turn))
            if not running:
                break
            thread, turn = self._die.choice(running)
            turn.release()
            self._given_back.acquire()
            self.turns += 1
            if self.turns > MOST_TURNS and self._failure is None:
                self._failure = Hang(f"{len(running)} programs under way, {len(waiting)} not begun")
            if not turn_is_kept(thread):
                running.remove((thread, turn))
        if self._failure is not None:
            raise self._failure

    def _program(self, program: Callable[[], None], place: tuple[int, ...], turn: threading.Semaphore) -> None:
        turn.acquire()
        self._own.turn, self._own.place = turn, place
        interpreter.interpreter_builder.set_grid_idx(*place)
        try:
            if self._failure is None:
                with np.errstate(all="ignore"):  # a kernel with a fault computes with anything
                    program()
        except SystemExit:
            pass
        except BaseException as failure:  # noqa: BLE001 - told by run
            self._failure = self._failure or failure
        finally:
            threading.current_thread().name = "done"
            self._given_back.release()


def turn_is_kept(thread: threading.Thread) -> bool:
    """Whether a program has more to do."""
    return thread.name != "done"


@contextmanager
def scheduled(seed: int, resident: int, chance: float = 0.05) -> Iterator[Schedule]:
    """Launch kernels by such a schedule."""
    schedule = Schedule(seed, resident, chance)
    builder = interpreter.interpreter_builder

    def turned(operation: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any) -> Any:
            schedule.pass_on()
            return operation(*arguments)

        return do

    def launch(self: Any, *given: Any, **options: Any) -> None:
        names = inspect.getfullargspec(self.fn)
        options = {name: value for name, value in options.items() if name in (*names.args, *names.kwonlyargs)}
        scopes.append(interpreter._patch_lang(self.fn))
        arguments = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in inspect.getcallargs(self.fn, *given, **options).items()
        }
        grid = (*self.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        schedule.run(partial(self.fn, **arguments), grid)

    scopes: list[Any] = []
    with lean_interpreter(), pytest.MonkeyPatch.context() as patch:
        for name in TURNS:
            patch.setattr(builder, name, turned(getattr(builder, name)))
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        try:
            yield schedule
        finally:
            for scope in reversed(scopes):
                scope.restore()
