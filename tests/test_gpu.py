"""tests/gpu.py, without a GPU: its commands exist, its jobs end as they should, and a rehearsal of the whole."""

import contextlib
import shlex
import tarfile
import time

import gpu
import psutil
import pytest
from conftest import ROOT, copy_tree, load

WAIT = "import time; print('started', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + WAIT
CHILD = "import subprocess as s; print(s.Popen(['sleep', '60'], start_new_session=True).pid, flush=True); " + WAIT


def done(program, out, seconds=60, minutes=0.0):
    job = gpu.Job("commands", "a job", ["-c", program], minutes)
    return gpu.execute(job, out, time.monotonic() + seconds)


def test_a_job_that_ends(tmp_path):
    job = done('print(\'row: {"precision": "bf16", "status": "refused"}\')', tmp_path)
    assert (job.status, job.problem(tmp_path)) == (0, "")
    assert job.rows(tmp_path) == [{"precision": "bf16", "status": "refused"}]
    assert job.log(tmp_path).read_text().startswith("python -c 'print(")


def test_jobs_that_fail(tmp_path):
    assert done("raise SystemExit(3)", tmp_path).problem(tmp_path) == "exit status 3"
    failed = 'print(\'row: {"precision": "bf16", "status": "failed: out of memory"}\')'
    assert done(failed, tmp_path).problem(tmp_path) == "bf16: failed: out of memory"


def test_a_job_that_would_not_end_in_time_is_not_started(tmp_path):
    job = done("", tmp_path, seconds=50, minutes=1)
    assert job.problem(tmp_path) == "not started: too little time"
    assert not job.log(tmp_path).exists()


