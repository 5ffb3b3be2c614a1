"""Jobs on two machines: network namespaces with a cable between them (Linux; only root may make them)."""

import argparse
import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, assert_same, checkpoint_of, load, log_of, run
from forked_ranks import fork_ranks

load("imagenet_dgl", "imagenet_dgl")
ranks = sys.modules["ranks"]
meeting = ranks.machines  # machines is a fixture here

IMAGENET = "imagenet_dgl/imagenet_dgl.py"
SMALL = ["-j", 0, "-b", 6, "--image-size", 32, "--lr", 0.01, "--threads", 1, "--arch", "squeezenet1_1", "-p", 0]
ASYNC = "buffer_experiments/cifar_async.py"
DIGITS = ["--data", "digits", "--batch_size", 10, "--ncnn", 2, "--feature_size", 4, "--down", "[0]", "--mlp", 1]
DIGITS += ["--buffer", 5, "--seed", 0, "--pace", 0.05]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"


def ip(*command):
    return subprocess.run(["ip", *command], check=True, capture_output=True, text=True).stdout


class Machine:
    """A network namespace with an end of the cable. As on a stock Debian, its own name is a loopback address."""

    def __init__(self, number, other):
        self.number, self.name, self.jobs = number, f"dgl-{os.getpid()}-{number}", []
        self.files = Path("/etc/netns", self.name)
        self.files.mkdir(parents=True)
        (self.files / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 m{number}\n10.77.0.{other} m{other}\n")
        ip("netns", "add", self.name)

    def plug(self):
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "set", "cable", "up")
        ip("-n", self.name, "address", "add", f"10.77.0.{self.number}/24", "dev", "cable")
        ip("-n", self.name, "address", "add", f"fd00:77::{self.number}/64", "dev", "cable", "nodad")

    def cable(self, state):
        ip("-n", self.name, "link", "set", "cable", state)

    def enter(self):
        """Put this process onto the machine."""
        with open(f"/run/netns/{self.name}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0

    def start(self, script, *flags, cwd, master=FIRST, restarts=0):
        """Type the README's command; what it prints goes to files in the folder cwd."""
        cwd.mkdir(exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={self.number - 1}"]
        launcher += [f"--master-addr={master}", "--nproc-per-node=1", f"--max-restarts={restarts}"]
        command = ["ip", "netns", "exec", self.name, *launcher, ROOT / script, *flags]
        self.out, self.err = (cwd / f"{self.number}-{len(self.jobs)}.{kind}" for kind in ("out", "err"))
        with self.out.open("w") as out, self.err.open("w") as err:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.jobs.append(subprocess.Popen([*map(str, command)], cwd=cwd, stdout=out, stderr=err, env=environment))

    def processes(self):
        return [*map(int, ip("netns", "pids", self.name).split())]

    def kill(self):
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for job in self.jobs:
            job.wait()

    def wait(self, seconds):
        """The last job's exit status; no process of it may be left."""
        status = self.jobs[-1].wait(seconds)
        assert not self.processes()
        return status

    def said(self):
        return self.out.read_text() + self.err.read_text()

    def remove(self):
        self.kill()
        ip("netns", "delete", self.name)
        shutil.rmtree(self.files)


@pytest.fixture
def machines():
    if shutil.which("ip") is None or os.geteuid() or subprocess.run(["ip", "netns", "list"]).returncode:
        pytest.skip("may not make network namespaces")
    with contextlib.ExitStack() as stack:
        pair = []
        for number, other in ((1, 2), (2, 1)):
            try:
                pair.append(Machine(number, other))
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"may not make network namespaces: {error}")
            stack.callback(pair[-1].remove)
        first, second = (machine.name for machine in pair)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for machine in pair:
            machine.plug()
        yield pair


def until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trained(folder, tree, *flags):
    """What one process writes on the screen and into a checkpoint."""
    folder.mkdir()
    status, _, err = run(IMAGENET, tree, *SMALL, *flags, cwd=folder)
    assert status == 0, err
    return result(folder)


def result(folder):
    """What a run has computed, whatever the number of its ranks: log lines and state."""
    state = checkpoint_of(folder)
    lines = [line for line in log_of(folder)[1:] if line.startswith("n: ")]
    return {"lines": lines, **{key: state[key] for key in ("epoch", "parts", "generator")}}


@pytest.mark.parametrize(("chosen", "expected"), [(None, "way0"), ("", "way0"), ("mine", "mine")])
def test_gloo_uses_the_interface_that_leads_to_the_others(chosen, expected, monkeypatch):
    """Here, MASTER_ADDR is a name, which its machine resolves to 127.0.1.1."""
    machines, own = ranks.machines, {"m1": "127.0.1.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setenv("MASTER_ADDR", "m1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen or "")
    if chosen is None:
        del os.environ["GLOO_SOCKET_IFNAME"]
    monkeypatch.setattr(machines, "address_towards", own.get)
    found = {"lo": "127.0.1.1", "way0": "10.0.0.1", "other0": "10.1.0.1"}
    found = {name: [argparse.Namespace(address=address)] for name, address in found.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    store = torch.distributed.HashStore()
    store.set("address 1", "10.0.0.2")
    assert machines.choose_interface(store, 0, 2) == ["m1", "10.0.0.2"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == expected
    assert machines.choose_interface(torch.distributed.HashStore(), 0, 1) == ["m1"]


LOST = "Rank 0 has lost the connection to another rank: gloo failed; --resume goes on from the last checkpoint"


def test_ranks_that_are_restarted_while_others_are_waited_for():
    """Rank 2 has asked and died: nobody begins before a new one asks."""
    store, prefixes = torch.distributed.HashStore(), {}
    store.set("question 2", "of the dead process")

    def meet(rank):
        prefixes[rank] = meeting.meet(store, rank, 4)

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in (0, 1, 3, 2)]
    for thread in threads[:3]:
        thread.start()
    time.sleep(1.5)
    assert not prefixes
    threads[3].start()
    for thread in threads:
        thread.join(20)
    prefixes[0].set("key", "value")
    assert [prefixes[rank].get("key") for rank in (1, 2, 3)] == 3 * [b"value"]


@pytest.mark.parametrize(
    ("addresses", "message"), [(["m1", "m1"], LOST), (["m1", "10.0.0.2"], 2)], ids=["one machine", "several"]
)
def test_the_interface_is_blamed_only_on_several_machines(addresses, message, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("gloo failed")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(meeting, "place", lambda: (0, 2))
    monkeypatch.setattr(meeting, "connect", lambda _: None)
    monkeypatch.setattr(meeting, "meet", lambda *_: torch.distributed.HashStore())
    monkeypatch.setattr(meeting, "choose_interface", lambda *_: addresses)
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(SystemExit) as stop:
        meeting.join()
    meeting.OVER.set()
    assert stop.value.code == message


class Store:
    """Of torchrun, with what happens when `watch` uses it."""

    def __init__(self, happen):
        self.happen = happen

    def clone(self):
        return self

    def add(self, *_):
        self.happen()
        return 0


def test_a_store_that_has_gone_is_not_the_other_machine_s_fault(monkeypatch, capsys):
    def happen():
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(meeting, "SILENCE", 1)
    monkeypatch.setattr(os, "_exit", lambda _: meeting.OVER.set())
    monkeypatch.setenv("MASTER_ADDR", "m1")
    meeting.watch(Store(happen), 0, ["m1", "10.0.0.2"])
    for thread in meeting.THREADS:
        thread.join(20)
    assert capsys.readouterr().err.startswith("The store of m1's torchrun cannot be reached: that has ended, or the ")


def test_at_the_end_no_thread_uses_the_store(monkeypatch):
    begun = threading.Event()

    def happen():
        begun.set()
        time.sleep(0.5)

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    meeting.watch(Store(happen), 0, ["m1", "10.0.0.2"])
    assert begun.wait(20)
    meeting.leave()
    assert not any(thread.is_alive() for thread in meeting.THREADS)


# Ranks in copies of this process


@pytest.mark.slow
def test_two_machines_compute_what_one_process_does(machines, tree, tmp_path):
    flags = "--nepochs", 1, "--num-modules", 2
    (tmp_path / "parallel").mkdir()

    def work(rank):
        os.environ["MASTER_ADDR"] = FIRST
        machines[rank].enter()
        status, _, err = run(IMAGENET, tree, *SMALL, *flags, "--module-parallel", cwd=tmp_path / "parallel")
        print(err)
        assert os.environ["GLOO_SOCKET_IFNAME"] == "cable"
        return status

    assert fork_ranks(2, work, ranks) == [0, 0]
    assert_same(result(tmp_path / "parallel"), trained(tmp_path / "one", tree, *flags))


def set_up(rank, machine):
    """What imagenet_dgl.py does first; and all ranks have talked."""
    os.environ["MASTER_ADDR"] = FIRST
    machine.enter()
    ranks.setup(load("imagenet_dgl", "imagenet_dgl").parse_args(["x", "--no-cuda"]))
    ranks.all_reduce(torch.zeros(1))


def test_the_user_s_interface_is_kept(machines, monkeypatch, capfd):
    """Here it is one that cannot work, which each rank says."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "missing0")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert fork_ranks(2, lambda rank: set_up(rank, machines[rank]), ranks) == [2, 2]
    said = re.compile("error: Gloo cannot connect the ranks .*?missing0.*?: set GLOO_SOCKET_IFNAME on every machine")
    assert len(said.findall(capfd.readouterr().err)) == 2  # on two lines, or when both write at once, on one


@pytest.mark.parametrize("busy", [False, True])
def test_a_machine_that_is_silent_ends_the_others(busy, machines, monkeypatch, capfd):
    """Two of four ranks are on each machine, of which one speaks. A machine that only computes is not silent."""
    monkeypatch.setattr(ranks.machines, "SILENCE", 3)

    def work(rank):
        set_up(rank, machines[rank // 2])
        if not busy and rank == 0:
            machines[1].cable("down")
        time.sleep(6)  # without a word to the others
        ranks.end()

    assert fork_ranks(4, work, ranks) == [0 if busy else 1] * 4
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Nothing has been heard from")]
    assert sorted(said) == ([] if busy else [gone(FIRST, 3), gone(SECOND, 3)])


@pytest.mark.parametrize("port", ["x", "70000", "-1"])
def test_a_port_that_is_none(port, monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(SystemExit) as stop:
        ranks.machines.connect(0)
    assert stop.value.code == 2
    assert f"error: MASTER_PORT is {port!r}, not the number of a port" in capsys.readouterr().err


def test_rank_0_that_cannot_be_reached(monkeypatch, capsys):
    monkeypatch.setattr(ranks.machines, "CONNECT", 1)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("MASTER_ADDR", "::1")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:  # a port that is free afterwards
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
    with pytest.raises(SystemExit) as stop:
        ranks.machines.connect(1)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "error: no connection to rank 0 at ::1, port" in message


def gone(address, seconds=30):
    return (
        f"Nothing has been heard from {address} for {seconds} s: that machine has gone, or the network between has; "
        "--resume goes on from the last checkpoint"
    )


# The README's commands

JOBS = {"imagenet": IMAGENET, "async": ASYNC, "ddg": "ddg_comparisons/parallel.py"}
OWN = {"async": DIGITS, "ddg": ["--data", "digits", "--batch-size", 10, "--depth", 8, "--threads", 1]}


def start_job(job, machines, tree, *flags, folder, **options):
    """One process a machine; both have the save folder."""
    own = OWN.get(job, [tree, *SMALL, "--module-parallel"])
    for machine in machines:
        machine.start(JOBS[job], *own, "--save_folder", folder, *flags, cwd=folder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("master", ["m1", "fd00:77::1"])
def test_the_first_machine_by_name_and_by_ipv6(master, machines, tree, tmp_path):
    """On itself, its name is 127.0.1.1. Only the ranks of the first module need the images."""
    first, second = machines
    flags, folder = ["--nepochs", 2, "--num-modules", 2], tmp_path / "parallel"
    first.start(IMAGENET, tree, *SMALL, "--module-parallel", *flags, cwd=folder, master=master)
    second.start(IMAGENET, "no/images", *SMALL, "--module-parallel", *flags, cwd=tmp_path / "second", master=master)
    assert [machine.wait(100) for machine in machines] == [0, 0], first.said() + second.said()
    assert_same(result(folder), trained(tmp_path / "one", tree, *flags))
    assert not [*(tmp_path / "second").glob("*.pt"), *(tmp_path / "second").glob("*.log")]


@pytest.mark.slow
@pytest.mark.parametrize("script", [IMAGENET, "imagenet_dgl/imagenet.py"])
def test_data_parallel(script, machines, tree, tmp_path):
    for machine in machines:
        machine.start(script, tree, *SMALL, "--nepochs", 1, "--lr", 0.001, cwd=tmp_path)
    assert [machine.wait(100) for machine in machines] == [0, 0], machines[0].said() + machines[1].said()
    assert checkpoint_of(tmp_path)["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("master", [FIRST, "m1", "fd00:77::1"])
def test_asynchronous_training(master, machines, tmp_path):
    start_job("async", machines, None, "--train-size", 40, "--nepochs", 3, folder=tmp_path, master=master)
    assert [machine.wait(100) for machine in machines] == [0, 0], machines[0].said() + machines[1].said()
    assert checkpoint_of(tmp_path)["epoch"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_cable_that_is_pulled_ends_the_job_on_both_machines(job, machines, tree, tmp_path):
    first, second = machines
    if job == "imagenet":
        endless, begun = ["--dummy", "-p", 1], r"Epoch: \[0\]\[ *20/"
    else:
        endless, begun = ["--train-size", 1000], r"n: \d, epoch 1,"
    start_job(job, machines, tree, *endless, folder=tmp_path)
    until(lambda: re.search(begun, first.said()))
    first.cable("down")
    begin = time.monotonic()
    for machine, other in ((first, SECOND), (second, FIRST)):
        assert machine.wait(60 - (time.monotonic() - begin)) != 0
        assert machine.err.read_text().count(gone(other)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("job", ["imagenet", "async"])
@pytest.mark.parametrize("fault", ["killed", "cable"])
def test_a_machine_that_comes_back_is_taken_up(job, fault, machines, tree, tmp_path):
    """After kill -9 it types its command again; a cable only has to be plugged in again."""
    first, second = machines
    flags = ["--nepochs", 40] if job == "imagenet" else ["--train-size", 80, "--nepochs", 20]
    folder, options = tmp_path / "folder", {"folder": tmp_path / "folder", "restarts": 3}
    start_job(job, machines, tree, *flags, "--resume", "auto", **options)
    until(lambda: [*folder.glob("*.pt")])
    if fault == "killed":
        second.kill()
        start_job(job, [second], tree, *flags, "--resume", "auto", **options)
    else:
        first.cable("down")
        time.sleep(45)  # until both have noticed
        first.cable("up")
    assert [machine.wait(200) for machine in machines] == [0, 0], first.said() + second.said()
    assert checkpoint_of(folder)["epoch"] == flags[-1]
    if job == "imagenet":
        assert_same(result(folder), trained(tmp_path / "one", tree, *flags))
