"""Kill a training run with SIGKILL at random moments, go on, and compare the end with an undisturbed run.

    scripts/faults --kills 100 --out benchmarks/results/faults_<machine>_<yyyymm>.md

A tiny StyleGAN2 with everything that has a memory is trained once without disturbance, and once with a kill
after a random time again and again until enough kills have landed; then to its end. Four of five times are
counted from the moment at which the run begins to train, the fifth from the start of the process. After every
kill, the newest state that is whole is looked for: there must always be one, and never an older one than
before. Saves are frequent, so that kills land inside them: a temporary file that is left tells. The end must
be equal, bit for bit. Exits with 1 where something of that is not so.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, machine, table, write_report

from finetune.train import saved

PICTURES = ROOT / "finetune" / "demo" / "faces-flat.zip"
TINY = (
    "--scratch stylegan2 --resolution 64 --fit stretch --cbase 256 --cmax 16 --z-dim 16 --w-dim 16 "
    "--map-depth 2 --batch 4 --aug ada --target 0 --augpipe blit --sd-backbone l2 --sd-weight auto:0.2 "
    "--device cpu --workers 2 --snap 1 --keep 2"
).split()


def command(*words: object) -> list[str]:
    """`finetune train` with further words."""
    return [sys.executable, "-m", "finetune", "train", *map(str, words)]


def new_run(options: argparse.Namespace, outdir: Path) -> list[str]:
    """The command of a new run; a tick, and so a save, every eight images."""
    return command("--data", PICTURES, "--outdir", outdir, *TINY, "--kimg", options.kimg, "--tick", 0.008)


def last_state(run_dir: Path) -> dict[str, Any]:
    """The newest state of a run that is whole."""
    found = saved.find_state(run_dir)
    assert found is not None, f"{run_dir} holds no state"
    return found.content


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """The names of what is not equal, bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        return [found for key in a | b for found in differences(a.get(key), b.get(key), f"{name}/{key}")]
    if isinstance(a, list):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for index, (x, y) in pairs for found in differences(x, y, f"{name}/{index}")]
    return [] if a == b else [name]


def run_in(outdir: Path) -> Path | None:
    """The run that has come as far as a first state; those killed before are left behind."""
    found = [path for path in sorted(outdir.glob("0*")) if saved.states_of(path)]
    return found[0] if found else None


def until_it_trains(process: subprocess.Popen[bytes]) -> None:
    """Wait for the line that says where the run is."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"Run folder:"):
            return


def disturb(options: argparse.Namespace, outdir: Path) -> dict[str, Any]:
    """Run, kill, go on; counts of what was seen."""
    rng = random.Random(options.seed)
    seen: dict[str, Any] = dict(kills=0, in_a_save=0, before_the_first_state=0, without_state=0, went_back=0)
    progress, newest, finished = [], -1, 0
    while seen["kills"] < options.kills:
        run_dir = run_in(outdir)
        words = new_run(options, outdir) if run_dir is None else command("--resume", run_dir)
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdout=pipe, stderr=pipe, cwd=ROOT)
        # Much of a process is its start; some kills shall come there, and most while it trains and saves.
        if seen["kills"] % 5:
            until_it_trains(process)
        try:
            process.wait(rng.uniform(0, options.longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            seen["kills"] += 1
        else:
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read().decode()[-2000:]
            finished += 1
            break
        run_dir = run_in(outdir)
        if run_dir is None:
            seen["before_the_first_state"] += 1
            continue
        left = [
            path for path in run_dir.iterdir() if path.name.startswith(".") and path.name.endswith(".tmp")
        ]
        seen["in_a_save"] += bool(left)
        for path in left:
            path.unlink()
        try:
            nimg = last_state(run_dir)["nimg"]
        except Exception as error:
            print(f"no whole state after kill {seen['kills']}: {error}")
            seen["without_state"] += 1
            continue
        seen["went_back"] += nimg < newest
        newest = max(nimg, newest)
        progress.append(nimg)
        print(f"kill {seen['kills']}: {nimg} images", flush=True)
    return {**seen, "finished_early": finished, "images_at_kills": progress}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kimg", type=float, default=4.0, help="long enough to be killed so often")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds before a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write what was seen to this Markdown file")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        disturbed = Path(folder) / "disturbed"
        seen = disturb(options, disturbed)
        run_dir = run_in(disturbed)
        assert run_dir is not None, "no run came as far as a first state"
        # To where the disturbed run has come, and both the same length further.
        kimg = min(options.kimg, (last_state(run_dir)["nimg"] + 200) // 4 * 4 / 1000)
        if not seen["finished_early"]:
            subprocess.run(
                command("--resume", run_dir, "--kimg", kimg), check=True, stdout=subprocess.DEVNULL
            )
        whole = Path(folder) / "whole"
        words = [*new_run(options, whole), "--kimg", str(kimg)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        a, b = last_state(next(iter(whole.glob("0*")))), last_state(run_dir)
        parts = (
            "networks",
            "opt_G",
            "opt_D",
            "ada",
            "path_mean",
            "sd_norms",
            "nimg",
            "step",
            "random",
            "sampler",
        )
        different = [found for part in parts for found in differences(a[part], b[part], part)]
    bad = bool(different or seen["without_state"] or seen["went_back"])
    rows = [[name.replace("_", " "), str(value)] for name, value in seen.items() if name != "images_at_kills"]
    rows += [
        ["images seen at the end", str(b["nimg"])],
        ["parts of the end that differ", str(len(different))],
    ]
    text = table(["what", "count"], rows)
    print(text + ("\n\n" + "\n".join(different[:20]) if different else ""))
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        record = {
            "machine": machine(torch.device("cpu")),
            "settings": settings,
            "sec": round(time.monotonic() - started),
            "results": json.loads(json.dumps(seen)),
            "different": different,
        }
        write_report(
            options.out,
            "A run that is killed again and again",
            f"scripts/faults {' '.join(sys.argv[1:])}",
            [text],
            record,
        )
    sys.exit(bad)


if __name__ == "__main__":
    main()
