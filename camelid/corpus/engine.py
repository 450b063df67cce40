"""Where tasks run: in processes on this machine, or on a Ray cluster. Every task is a function of plain arguments that
leaves its result in files and does nothing when they are there, so an engine has nothing to remember."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from camelid.errors import CamelidError, MissingExtra
from camelid.kernels.threads import cores

Task = tuple[Any, ...]
Engine = Callable[[Callable[..., None], Sequence[Task]], Iterator[int]]
"""engine(function, tasks) runs function(*task) for every task and yields how many are done, as they finish."""


def local(workers: int | None = None) -> Engine:
    """Processes of this machine; with one worker, this process itself."""
    count = workers or cores()

    def run(function: Callable[..., None], tasks: Sequence[Task]) -> Iterator[int]:
        if count == 1 or len(tasks) <= 1:
            for done, task in enumerate(tasks, 1):
                function(*task)
                yield done
            return
        yield from _in_processes(function, tasks, min(count, len(tasks)))

    return run


def _in_processes(function: Callable[..., None], tasks: Sequence[Task], workers: int) -> Iterator[int]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, mp_context=get_context("forkserver"), initializer=_one_thread)
    try:
        futures = [pool.submit(function, *task) for task in tasks]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            yield done
    except BrokenProcessPool:
        raise CamelidError(
            "a worker process was killed, perhaps for want of memory: run the same command again, it goes on where it "
            "stopped; workers=1 needs the least memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    """A worker is one of many; its libraries shall not start threads of their own."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        os.environ[name] = "1"


def ray(workers: int | None = None) -> Engine:
    """Tasks as rows of a Ray dataset. RAY_ADDRESS names a cluster; its nodes must see the same files as this one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray as cluster
        import ray.data
    except ImportError:
        raise MissingExtra("ray", "ray", "engine=ray") from None

    def run(function: Callable[..., None], tasks: Sequence[Task]) -> Iterator[int]:
        if not tasks:
            return
        if not cluster.is_initialized():
            cluster.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.range(len(tasks), override_num_blocks=len(tasks))
        held = cluster.put(list(tasks))

        def one(row: dict[str, Any]) -> dict[str, Any]:
            function(*cluster.get(held)[row["id"]])
            return row

        for done, _ in enumerate(dataset.map(one).iter_rows(), 1):
            yield done

    return run


def engine_named(name: str, workers: int | None) -> Engine:
    """ "local" or "ray"."""
    return ray(workers) if name == "ray" else local(workers)