@pytest.mark.parametrize("program", [WAIT, STUBBORN, CHILD])
def test_a_job_that_does_not_end_is_stopped_and_its_log_is_kept(program, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    begin = time.monotonic()
    job = done(program, tmp_path, seconds=1.5)
    assert job.problem(tmp_path) == "stopped: no time left"
    text = job.log(tmp_path).read_text()
    assert "started" in text
    if program == CHILD:
        with contextlib.suppress(psutil.NoSuchProcess):
            child = psutil.Process(int(text.splitlines()[1]))
            while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() - begin < 30:
                time.sleep(0.1)
    assert time.monotonic() - begin < 30


def test_the_archive_has_logs_and_no_data(tmp_path):
    for name in ("report.md", "runs/a.log", "commands/b.txt", "data/c.txt", "runs/d.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    gpu.pack(tmp_path, tmp_path / "back" / "a.tar.gz")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["a.tar.gz"]
    with tarfile.open(tmp_path / "back" / "a.tar.gz") as archive:
        assert archive.getnames() == ["commands/b.txt", "report.md", "runs/a.log"]


def test_data_in_an_archive(image_folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        archive.add(image_folder, "images")
    out = tmp_path / "out"
    out.mkdir()
    args = gpu.parse_args(["--data", str(tmp_path / "images.tar.xz"), "--out", str(out)])
    gpu.unpack(args)
    assert str(args.tree) == "data/images/images"
    assert (out / args.tree / "train.decoded.pt").exists()
    copy = copy_tree(image_folder, tmp_path / "copy")
    args = gpu.parse_args(["--data", str(copy), "--out", str(out)])
    gpu.unpack(args)
    assert str(args.tree) == "data/copy"
    assert (copy / "train.decoded.pt").exists()


@pytest.mark.parametrize(("folder", "reason"), [(False, "ReadError("), (True, "cifar.py: error: no images")])
def test_without_data_no_run_is_started(folder, reason, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("import sys; print('no GPU'); sys.exit('cifar.py: error: no images')")
    monkeypatch.setattr(gpu, "ME", str(tmp_path / "worker.py"))
    out, archive, data = tmp_path / "out", tmp_path / "a.tar.gz", tmp_path if folder else tmp_path / "worker.py"
    flags = ["--rehearse", "--stage", "runs", "--out", str(out), "--archive", str(archive), "--data", str(data)]
    assert gpu.main(flags) == 1
    assert f"- runs: no data: {reason}" in (out / "report.md").read_text()
    assert not (out / "runs").exists()
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["report.md"]


def test_the_newest_of_a_runs_logs_is_reported(tmp_path):
    for day in (2, 3, 1):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"2026110{day}-000000_a-b-c.log").write_text(f"day {day}\n")
    assert gpu.report("runs", [gpu.Job("runs", "a/b.py --name c", [], status=0)], tmp_path)[-1].count("ok: day 3") == 1


def test_runs_with_a_committed_log_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "a" / "logs").mkdir(parents=True)
    (tmp_path / "a" / "logs" / "20261124-001334_a-cifar_dgl-gpu-k2.log").touch()
    assert gpu.committed("a/cifar_dgl.py --name gpu-k2 --epochs 3")
    assert not gpu.committed("a/cifar_dgl.py --name gpu-k4")
    assert not gpu.committed("a/cifar_ddg.py --name gpu-k2")


def test_every_command_is_one_that_its_script_takes(capsys):
    runs = [command for *_, command in gpu.RUNS]
    pairs = [(shlex.split(command)[0], command.split("--name ")[1]) for command in runs]
    assert len({*pairs}) == len(pairs)
    asynchronous = gpu.SIX_PROCESSES.split("--nproc_per_node=6 ")[1]
    for command in [*gpu.CIFAR_COMMANDS, *(f"{c} --dummy" for c in gpu.IMAGENET_COMMANDS), asynchronous, *runs]:
        script, *flags = shlex.split(command)
        module = load(*script.removesuffix(".py").split("/"))
        module.parse_args(flags)
    for command in gpu.TABLES:
        assert command.startswith(gpu.ME) or (ROOT / command.split()[0]).exists()


def test_list(capsys):
    gpu.main(["--list", "--jobs", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(",")[0] for line in lines} == {*gpu.SHARES}
    assert sum(line.startswith("runs, 3 at a time, ") for line in lines) == sum(
        not gpu.committed(command) for *_, command in gpu.RUNS
    )


def test_mistakes(capsys):
    for flags, said in ((["--stage", "runs"], "--data CIFAR10"), (["--data", "nowhere"], "nowhere: no such file")):
        with pytest.raises(SystemExit):
            gpu.main(flags)
        assert said in capsys.readouterr().err


def test_what_is_tried_on_a_lent_machine_comes_first(tmp_path):
    args = gpu.parse_args(["--stage", "runs", "--jobs", "2", "--data", str(tmp_path)])
    ((size, jobs),) = gpu.runs(args)
    assert size == 2
    assert jobs[0].minutes < 4
    expected = [job.minutes for _, jobs in gpu.tables(args) for job in jobs]
    assert max(expected[:2]) < 0.5 and sum(expected[:3]) < 3
    (_, tests), (_, commands), *_ = [*gpu.tests(args), *gpu.commands(args)]
    assert "test_cuda_graph" in tests[0].name
    assert commands[0].name == gpu.SIX_PROCESSES


@pytest.mark.slow
def test_every_row_of_the_benchmark(monkeypatch, capsys):
    benchmark = load("tests", "benchmark")
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "PASSES", 1)
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 0)
    monkeypatch.setattr(benchmark, "matrix_product_rates", lambda *_: [1e9, 1e9])
    assert not benchmark.main(["--batches", "2", "--no-cuda", "--threads", "1"])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    measured = {line.split(" | ")[0] for line in out.splitlines() if line.count(" % |") == 2}
    assert len(measured) == 43


@pytest.mark.slow
def test_rehearsal(tmp_path, capsys):
    gpu.main(["--rehearse", "--minutes", "60", "--out", str(tmp_path), "--jobs", "2"])
    report = (tmp_path / "report.md").read_text()
    *_, problems = report.split("## Failed, or not run\n")
    assert not problems.strip(), problems
    for stage in gpu.SHARES:
        assert f"## {stage}" in report
    assert "| DGL, K = 2, --balance memory | 128 | 16.0 |" in report
    assert list((tmp_path / "runs").glob("*_learning_curves-cifar_dgl-gpu-bf16.log"))
    assert str(ROOT) not in next((tmp_path / "runs").glob("*_learning_curves-cifar_dgl-gpu-bf16.log")).read_text()
