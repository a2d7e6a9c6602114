"""Two processes train as one does with the same parts of the batch; what happens when one is missing."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import options, quiet
from tolerances import PROCESSES

from finetune.distributed import SINGLE, ProcessGroup, init, timeout_min
from finetune.errors import ConfigError
from finetune.options import TrainOptions, flag
from finetune.recipes import RunFacts, resolve
from finetune.train import checkpointing, prepare, run
from finetune.train.progress import Display
from finetune.train.steps import reseed
from finetune.train.train import open_run, start

ROOT = Path(__file__).parents[2]
# All that processes have to tell each other: ADA's signs, the mean path length, norms behind `auto:`, w_avg.
SHARED = dict(
    batch=8, batch_gpu=4, kimg=0.016, tick=0.008, snap=100, aug="ada", target=0.0, augpipe="blit",
    sd_interval=1, sd_weight="auto:0.2", mirror=True, save_every_min=0,
)  # fmt: skip


def words(config):
    """The options of a config as a command line has them."""
    found = []
    for field in dataclasses.fields(TrainOptions):
        value = getattr(config, field.name)
        if value is None or value == field.default:
            continue
        name = flag(field.name)
        found += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    return found


def started(*arguments, **environment):
    command = [sys.executable, "-m", "finetune", "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def done(*arguments, **environment):
    """Run `finetune train` to its end: exit code, and what it said."""
    process = started(*arguments, **environment)
    said, _ = process.communicate(timeout=150)
    return process.returncode, said


def state_in(outdir):
    (run_dir,) = outdir.iterdir()
    return checkpointing.read_state(checkpointing.states_of(run_dir)[0])


def distances(a, b, name=""):
    """(relative distance, name) of every tensor and number of two states."""
    if isinstance(a, torch.Tensor):
        a, b = a.double(), b.double()
        return [(float((a - b).norm() / a.norm().clamp_min(1e-3)), name)] if a.numel() else []
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        return [found for key in a for found in distances(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for index, (x, y) in pairs for found in distances(x, y, f"{name}/{index}")]
    if isinstance(a, float):
        return [(abs(a - b) / max(abs(a), 1e-3), name)]
    assert a == b, name
    return []


def assert_alike(a, b):
    parts = ("networks", "opt_G", "opt_D", "ada", "path_mean", "sd_norms", "nimg", "step", "sampler")
    for part in parts:
        for distance, name in distances(a[part], b[part], part):
            assert distance <= PROCESSES, name
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])


def test_two_ranks_equal_one_and_resume_each_other(images, tmp_path):
    alone = options(images, tmp_path, **SHARED, outdir=str(tmp_path / "one"))
    run(alone, console=quiet())
    together = dataclasses.replace(alone, outdir=str(tmp_path / "two"))
    code, said = done(*words(together), "--gpus", 2)
    assert code == 0, said
    assert said.count("Run folder:") == 1 and said.count("Done: 0.016 kimg") == 1
    one, two = state_in(tmp_path / "one"), state_in(tmp_path / "two")
    assert float(one["sd_norms"][1]) > 0 and float(one["path_mean"]) != 0 and one["ada"]["count"] == 16
    assert_alike(one, two)

    # The state of two goes on in one process as that of one does.
    for name in ("one", "two"):
        (run_dir,) = (tmp_path / name).iterdir()
        longer = TrainOptions(resume=str(run_dir), kimg=0.024)
        run(longer, console=quiet())
    assert_alike(state_in(tmp_path / "one"), state_in(tmp_path / "two"))


@dataclasses.dataclass(frozen=True)
class OneOfTwo(ProcessGroup):
    """A first process whose other one has replaced five images."""

    def all_reduce_total(self, value, what):
        return value + 5


@dataclasses.dataclass(frozen=True)
class ReadOnly(ProcessGroup):
    """One of two ranks, of which the other one is not asked."""

    def broadcast_object(self, value, what):
        return value


def test_unreadable_counts_of_all_ranks_are_summed_once(images, tmp_path):
    prepared = prepare(options(images, tmp_path))
    plan = dataclasses.replace(prepared.plan, group=OneOfTwo())
    run_dir = start(dataclasses.replace(prepared, plan=plan), console=quiet()).run_dir
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["unreadable"] for line in lines] == [5, 5]
    content = checkpointing.read_state(checkpointing.states_of(run_dir)[0])
    assert content["sampler"]["unreadable"] == 5

    # The first process goes on with the count of all, the others with none.
    for rank, expected in ((0, 5), (1, 0)):
        again = prepare(TrainOptions(resume=str(run_dir), kimg=0.04))
        plan = dataclasses.replace(again.plan, group=ReadOnly(rank, 2))
        with open_run(dataclasses.replace(again, plan=plan), Display(quiet(), 40)) as resumed:
            assert resumed.batches.unreadable == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t"])
def test_state_of_one_rank_resumes_on_two(family, images, tmp_path):
    for name in ("one", "two"):
        run(options(images, tmp_path, family, **SHARED, outdir=str(tmp_path / name)), console=quiet())
    (first,), (second,) = (tmp_path / "one").iterdir(), (tmp_path / "two").iterdir()
    run(TrainOptions(resume=str(first), kimg=0.024), console=quiet())
    code, said = done("--resume", second, "--kimg", 0.024, "--gpus", 2)
    assert code == 0, said
    assert_alike(state_in(tmp_path / "one"), state_in(tmp_path / "two"))


@pytest.mark.slow
def test_two_ranks_resume_bit_exact(images, tmp_path):
    """Bit for bit: two numbers have one sum in either order. Between two ticks, in all lazy intervals."""
    for name, kimg in (("whole", 0.048), ("stopped", 0.024)):
        changes = {"kimg": kimg, "tick": 0.016, "lr_warmup_kimg": 0.04, "outdir": str(tmp_path / name)}
        config = options(images, tmp_path, **SHARED | changes)
        code, said = done(*words(config), "--gpus", 2)
        assert code == 0, said
    (run_dir,) = (tmp_path / "stopped").iterdir()
    code, said = done("--resume", run_dir, "--kimg", 0.048, "--gpus", 2)
    assert code == 0, said
    whole, stopped = state_in(tmp_path / "whole"), state_in(tmp_path / "stopped")
    assert whole["nimg"] == stopped["nimg"] == 48
    parts = ("networks", "opt_G", "opt_D", "ada", "path_mean", "sd_norms", "step", "sampler", "random")
    for part in parts:
        assert {distance for distance, _ in distances(whole[part], stopped[part])} <= {0.0}, part


def long_run(images, tmp_path, **environment):
    """Two processes that have passed their first tick."""
    config = options(images, tmp_path, **{**SHARED, "kimg": 100.0, "tick": 0.04})
    process = started(*words(config), "--gpus", 2, **environment)
    lines = []
    while not any("0.04 kimg" in line for line in lines):
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    return process


def rank(number, launcher):
    """The process id of a rank among those that a launcher has started."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = (place / "environ").read_bytes().split(b"\0")
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher.pid and f"RANK={number}".encode() in environment:
            return int(place.name)
    raise AssertionError(f"no process of rank {number}")


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 0)])
def test_signal_stops_all_ranks_and_saves(name, code, images, tmp_path):
    process = long_run(images, tmp_path)
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and said.count("To resume: finetune train --resume") == 1
    content = state_in(tmp_path / "runs")
    assert f"after {content['nimg'] / 1000:g} kimg" in said and content["nimg"] >= 40


