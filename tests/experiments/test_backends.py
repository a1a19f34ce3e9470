"""Backends: processes of this machine, and Ray with workers that get lost."""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time

import pytest

from experiments.backends import MESSAGE, Job, Local, Ray
from tests.experiments import sweep_stub as stub

LIGHT = ("tests.experiments.sweep_stub",)


def job(base, cell=None):
    return Job(cell or stub.dense(1), base / "records", base / "runs")


def until_ended(backend, number=1, seconds=60.0):
    """What has ended, as id to error, once so many have."""
    found, end = {}, time.monotonic() + seconds
    while len(found) < number:
        assert time.monotonic() < end, f"only {found} ended"
        found |= {j.cell.id: error for j, error in backend.ended()}
        time.sleep(0.02)
    return found


def started(base):
    return [line.split()[0] for line in (base / "started.txt").read_text().splitlines()]


@pytest.fixture
def local():
    """Makes backends with two workers, and ends what they run."""
    made = []

    def make(run):
        made.append(Local(run, 2, LIGHT))
        return made[-1]

    yield make
    for backend in made:
        backend.stop()


def test_as_many_jobs_as_workers(tmp_path, local):
    backend = local(stub.run)
    first, second = stub.dense(1), stub.dense(2)
    for cell in (first, second):
        (tmp_path / f"hold-{cell.id}").touch()
        assert backend.free() and backend.slots() == 2
        backend.start(job(tmp_path, cell))
    assert not backend.free() and backend.ended() == []
    (tmp_path / f"hold-{first.id}").unlink()
    assert until_ended(backend) == {first.id: None}
    assert backend.free()
    (tmp_path / f"hold-{second.id}").unlink()
    assert until_ended(backend) == {second.id: None}
    assert backend.ended() == []


def test_what_went_wrong_is_told(tmp_path, local):
    backend = local(stub.run)
    bad, killed = stub.dense(1).id, stub.dense(2).id
    (tmp_path / f"fail-{bad}").touch()
    (tmp_path / f"kill-{killed}").touch()
    backend.start(job(tmp_path, stub.dense(1)))
    backend.start(job(tmp_path, stub.dense(2)))
    expected = {bad: f"{bad} shall fail", killed: "its process ended with code -9"}
    assert until_ended(backend, 2) == expected


def says_nothing(job):
    raise KeyError


def says_much(job):
    raise ValueError("x" * 1_000_000 + " the end")


def leaves(job):
    sys.exit(3)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (says_nothing, "KeyError"),
        (says_much, "x" * (MESSAGE - 8) + " the end"),  # a pipe would not hold it, and the process would never end
        (leaves, "its process ended with code 3"),
    ],
)
def test_odd_ends(tmp_path, local, run, expected):
    backend = local(run)
    backend.start(job(tmp_path))
    assert until_ended(backend) == {stub.dense(1).id: expected}


def test_stop_kills_what_runs(tmp_path, local):
    backend = local(stub.run)
    (tmp_path / f"hold-{stub.dense(1).id}").touch()
    backend.start(job(tmp_path))
    ((process, _, _),) = backend._running
    assert process.is_alive()
    backend.stop()
    assert not process.is_alive() and process.exitcode == -9
    assert backend.ended() == [] and backend.free()


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'cut\[ray\]'"):
        Ray(stub.run)


@pytest.fixture
def cluster(monkeypatch):
    """Two CPUs of this machine as a Ray cluster."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets have to have short names
    ray.init(
        address="local",
        num_cpus=2,
        log_to_driver=False,
        include_dashboard=False,
        configure_logging=False,
        object_store_memory=100 * 2**20,
        _temp_dir=folder,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def exits_with_a_value(job):
    raise ValueError(f"process {os.getpid()} has no luck")


@pytest.mark.slow
def test_ray_has_room_for_as_many_jobs_as_its_cpus_allow(cluster):
    assert [Ray(stub.run, cpus).slots() for cpus in (1, 2, 0.5)] == [2, 1, 4]
    assert Ray(stub.run, 3).slots() == 1, "at least one is tried: a cluster may grow"
    with pytest.warns(UserWarning, match="no GPU; cells wait until it has 1"):  # a cluster may grow
        assert Ray(stub.run, 1, gpus=1).slots() == 1
    backend = Ray(stub.run)
    assert cluster.is_initialized() and backend.free()
    backend.stop()
    assert not cluster.is_initialized()


@pytest.mark.slow
def test_ray_starts_a_job_again_whose_worker_was_killed(cluster, tmp_path):
    backend = Ray(stub.run)
    cells = [stub.dense(1), stub.dense(2), stub.cell("cut", 1)]
    killed = cells[1].id
    (tmp_path / f"kill-{killed}").touch()
    for cell in cells:
        backend.start(job(tmp_path, cell))
    assert not backend.free()
    assert until_ended(backend, 3, 120) == {c.id: None for c in cells}
    assert sorted(started(tmp_path)) == sorted([*(c.id for c in cells), killed])
    assert {p.stem for p in (tmp_path / "records").glob("*.json")} == {c.id for c in cells}
    lines = (tmp_path / "finished.txt").read_text().splitlines()
    assert len({line.split()[1] for line in lines}) == 3, "every job has a process of its own"
    backend.stop()


@pytest.mark.slow
def test_ray_gives_up_a_job_whose_workers_are_always_killed(cluster, tmp_path):
    backend = Ray(dies, tries=2)
    backend.start(job(tmp_path))
    (error,) = until_ended(backend, 1, 120).values()
    assert error.startswith("its worker was lost 2 times: ")
    assert len(started(tmp_path)) == 2


def dies(job):
    stub._note(job.runs.parent / "started.txt", job.cell.id)
    os.kill(os.getpid(), 9)


@pytest.mark.slow
def test_ray_reports_an_exception_and_does_not_try_again(cluster, tmp_path):
    backend = Ray(stub.run)
    bad = stub.dense(1).id
    (tmp_path / f"fail-{bad}").touch()
    backend.start(job(tmp_path))
    assert until_ended(backend, 1, 120) == {bad: f"{bad} shall fail"}
    assert started(tmp_path) == [bad]


@pytest.mark.slow
def test_a_sweep_over_ray(cluster, tmp_path, monkeypatch, capsys):
    """Through the command line: a lost worker costs a retry, a failing cell is reported, all others get records."""
    from experiments import sweep

    for name in ("GRIDS", "run_cell", "POLL", "Local"):
        monkeypatch.setattr(sweep, name, getattr(sweep, name))
    bad, killed = stub.cell("snip", 2).id, stub.cell("cut", 1).id
    (tmp_path / f"fail-{bad}").touch()
    (tmp_path / f"kill-{killed}").touch()
    assert stub.main(str(tmp_path), "--backend=ray") == 1
    everything = {c.id for c in stub.grid().cells()}
    assert {p.stem for p in (tmp_path / "records").glob("*.json")} == everything - {bad}
    assert sorted(started(tmp_path)) == sorted([*everything, killed])
    assert f"failed: {bad}: {bad} shall fail" in capsys.readouterr().err
    assert not cluster.is_initialized(), "the sweep leaves the cluster"


def test_workers_of_this_machine_do_not_share_a_process(tmp_path, local):
    backend = local(stub.run)
    for cell in (stub.dense(1), stub.dense(2)):
        backend.start(job(tmp_path, cell))
    until_ended(backend, 2)
    pids = {line.split()[1] for line in (tmp_path / "started.txt").read_text().splitlines()}
    assert len(pids) == 2 and str(os.getpid()) not in pids and not multiprocessing.active_children()
