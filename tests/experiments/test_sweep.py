"""The sweep: every cell once, whatever is killed, locked, missing or broken."""

import collections
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments import sweep
from experiments.backends import Job, Local
from experiments.cell import Cell
from experiments.edge import edge_grid
from tests.experiments import sweep_stub as stub

CELLS = stub.grid().cells()
IDS = [c.id for c in CELLS]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder; the stub's changes of the sweep's module are undone afterwards."""
    for name in ("GRIDS", "run_cell", "POLL", "Local"):
        monkeypatch.setattr(sweep, name, getattr(sweep, name))
    return tmp_path


def noted(base, what="started"):
    """How often every cell was started, or finished."""
    path = base / f"{what}.txt"
    return collections.Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else {}


def pids(base):
    return [int(line.split()[1]) for line in (base / "started.txt").read_text().splitlines()]


def records(base):
    return {p.stem for p in (base / "records").glob("*.json")}


def wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def running(pid):
    return sweep._started(str(pid)) is not None


# Through the command line, with real processes.


def test_every_cell_runs_once_and_dense_ones_first(base, capsys):
    assert stub.main(str(base)) == 0
    assert noted(base) == noted(base, "finished") == dict.fromkeys(IDS, 1)
    assert records(base) == set(IDS)
    started = [line.split()[0] for line in (base / "started.txt").read_text().splitlines()]
    for c in CELLS:
        assert c.start is None or started.index(c.start.id) < started.index(c.id)
    assert len(set(pids(base))) == len(IDS), "every cell has a process of its own"
    assert not [p for p in (base / "records/.running").iterdir() if p.name != ".guard"], "locks are let go"
    out = capsys.readouterr().out
    assert f"0 of {len(IDS)} cells have a record; {len(IDS)} to run" in out
    assert f"{len(IDS) - 1}/{len(IDS)} cells, left 0:00:0" in out or f"{len(IDS)}/{len(IDS)}" in out

    assert stub.main(str(base)) == 0
    assert noted(base) == dict.fromkeys(IDS, 1), "nothing is left to do"
    assert f"{len(IDS)} of {len(IDS)} cells have a record; 0 to run" in capsys.readouterr().out


def test_a_deleted_record_runs_exactly_that_cell_again(base):
    stub.main(str(base))
    gone = stub.cell("magnitude", 2).id
    (base / "records" / f"{gone}.json").unlink()
    assert stub.main(str(base)) == 0
    assert noted(base) == {**dict.fromkeys(IDS, 1), gone: 2}


def test_only_runs_what_is_named_and_the_dense_run_it_needs(base, capsys):
    wanted = stub.cell("snip", 2)
    assert stub.main(str(base), f"--only={wanted.id}") == 0
    assert noted(base) == {wanted.id: 1, wanted.start.id: 1}
    assert "0 of 1 cells have a record; 2 to run" in capsys.readouterr().out


def test_only_may_name_a_config():
    found, groups = sweep.chosen(["edge"], "model/vit_small")
    assert {c.id for c in found.values()} == {c.id for c in edge_grid().cells() if "model/vit_small" in c.configs}
    assert len(found) > 3 and set(groups.values()) == {"edge"}
    assert not sweep.chosen(["edge"], "model/vit")[0]


def test_a_failing_cell_is_reported_and_the_others_run(base, capsys):
    bad = stub.cell("cut", 1).id
    (base / f"fail-{bad}").touch()
    assert stub.main(str(base)) == 1
    assert records(base) == set(IDS) - {bad} and noted(base) == dict.fromkeys(IDS, 1)
    assert f"failed: {bad}: {bad} shall fail" in capsys.readouterr().err
    assert (base / "runs/failed.txt").read_text() == f"{bad}: {bad} shall fail\n"
    (base / f"fail-{bad}").unlink()
    assert stub.main(str(base)) == 0
    assert noted(base) == {**dict.fromkeys(IDS, 1), bad: 2} and not (base / "runs/failed.txt").exists()


def test_what_depends_on_a_failed_dense_run_fails_with_the_reason(base, capsys):
    bad = stub.dense(1).id
    (base / f"fail-{bad}").touch()
    assert stub.main(str(base)) == 1
    orphans = {c.id for c in CELLS if c.start is not None and c.start.id == bad}
    assert len(orphans) == 3 and noted(base) == {i: 1 for i in IDS if i not in orphans}
    err = capsys.readouterr().err
    assert all(f"failed: {i}: its dense run {bad} failed" in err for i in orphans)
    assert records(base) == set(IDS) - orphans - {bad}


def test_a_killed_worker_is_reported_and_the_next_sweep_takes_its_cell(base, capsys):
    victim = stub.cell("cut", 2).id
    (base / f"kill-{victim}").touch()
    assert stub.main(str(base)) == 1
    assert f"failed: {victim}: its process ended with code -9" in capsys.readouterr().err
    assert records(base) == set(IDS) - {victim}
    assert stub.main(str(base)) == 0
    assert noted(base, "finished") == dict.fromkeys(IDS, 1)


def command(base, *more):
    """The sweep as a program of its own."""
    code = "import sys; from tests.experiments.sweep_stub import main; sys.exit(main(*sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(base), *more], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )


def test_a_killed_sweep_goes_on_where_it_was(base):
    """Its workers end with it: what they were at is neither finished behind the next sweep's back nor run beside it."""
    held = [stub.cell("cut", 1).id, stub.cell("cut", 2).id]
    for name in held:
        (base / f"hold-{name}").touch()
    process = command(base)
    wait(lambda: set(held) <= set(noted(base)))
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    wait(lambda: not any(running(p) for p in pids(base)))
    for name in held:
        assert (base / "records/.running" / name).exists(), "nobody was there to let it go"
        (base / f"hold-{name}").unlink()
    time.sleep(0.2)
    before = noted(base, "finished")
    assert not set(held) & set(before) and not set(held) & records(base)
    assert stub.main(str(base)) == 0
    assert noted(base, "finished") == dict.fromkeys(IDS, 1)
    assert noted(base) == {i: 2 if i in held else 1 for i in IDS}
    assert records(base) == set(IDS)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_workers_and_lets_their_cells_go(base, how):
    held = stub.dense(1).id
    (base / f"hold-{held}").touch()
    process = command(base)
    wait(lambda: held in noted(base))
    process.send_signal(how)
    assert process.wait(30) == 130
    wait(lambda: not any(running(p) for p in pids(base)), 5)
    assert not (base / "records/.running" / held).exists()