@pytest.mark.slow
def test_killed_rank_is_named(images, tmp_path):
    process = long_run(images, tmp_path)
    os.kill(rank(1, process), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in said
    assert re.search(r"Rank 1/2 ended with SIGKILL|Rank 0/2: collective failed", said), said
    assert state_in(tmp_path / "runs")["nimg"] == 0  # the last that was saved, whole


@pytest.mark.slow
def test_hanging_rank_times_out(images, tmp_path):
    process = long_run(images, tmp_path, FINETUNE_TIMEOUT_MIN="0.1")
    os.kill(rank(1, process), signal.SIGSTOP)
    since = time.monotonic()
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 2 and time.monotonic() - since > 5
    found = re.search(r"Rank 0/2: collective timed out in (.+?): ", said)
    assert found and re.fullmatch(
        r"(Gmain|Greg|Dmain|Dreg|the (beginning|log|exchange) of).*step \d+\)?", found[1]
    ), said


def test_reseed_depends_on_key_only():
    generator = torch.Generator()

    def drawn(*key):
        reseed(generator, *key)
        return torch.randn(3), torch.rand(2, generator=generator)

    first = drawn(0, 7, "Gmain", 1)
    torch.randn(100)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0, 7, "Gmain", 1), strict=True))
    for other in ((1, 7, "Gmain", 1), (0, 8, "Gmain", 1), (0, 7, "Dmain", 1), (0, 7, "Gmain", 0)):
        assert not torch.equal(first[0], drawn(*other)[0])


