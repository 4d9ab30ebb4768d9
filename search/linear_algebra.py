"""Linear algebra beside workers that keep every core busy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController


def on_one_thread() -> AbstractContextManager[object]:
    """Matrix products and factorisations on one thread, while it is entered.

    Threads of BLAS wait for each other by spinning. Where workers hold the cores, factorising 500 x 500 takes
    0.45 s on two threads instead of 0.005 s on one, and what spins is taken from the workers.
    """
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limited


@cache
def _controller() -> ThreadpoolController:
    """Finding the libraries takes longer than limiting them."""
    return ThreadpoolController()