def test_two_sweeps_at_once_share_the_work(base):
    """The other one has started; what it is at is left to it, and nothing is run twice."""
    held = stub.cell("cut", 1).id
    (base / f"hold-{held}").touch()
    other = command(base)
    wait(lambda: held in noted(base))
    assert stub.main(str(base)) == 0
    assert held not in records(base) and other.poll() is None
    (base / f"hold-{held}").unlink()
    assert other.wait(60) == 0
    assert noted(base) == noted(base, "finished") == dict.fromkeys(IDS, 1)


# Locks.


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def locked(base, cell, content):
    path = base / "records/.running" / cell.id
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("with_start", [True, False])
def test_a_cell_with_a_living_lock_is_left_alone(base, capsys, sleeper, with_start):
    cell = stub.cell("cut", 1)
    start = f" {sweep._started(str(sleeper.pid))}" if with_start else ""
    path = locked(base, cell, f"{sleeper.pid}{start}")
    assert stub.main(str(base)) == 0
    assert noted(base) == {i: 1 for i in IDS if i != cell.id}
    assert "1 cells are being run by another sweep" in capsys.readouterr().err
    assert path.read_text() == f"{sleeper.pid}{start}", "the lock is still the other's"


def test_what_depends_on_a_dense_run_of_another_sweep_says_so(base, capsys, sleeper):
    start = stub.dense(1)
    locked(base, start, str(sleeper.pid))
    assert stub.main(str(base)) == 1
    assert f"its dense run {start.id} is being run by another sweep" in capsys.readouterr().err
    assert set(noted(base)) == {c.id for c in CELLS if c.seed == 2}