def test_init_single_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert init(torch.device("cpu")) == (SINGLE, torch.device("cpu"))
    values = [torch.tensor([1.0, 2.0])]
    SINGLE.all_reduce_sum(values, "nothing")
    SINGLE.broadcast(values, "nothing")
    assert (
        values[0].tolist() == [1.0, 2.0]
        and SINGLE.broadcast_object("x", "nothing") == "x"
        and SINGLE.all_reduce_max(3, "") == 3
    )


TELL = """
import torch
from finetune.distributed import init, shutdown
group, _ = init(torch.device("cpu"))
value = 3 + 4 * group.rank
print(group.all_reduce_total(value, ""), group.all_reduce_max(value, ""), group.broadcast_object(value, ""))
shutdown()
"""


@pytest.mark.slow
def test_collectives_of_two_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TELL],
            cwd=ROOT,
            env={**os.environ, **places, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [process.communicate(timeout=120)[0].split() for process in both] == [["10", "7", "3"]] * 2


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_timeout_min_refuses_other_values(text, monkeypatch):
    monkeypatch.setenv("FINETUNE_TIMEOUT_MIN", text)
    with pytest.raises(
        ConfigError, match=f"FINETUNE_TIMEOUT_MIN={text}: must be a number of minutes above 0"
    ):
        timeout_min()


def test_init_refuses_more_ranks_than_gpus(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks on this machine, torch sees 1 CUDA devices"):
        init(torch.device("cuda"))
    with pytest.raises(ConfigError, match="--device mps: training on several ranks"):
        init(torch.device("mps"))


@pytest.mark.parametrize(
    "world, batch, part", [(1, 32, 32), (2, 32, 16), (3, 36, 12), (8, 32, 4), (16, 64, 4)]
)
def test_batch_divisible_by_ranks(world, batch, part):
    facts = RunFacts("stylegan2", 64, 3, 0, 5000, "cpu", 2, False, num_processes=world)
    config, _ = resolve(TrainOptions(data="x", resume="y"), facts)
    assert (config.batch, config.batch_gpu) == (batch, part)


@pytest.mark.slow
def test_metrics_of_two_ranks_equal_one(images, tmp_path):
    metrics = dict(metrics="random-fid", metrics_num=16)
    lines = {}
    for name, more in (("one", ()), ("two", ("--gpus", 2))):
        config = options(images, tmp_path, **SHARED, **metrics, outdir=str(tmp_path / name))
        code, said = done(*words(config), *more, FINETUNE_CACHE=str(tmp_path / "cache"))
        assert code == 0, said
        (log,) = (tmp_path / name).glob("*/log.jsonl")
        logged = [json.loads(line) for line in log.read_text().splitlines()]
        lines[name] = [line["metrics"] for line in logged if "metrics" in line]
    assert lines["one"]
    for one, two in zip(lines["one"], lines["two"], strict=True):
        assert one["random-fid"] == pytest.approx(two["random-fid"], rel=10 * PROCESSES)
