"""Backends: where the cells of a sweep run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from experiments.cell import Cell

TRIES = 3
MESSAGE = 4000  # characters of an error; a pipe that nobody reads holds 64 KiB


@dataclass(frozen=True)
class Job:
    """A cell and where it belongs.

    Attributes:
        cell: The cell.
        records: Folder of records.
        runs: Folder of the runs' folders.
        threads: Threads of the run.
        keep: Whether a pruned run's folder is kept.
        options: Options of the run that are no part of what it is, such as where the data lie.
        models: Whether all that the run leaves is kept, and made again beside its record if it is not there.
    """

    cell: Cell
    records: Path
    runs: Path
    threads: int = 1
    keep: bool = False
    options: tuple[str, ...] = ()
    models: bool = False


Run = Callable[[Job], None]


class Backend(Protocol):
    """Starts jobs and tells which have ended."""

    def slots(self) -> int:
        """How many jobs run at a time."""
        ...

    def free(self) -> bool:
        """Whether one more job can start now."""
        ...

    def start(self, job: Job) -> None:
        """Start a job."""
        ...

    def ended(self) -> list[tuple[Job, str | None]]:
        """Jobs that have ended since the last call, with what went wrong, if anything."""
        ...

    def stop(self) -> None:
        """End everything that runs."""
        ...


def _end_with_the_sweep() -> None:
    """Wait for the end of the process that started this one, and end too; the next sweep takes its cell up."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)


def _child(run: Run, job: Job, pipe: Connection) -> None:
    """What a worker's process does: the job, then one word about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's affair: it ends its workers
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()  # a killed sweep cannot end them
    try:
        run(job)
        pipe.send(None)
    except Exception as error:
        pipe.send((str(error) or type(error).__name__)[-MESSAGE:])


class Local:
    """Processes on this machine, one a job; they are forked from a server that has imported everything already.

    Args:
        run: What a process does with its job.
        workers: Jobs at a time.
        preload: Modules that the server imports.
    """

    def __init__(self, run: Run, workers: int, preload: tuple[str, ...] = ("experiments.run",)) -> None:
        self.run, self.workers = run, workers
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
        if sys.platform != "win32":
            self._context.set_forkserver_preload(list(preload))
        self._running: list[tuple[BaseProcess, Connection, Job]] = []

    def slots(self) -> int:
        """The number of workers."""
        return self.workers

    def free(self) -> bool:
        """Whether fewer jobs run than there are workers."""
        return len(self._running) < self.workers

    def start(self, job: Job) -> None:
        """Start a process."""
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(self.run, job, theirs))
        process.start()
        theirs.close()
        self._running.append((process, mine, job))

    def ended(self) -> list[tuple[Job, str | None]]:
        """Jobs whose process has ended; one that was killed says so."""
        found: list[tuple[Job, str | None]] = []
        for entry in list(self._running):
            process, pipe, job = entry
            if process.is_alive():
                continue
            try:
                error = pipe.recv() if pipe.poll() else f"its process ended with code {process.exitcode}"
            except EOFError:
                error = f"its process ended with code {process.exitcode}"
            self._running.remove(entry)
            found.append((job, error))
        return found

    def stop(self) -> None:
        """Kill all processes."""
        for process, _, _ in self._running:
            process.kill()
            process.join()
        self._running.clear()


class Ray:
    """A Ray cluster whose machines share the folders of records and runs.

    A job whose worker is lost (killed, out of memory, its machine gone) is started again, a few times at most.

    Args:
        run: What a worker does with its job.
        cpus: CPUs of each job.
        gpus: GPUs of each job.
        tries: How often a job is started at most.

    Raises:
        ValueError: If Ray is not installed.
    """

    def __init__(self, run: Run, cpus: float = 1, gpus: float = 0, tries: int = TRIES) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("the ray backend needs the extra 'ray': pip install 'cut[ray]'") from error
        self._ray = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        if gpus > 0 and not ray.cluster_resources().get("GPU"):
            warnings.warn(f"the Ray cluster has no GPU; cells wait until it has {gpus:g}", stacklevel=2)
        self.cpus, self.gpus, self.tries = cpus, gpus, tries
        # Retries are ours, so that a lost worker is seen; one process a job, so that its peak memory is its own.
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(run)
        self._running: dict[Any, tuple[Job, int]] = {}

    def slots(self) -> int:
        """How many jobs the cluster's CPUs and GPUs have room for."""
        have = self._ray.cluster_resources()
        by_cpu = have.get("CPU", 1) / self.cpus if self.cpus else float("inf")
        by_gpu = have.get("GPU", 0) / self.gpus if self.gpus else float("inf")
        return max(1, int(min(by_cpu, by_gpu)))

    def free(self) -> bool:
        """Whether the cluster has room; a cluster that grows gets more."""
        return len(self._running) < self.slots()

    def start(self, job: Job, tries: int = 1) -> None:
        """Give a job to the cluster."""
        self._running[self._remote.remote(job)] = (job, tries)

    def ended(self) -> list[tuple[Job, str | None]]:
        """Jobs that have ended; one whose worker was lost starts again instead."""
        if not self._running:
            return []
        found: list[tuple[Job, str | None]] = []
        finished, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for reference in finished:
            job, tries = self._running.pop(reference)
            try:
                self._ray.get(reference)
                found.append((job, None))
            except self._ray.exceptions.RayTaskError as error:
                found.append((job, str(error.cause)))
            except self._ray.exceptions.RayError as error:
                if tries < self.tries:
                    self.start(job, tries + 1)
                else:
                    found.append((job, f"its worker was lost {tries} times: {type(error).__name__}"))
        return found

    def stop(self) -> None:
        """Cancel what runs and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()