def dead():
    process = subprocess.Popen(["true"])
    process.wait()
    return str(process.pid)


@pytest.mark.parametrize("content", [dead, lambda: f"{dead()} 5", lambda: "", lambda: "nonsense", lambda: "1 5"])
def test_a_stale_lock_is_taken(base, content):
    """Of a dead process, half written, or of a process whose number another one has now."""
    cell = stub.cell("cut", 1)
    path = locked(base, cell, content())
    assert sweep.lock(cell, base / "records")
    assert path.read_text() == f"{os.getpid()} {sweep._started(str(os.getpid()))}"
    sweep.unlock(cell, base / "records")
    assert not path.exists()


def test_the_lock_of_a_process_that_nobody_has_buried_is_taken(base):
    zombie = subprocess.Popen(["sleep", "600"])
    locked(base, stub.dense(1), str(zombie.pid))
    assert not sweep.lock(stub.dense(1), base / "records")
    zombie.kill()
    wait(lambda: not running(zombie.pid))
    assert Path(f"/proc/{zombie.pid}").exists()
    assert sweep.lock(stub.dense(1), base / "records")
    zombie.wait()


def test_one_of_many_gets_a_stale_lock(base):
    cell = stub.cell("cut", 1)
    locked(base, cell, dead())
    fork = multiprocessing.get_context("fork")
    everybody, got = fork.Barrier(9), fork.SimpleQueue()

    def take():
        everybody.wait()
        got.put(sweep.lock(cell, base / "records"))
        everybody.wait()  # nobody ends before all have looked

    many = [fork.Process(target=take) for _ in range(8)]
    for p in many:
        p.start()
    everybody.wait(60)
    found = sorted(got.get() for _ in many)
    everybody.wait(60)
    for p in many:
        p.join()
    assert found == [False] * 7 + [True]


# The command line's other answers.


def test_an_unknown_grid_is_refused(base, capsys):
    assert sweep.main(["rooms", "nothing", f"--records={base}/records", f"--runs={base}/runs"]) == 2
    err = capsys.readouterr().err
    assert "no grid 'nothing'" in err and all(name in err for name in sweep.GRIDS)
    assert not list(base.iterdir())


def test_dense_runs_that_would_quietly_begin_with_random_weights_are_refused(base, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep.weights, "find", lambda backbone, source: None)
    auto = Cell(("model/mobilenetv2", "data/rooms", "pruning/dense"))
    plain = Cell(("model/mobilenetv2", "data/rooms", "pruning/dense"), {"model.init_args.network.weights": None})
    with pytest.raises(ValueError, match=r"mobilenetv2_100.*make weights.*--random-weights"):
        sweep.check_weights([plain, auto])
    sweep.check_weights([plain])
    monkeypatch.setattr(sweep.weights, "find", lambda backbone, source: tmp_path)
    sweep.check_weights([auto])


@pytest.mark.parametrize("option", ["--workers=0", "--threads=0"])
def test_bad_numbers_are_refused(base, option, capsys):
    assert stub.main(str(base), option) == 2
    assert "at least 1" in capsys.readouterr().err


def test_an_unknown_config_is_refused(base, monkeypatch, capsys):
    bad = stub.Grid("toy", "Toy", (stub.Row("cut", ((Cell(("pruning/nothing",)),),)),))
    monkeypatch.setattr(stub, "grid", lambda: bad)
    assert stub.main(str(base)) == 2
    assert "no config 'pruning/nothing'" in capsys.readouterr().err


