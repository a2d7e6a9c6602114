"""A training run: open or resume the run folder, and run the training loop."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console

from finetune import run_lock
from finetune.config import TrainConfig
from finetune.data import InfiniteLoader, build_loader
from finetune.device import training_math
from finetune.options import TrainOptions
from finetune.resolve import newest_snapshot
from finetune.train import steps
from finetune.train.allocator import keep_freed_memory
from finetune.train.checkpointing import Checkpointer, RunFinished
from finetune.train.diagnostics import Diagnostics
from finetune.train.divergence import Alarm, DivergenceMonitor
from finetune.train.memory import out_of_memory
from finetune.train.optim import set_learning_rate
from finetune.train.page import RunPage
from finetune.train.prepare import Prepared, prepare, show
from finetune.train.progress import Display
from finetune.train.run_dir import ABANDONED, NullRunDir, RunDir, make_run_dir
from finetune.train.selection import Recommendation, follow, is_better, measurement, recommend
from finetune.train.signals import StopSignal
from finetune.train.state import Plan, RunCounters, TrainState
from finetune.train.stats import Stats
from finetune.train.validation import Validation


@dataclass(frozen=True)
class RunResult:
    """The result of a run: folder, last snapshot, images seen, the resolved config, the snapshot to use."""

    run_dir: Path
    snapshot: Path
    nimg: int
    config: TrainConfig
    recommended: Recommendation


@dataclass(frozen=True)
class Run:
    """The components of a run."""

    config: TrainConfig
    state: TrainState
    plan: Plan
    counters: RunCounters
    batches: InfiniteLoader
    stats: Stats
    monitor: DivergenceMonitor
    validation: Validation
    checkpointer: Checkpointer
    run_dir: RunDir
    page: RunPage
    display: Display
    stop: StopSignal


def run(options: TrainOptions, *, console: Console | None = None) -> RunResult:
    """Train as `options` ask and return the result.

    A resumed run that has reached its length is returned as it is. Raises FinetuneError before anything is
    written if something does not fit; KeyboardInterrupt, after the snapshot is safe, if the run was asked to
    stop.
    """
    console = console if console is not None else Console()
    try:
        prepared = prepare(options, console)
    except RunFinished as finished:
        console.print(str(finished), highlight=False, markup=False, soft_wrap=True)
        saved, counters = finished.saved, RunCounters()
        counters.load_state_dict(saved.content["counters"])
        snapshot = newest_snapshot(saved.path.parent)
        recommended = recommend(counters, snapshot, saved.nimg)
        return RunResult(saved.path.parent, snapshot, saved.nimg, finished.config, recommended)
    show(prepared, console)
    return start(prepared, console=console)


def start(prepared: Prepared, *, console: Console) -> RunResult:
    """Open the run folder, train, and print the outcome."""
    group = prepared.plan.group
    if prepared.plan.device.type == "cpu":
        keep_freed_memory()
    math = training_math(prepared.config.precision, deterministic=prepared.config.deterministic)
    display = Display(console, prepared.plan.total_nimg, prepared.plan.snap_nimg)
    with math, display, open_run(prepared, display) as run:
        with run.stop, run.plan.graphs.stream():
            recommended = None
            try:
                snapshot = train(run)
                recommended = recommend(run.counters, snapshot, run.state.nimg)
            except torch.OutOfMemoryError as error:
                name = shlex.quote(str(run.run_dir.path))
                raise out_of_memory(error, prepared.config, prepared.facts, name) from None
            finally:
                run.page.finish(run.state, recommended)
        if run.stop.number is not None:
            name = "SIGTERM" if run.stop.number == signal.SIGTERM else "Ctrl-C"
            display.print_line(
                f"Stopped by {name} after {run.state.nimg / 1000:g} kimg. "
                f"To resume: finetune train --resume {shlex.quote(str(run.run_dir.path))}"
            )
    group.barrier("the end")  # until everything is saved and printed
    if run.stop.number == signal.SIGINT:
        raise KeyboardInterrupt
    return RunResult(run.run_dir.path, snapshot, run.state.nimg, run.config, recommended)


@contextlib.contextmanager
def open_run(prepared: Prepared, display: Display) -> Iterator[Run]:
    """Make the run folder, or open that of a resumed run and load its state; rank 0 owns it in the block."""
    saved, state = prepared.origin.saved, prepared.state
    own = run_lock.own if prepared.plan.group.is_first else contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        if saved is None:
            path = new_run_dir(prepared)
            stack.enter_context(own(path))
            run = build_run(prepared, display, path)
            run.run_dir.open()
            run.run_dir.write_fakes(state.G_ema, "-init")
            run.checkpointer.save_state()  # a rollback needs one
        else:
            path = saved.path.parent
            stack.enter_context(own(path))
            saved.check_unchanged()
            run = build_run(prepared, display, path)
            run.checkpointer.load_state_dict(saved.content)
            if later := run.run_dir.set_aside_later(state.nimg):
                display.print_line(f"Set aside {len(later)} later files: their names end in {ABANDONED} now.")
            run.run_dir.drop_later_lines(state.nimg)
            run.run_dir.open()
            run.run_dir.event("resume", state, what=" ".join(prepared.origin.lines))
        stack.callback(run.batches.close)  # else workers wait for 5 s each until the garbage is collected
        run.page.start(prepared)
        display.start_at(state.nimg)
        run.monitor.restart(state.nimg)
        if run.plan.group.is_first:
            run.stats.diagnostics = Diagnostics(state)
        yield run


def new_run_dir(prepared: Prepared) -> Path:
    """Make the next run folder on rank 0, and return it on all ranks."""
    config, group = prepared.config, prepared.plan.group
    desc = f"{prepared.image_set.name}-{prepared.facts.family}-{prepared.facts.resolution}"
    made = make_run_dir(config.outdir, desc) if group.is_first else None
    return cast(Path, group.broadcast_object(made, "making the run folder"))


def build_run(prepared: Prepared, display: Display, path: Path) -> Run:
    """Build the parts of a run around its state; they begin at 0 images."""
    config, state, plan = prepared.config, prepared.state, prepared.plan
    image_set, group = prepared.image_set, plan.group
    kind = RunDir if group.is_first else NullRunDir
    source = prepared.origin.source
    run_dir = kind(path, config, image_set, source=source, chunk=plan.batch_gpu, device=plan.device)
    display.print_line(f"Run folder: {path}")
    display.print_line(f"Page: {path / 'report.html'}. To watch: finetune watch {shlex.quote(str(path))}")
    counters, stats = RunCounters(), Stats(plan.device, plan.tick_nimg, group=group)
    batches = build_loader(
        image_set,
        plan.batch // group.world_size,
        workers=config.workers,
        seed=config.seed,
        device=plan.device,
        rank=group.rank,
        num_replicas=group.world_size,
    )
    return Run(
        config=config,
        state=state,
        plan=plan,
        counters=counters,
        batches=batches,
        stats=stats,
        monitor=DivergenceMonitor(plan.ema_nimg),
        validation=Validation(config, image_set, plan.device, display.print_line, group, path),
        checkpointer=Checkpointer(config, plan, state, counters, batches, stats, run_dir, display),
        run_dir=run_dir,
        page=RunPage(run_dir, config),
        display=display,
        stop=StopSignal(),
    )


def train(run: Run) -> Path:
    """Train until the images of the plan were seen or a signal asks to stop; return the last snapshot.

    Raises TrainingError if the run diverged or cannot be saved.
    """
    state, plan, stats, checkpointer = run.state, run.plan, run.stats, run.checkpointer
    stopping = run.stop.requested(plan.group, state.step)
    while state.nimg < plan.total_nimg and not stopping:
        # Learning rates are functions of the images seen and the rollbacks.
        set_learning_rate(state.opt_G, plan.rate_G, state.nimg, run.counters.rollbacks)
        set_learning_rate(state.opt_D, plan.rate_D, state.nimg, run.counters.rollbacks)

        # Real images.
        with stats.phase("data"):
            reals = steps.next_batch(run.batches, plan)

        # G: adversarial loss with distillation; path length if due. A new D first trains alone.
        if state.nimg >= plan.d_warmup_nimg:
            steps.generator_step(state, plan, stats)
            if plan.path_interval and state.step % plan.path_interval == 0:
                steps.path_length_step(state, plan, stats)

        # D: adversarial loss; R1 if due.
        steps.discriminator_step(state, plan, reals, stats)
        if state.step % plan.r1_interval == 0 and plan.gamma > 0:
            steps.r1_step(state, plan, reals, stats)

        # Counters, EMA, ADA.
        steps.finish_step(state, plan)
        run.display.step(state)

        # A tick ends when its images were seen, and with the run.
        is_end = state.nimg >= plan.total_nimg
        stopping = run.stop.requested(plan.group, state.step)
        is_tick = is_end or stopping or stats.passed(plan.tick_nimg, state.nimg)
        alarms = stats.find_not_finite(state.step, at_tick=is_tick)
        diverged = report(run, alarms)
        if is_tick and diverged is None:
            is_due = stats.passed(plan.snap_nimg, state.nimg)

            # Statistics, diagnostics, metrics; a signal leaves limited time for saving.
            numbers = stats.read(state)
            if (is_end or (is_due and not stopping)) and (
                metrics := run.validation.measure(state)
            ) is not None:
                numbers["metrics"] = metrics
            if unreadable := checkpointer.count_unreadable():
                numbers["unreadable"] = unreadable

            # Log, progress.
            run.run_dir.log(state, numbers)
            run.display.tick(state, numbers)

            # Divergence; snapshot and state.
            diverged = report(run, run.monitor.check(state, numbers))
            if diverged is None:
                report(run, keep_best(run, numbers.get("metrics")))
                if is_due and not is_end and not stopping:
                    checkpointer.save()
                run.page.update(state)
                stats.restart(state.nimg)  # the time of metrics and saves is not that of training

        if diverged is not None:
            # Stop with an error, or return to the last state with half the learning rates.
            checkpointer.roll_back(diverged)
            run.monitor.restart(state.nimg)
            run.display.start_at(state.nimg)
            run.page.drop_later_previews(state.nimg)
        elif not is_end and not alarms:
            checkpointer.save_by_the_clock()
        if is_tick:
            stopping = run.stop.requested(plan.group, state.step)  # a tick takes time

    snapshot = checkpointer.save(is_last=True)
    assert snapshot is not None, "the last save works or raises"
    return snapshot


def report(run: Run, alarms: Iterable[Alarm]) -> Alarm | None:
    """Write and print alarms up to the first that ends the attempt, and return that one."""
    for alarm in alarms:
        run.run_dir.event(alarm.kind, run.state, what=alarm.what, **alarm.numbers)
        run.display.print_line(f"{run.state.nimg / 1000:g} kimg: {alarm.what}")
        if alarm.is_divergence and run.config.on_divergence != "ignore":
            return alarm
    return None


def keep_best(run: Run, metrics: dict | None) -> list[Alarm]:
    """Keep the generator that is best by the first metric; return an alarm if training has passed it."""
    if metrics is None:
        return []
    found = measurement(metrics, run.state.nimg)
    if not is_better(found, run.counters.best):
        return follow(run.counters, found)
    run.checkpointer.save_best(found)
    return []