def test_list_prints_what_would_run_and_runs_nothing(base, capsys):
    assert stub.main(str(base), "--list") == 0
    listed = capsys.readouterr().out.split()
    assert sorted(listed) == sorted(IDS) and not (base / "started.txt").exists()
    assert all(name.startswith("dense-") for name in listed[:2])
    assert not list(base.iterdir())
    for c in CELLS[:3]:
        stub.run(Job(c, base / "records", base / "runs"))
    stub.main(str(base), "--list")
    assert sorted(capsys.readouterr().out.split()) == sorted(IDS[3:])
    stub.main(str(base), "--list", "--only=nothing")
    assert capsys.readouterr().out == ""


# The order of things, with a backend whose jobs end when told.


class Fake:
    """A backend with slots; :meth:`end` ends a job."""

    def __init__(self, slots=2):
        self.number, self.jobs, self.over = slots, {}, []

    def slots(self):
        return self.number

    def free(self):
        return len(self.jobs) < self.number

    def start(self, job):
        self.jobs[job.cell.id] = job

    def end(self, cell, error=None, weights=True):
        job = self.jobs.pop(cell.id)
        if weights and cell.start is None and error is None:
            folder = job.runs / cell.id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "last.ckpt").touch()
        if error is None:
            job.records.mkdir(parents=True, exist_ok=True)
            (job.records / f"{cell.id}.json").write_text("{}")
        self.over.append((job, error))

    def ended(self):
        found, self.over = self.over, []
        return found

    def stop(self):
        self.jobs.clear()


def work_of(base, slots=2, cells=CELLS):
    return sweep.Sweep(cells, base / "records", base / "runs", Fake(slots), threads=3, keep=True)


def test_dense_runs_start_first_and_what_needs_them_waits(base):
    work = work_of(base, slots=3)
    assert work.step() and set(work.backend.jobs) == {stub.dense(1).id, stub.dense(2).id}
    work.backend.end(stub.dense(2))
    work.step()
    work.step()
    names = set(work.backend.jobs)
    assert stub.dense(1).id in names and len(names) == 3
    assert all(work.backend.jobs[n].cell.start == stub.dense(2) for n in names - {stub.dense(1).id})
    job = work.backend.jobs[stub.dense(1).id]
    assert (job.threads, job.keep, job.records, job.runs) == (3, True, base / "records", base / "runs")


def test_weights_that_are_gone_are_made_again_but_only_where_needed(base):
    for c in CELLS:
        stub.run(Job(c, base / "records", base / "runs"))
    (base / "runs" / stub.dense(1).id / "last.ckpt").unlink()
    (base / "runs" / stub.dense(2).id / "last.ckpt").unlink()
    assert sweep.missing(CELLS, base / "records", base / "runs") == []
    gone = stub.cell("cut", 1)
    (base / "records" / f"{gone.id}.json").unlink()
    assert sweep.missing(CELLS, base / "records", base / "runs") == [stub.dense(1), gone]


def leave(base, *cells):
    """What finished runs of these cells leave, as far as it tells that they are finished."""
    for c in cells:
        (base / "runs" / c.id / "compact").mkdir(parents=True, exist_ok=True)
        (base / "runs" / c.id / "last.ckpt").touch()


def test_a_recorded_cell_without_a_model_is_missing_only_where_models_are_wanted(base):
    """On a fresh clone every record is there and no model is."""
    for c in CELLS:
        stub.run(Job(c, base / "records", base / "runs"))
        (base / "runs" / c.id / "last.ckpt").unlink(missing_ok=True)
    places = base / "records", base / "runs"
    assert sweep.missing(CELLS, *places) == []
    assert {c.id for c in sweep.missing(CELLS, *places, models=True)} == set(IDS)
    dense = [c for c in CELLS if c.start is None]
    assert sweep.missing(dense, *places, models=True) == dense, "dense ones too, asked for by themselves"
    gone, half = stub.cell("cut", 1), stub.cell("snip", 2)
    leave(base, *(c for c in CELLS if c not in (gone, half)))
    (base / "runs" / half.id / "compact").mkdir(parents=True)  # of a run that was killed before its end
    assert sweep.missing(CELLS, *places, models=True) == [gone, half]


def test_models_that_are_gone_are_made_again_beside_their_records(base):
    for c in CELLS:
        stub.run(Job(c, base / "records", base / "runs"))
        (base / "records" / f"{c.id}.json").write_text("the record")
    leave(base, *(c for c in CELLS if c.seed == 1))
    work = sweep.Sweep(CELLS, base / "records", base / "runs", Fake(), models=True)
    ran = []
    while work.step():
        for job in list(work.backend.jobs.values()):
            ran.append(job.cell)
            assert job.models
            del work.backend.jobs[job.cell.id]
            leave(base, job.cell)
            work.backend.over.append((job, None))
    assert not work.failed and len(ran) == 4 and {c.seed for c in ran} == {2} and ran[0] == stub.dense(2)
    assert {p.read_text() for p in (base / "records").glob("*.json")} == {"the record"}
    assert sweep.Sweep(CELLS, base / "records", base / "runs", Fake(), models=True).waiting == []


def test_the_command_runs_recorded_cells_again_only_if_their_models_are_asked_for(base, capsys):
    for c in CELLS:
        stub.run(Job(c, base / "records", base / "runs"))
    for option in ("--list", "--keep"):
        assert stub.main(str(base), "--list", option) == 0 and capsys.readouterr().out == ""
    assert stub.main(str(base), "--list", "--models", "--only=dense-") == 0
    assert capsys.readouterr().out.split() == [c.id for c in CELLS if c.start is None]


def test_a_dense_run_that_leaves_no_weights_does_not_stop_the_sweep_for_ever(base):
    work = work_of(base)
    work.step()
    work.backend.end(stub.dense(1), weights=False)
    work.backend.end(stub.dense(2))
    while work.step():
        for job in list(work.backend.jobs.values()):
            work.backend.end(job.cell)
    reasons = {work.failed.get(c.id) for c in CELLS if c.start == stub.dense(1)}
    assert reasons == {f"its dense run {stub.dense(1).id} left no last.ckpt"}
    assert records(base) == {c.id for c in CELLS if c.seed == 2 or c.start is None}


def test_what_another_sweep_has_finished_meanwhile_is_dropped(base):
    work = work_of(base, slots=1)
    work.step()
    for c in CELLS:
        if c != stub.dense(1):
            stub.run(Job(c, base / "records", base / "runs"))
    work.backend.end(stub.dense(1))
    work.step()
    assert not work.step() and not work.failed and not work.skipped and not work.backend.jobs


def test_stop_lets_running_cells_go(base):
    work = work_of(base)
    work.step()
    locks = [base / "records/.running" / stub.dense(s).id for s in stub.SEEDS]
    assert all(p.exists() for p in locks)
    work.stop()
    assert not any(p.exists() for p in locks) and not work.backend.jobs


def test_time_left_is_the_mean_so_far_times_what_is_left(base, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: clock[0])
    work = work_of(base, slots=2)
    work.step()
    assert work.left(2) is None, "nothing is known before the first cell has ended"
    clock[0] += 10
    work.backend.end(stub.dense(1))
    work.step()
    work.step()  # starts one of the six others
    assert len(work.backend.jobs) == 2 and len(work.waiting) == 5
    # Mean 10 s: the second dense run is over any time now, one has just started, five wait; two at a time.
    assert work.left(2) == pytest.approx((0 + 10 + 5 * 10) / 2)
    clock[0] += 4
    assert work.left(2) == pytest.approx((0 + 6 + 5 * 10) / 2)
    assert work.left(0) == pytest.approx(56)
    clock[0] += 6
    work.backend.end(stub.dense(2))  # took 20 s
    work.step()
    assert work.seconds == [10, 20]
    assert work.left(1) == pytest.approx((15 - 10) + 5 * 15)


def test_time_left_is_shown(base):
    assert [sweep._time(s) for s in (None, 0, 59.9, 61, 3600 * 27 + 62)] == [
        "?",
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "27:01:02",
    ]
    sweep.POLL = 0.01
    work, out = work_of(base), io.StringIO()
    step = work.step

    def stepping():
        for job in list(work.backend.jobs.values()):
            work.backend.end(job.cell)
        return step()

    work.step = stepping
    sweep.sweep(work, 2, Console(file=out, width=100))
    lines = [line for line in out.getvalue().splitlines() if "/8 cells, left" in line]
    assert lines[0].startswith("0/8 cells, left ?") and len(lines) > 2
    assert all("left 0:00:0" in line for line in lines[1:])


# What a worker does.


@pytest.fixture
def pretended(monkeypatch):
    """A run that notes its command line, prints, and returns or raises what it is told."""
    seen = {"code": 0, "lines": []}

    def main(argv):
        seen["lines"].append(argv)
        print("one\ntwo\nthree\nfour")
        print("five", file=sys.stderr)
        if isinstance(seen["code"], Exception):
            raise seen["code"]
        return seen["code"]

    monkeypatch.setattr("experiments.run.main", main)
    return seen


def test_a_worker_calls_the_run_with_the_cells_line_and_keeps_its_words(base, pretended, capfd):
    c = stub.cell("cut", 1)
    sweep.run_cell(Job(c, base / "records", base / "runs", keep=True))
    (line,) = pretended["lines"]
    assert line == [
        *c.argv(base / "records", base / "runs"),
        "--trainer.enable_progress_bar=false",
        "--export=false",
    ]
    assert (base / "runs" / c.id / "log.txt").read_text().split() == ["one", "two", "three", "four", "five"]
    assert capfd.readouterr() == ("", "")


def test_dense_folders_stay_and_those_of_pruned_runs_go(base, pretended):
    for c in (stub.dense(1), stub.cell("cut", 1)):
        sweep.run_cell(Job(c, base / "records", base / "runs"))
    assert [p.name for p in (base / "runs").iterdir()] == [stub.dense(1).id]
    assert pretended["lines"][0][-1] == "--snapshots=[0,5]", "what rewinding methods go back to"


def test_a_failed_run_ends_with_the_last_lines_of_its_log(base, pretended):
    c = stub.cell("cut", 1)
    for code, message in [(2, r"failed \(2\): .*three \| four \| five"), (ValueError("odd"), r"failed \(1\).*odd")]:
        pretended["code"] = code
        with pytest.raises(RuntimeError, match=f"{c.id} {message}".replace("+", r"\+")):
            sweep.run_cell(Job(c, base / "records", base / "runs"))
        assert (base / "runs" / c.id / "log.txt").exists(), "the log stays"
    assert "Traceback" in (base / "runs" / c.id / "log.txt").read_text()


def test_a_dense_run_whose_weights_are_gone_runs_again_beside_its_record(base, pretended):
    """A run with a record would not run at all; the record that others are compared with stays as it is."""
    c = stub.dense(1)
    path = sweep.record_of(c, base / "records")
    path.parent.mkdir()
    path.write_text("the record")
    again = base / "runs" / c.id / "again"
    again.mkdir(parents=True)
    (again / path.name).write_text("of a run that was killed")
    sweep.run_cell(Job(c, base / "records", base / "runs"))
    (line,) = pretended["lines"]
    assert f"--records={again}" in line and not (again / path.name).exists()
    assert path.read_text() == "the record"
    (base / "runs" / c.id / "last.ckpt").touch()
    sweep.run_cell(Job(c, base / "records", base / "runs"))
    assert len(pretended["lines"]) == 1, "another sweep was faster"


def test_a_run_whose_model_is_wanted_and_gone_runs_again_beside_its_record_and_is_kept(base, pretended):
    c = stub.cell("cut", 1)
    path = sweep.record_of(c, base / "records")
    path.parent.mkdir()
    path.write_text("the record")
    sweep.run_cell(Job(c, base / "records", base / "runs", keep=True))
    assert not pretended["lines"], "it has a record"
    sweep.run_cell(Job(c, base / "records", base / "runs", models=True))
    (line,) = pretended["lines"]
    assert f"--records={base / 'runs' / c.id / 'again'}" in line
    assert path.read_text() == "the record" and (base / "runs" / c.id).is_dir()
    leave(base, c)
    sweep.run_cell(Job(c, base / "records", base / "runs", models=True))
    assert len(pretended["lines"]) == 1, "its model is there"


# With real trainings.

TINY = {"backbone": "test_efficientnet", "weights": None, "output_stride": None, "head": "light", "head_width": 8}
CONFIGS = ("trainer/default", "data/synthetic", "model/mobilenetv2", "logger/none")
SMALL = {"model.init_args.network": TINY, "data.init_args.num": 16, "trainer.accelerator": "cpu"}
EPOCHS = 40


def real(method=None, epochs=2):
    dense = Cell((*CONFIGS, "pruning/dense"), {**SMALL, "trainer.max_epochs": 2})
    if method is None:
        return dense
    settings = {**SMALL, "trainer.max_epochs": epochs, "pruning.tasks": ["seg", "depth"], "pruning.batches": 2}
    return Cell((*CONFIGS, f"pruning/{method}"), settings, dense)


@pytest.mark.slow
def test_real_runs_end_to_end_and_a_killed_worker_is_resumed(base):
    import torch

    cells = [real(), real("magnitude"), real("cut", EPOCHS)]
    victim = cells[2]
    folder = base / "runs" / victim.id
    checkpoint = folder / f"{victim.id}.ckpt"

    work = sweep.Sweep(cells, base / "records", base / "runs", Local(sweep.run_cell, 2))
    killed = False
    while work.step():
        if checkpoint.exists() and not killed:
            (process,) = [p for p, _, job in work.backend._running if job.cell == victim]
            os.kill(process.pid, signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    assert killed and work.failed == {victim.id: "its process ended with code -9"}
    assert records(base) == {c.id for c in cells[:2]}
    assert (base / "runs" / cells[0].id / "last.ckpt").exists() and not (base / "runs" / cells[1].id).exists()

    # A mark in the checkpoint's history, which only a run that resumes can bring to the record.
    state = torch.load(checkpoint, weights_only=True)
    (key,) = [k for k in state["callbacks"] if k.startswith("History")]
    done = len(state["callbacks"][key]["epochs"])
    assert 0 < done < EPOCHS
    state["callbacks"][key]["epochs"][0]["mark"] = 1.0
    torch.save(state, checkpoint)

    work = sweep.Sweep(cells, base / "records", base / "runs", Local(sweep.run_cell, 2))
    assert [c.id for c in work.waiting] == [victim.id]
    while work.step():
        time.sleep(0.02)
    assert not work.failed and records(base) == {c.id for c in cells}
    found = {c.id: json.loads((base / "records" / f"{c.id}.json").read_text()) for c in cells}
    history = found[victim.id]["history"]
    assert [e["epoch"] for e in history] == list(range(EPOCHS)) and history[0]["mark"] == 1.0
    for c in cells[1:]:
        assert found[c.id]["start"] == cells[0].id and found[c.id]["tasks"] == ["seg", "depth"]
        assert found[c.id]["sparsity"]["kept"] == pytest.approx(0.9, abs=1e-3)
    assert not folder.exists()
    assert not [p for p in (base / "records/.running").iterdir() if p.name != ".guard"]

    # The weights are lost, one more cell is wanted: the dense run runs again, its record stays.
    path = base / "records" / f"{cells[0].id}.json"
    before = path.read_bytes()
    (base / "runs" / cells[0].id / "last.ckpt").unlink()
    more = real("random")
    work = sweep.Sweep([*cells, more], base / "records", base / "runs", Local(sweep.run_cell, 2))
    assert [c.id for c in work.waiting] == [cells[0].id, more.id]
    while work.step():
        time.sleep(0.02)
    assert not work.failed and path.read_bytes() == before
    assert json.loads((base / "records" / f"{more.id}.json").read_text())["start"] == cells[0].id
