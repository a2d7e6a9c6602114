"""The phases of a training step. Each accumulates gradients over micro-batches and updates one network."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial

import torch

from finetune.data import images_to_float
from finetune.train import losses
from finetune.train.diagnostics import Diagnostics
from finetune.train.distill import Distillation
from finetune.train.ema import POWERS, ema_decay, num_updates, power_decay, update_average
from finetune.train.latents import Latents, NoiseReplay, draw_latents, map_latents
from finetune.train.state import Plan, TrainState
from finetune.train.stats import Stats

# Images [n, C, H, W] and labels [n, c_dim], by micro-batch.
RealBatch = list[tuple[torch.Tensor, torch.Tensor]]

# Names of phases, and of the gap between two steps. They are hashed into every draw (`reseed`): a new name
# changes all random numbers.
GMAIN, GREG, DMAIN, DREG, BETWEEN = "Gmain", "Greg", "Dmain", "Dreg", "between"
GDISTILL, DIAGNOSE = "Gdistill", "diagnose"  # in the log only


def update_averages(state: TrainState, plan: Plan) -> None:
    """Move G_ema, the teacher if it is a separate EMA, and the power-function averages toward G."""
    half_lives = {"G_ema": plan.ema_nimg, "teacher": plan.teacher_nimg}
    for name, half_life_nimg in half_lives.items():
        if half_life_nimg is None:
            continue
        decay = ema_decay(plan.batch, half_life_nimg, nimg=state.nimg, rampup=plan.ema_rampup)
        key = (name, decay) if plan.ema_rampup is None else None
        plan.graphs.run(key, partial(update_average, getattr(state, name), state.G, decay))
    for name, average in state.power_averages.items():
        updates = num_updates(state.nimg, plan.batch, plan.d_warmup_nimg)
        update_average(average, state.G, power_decay(updates, POWERS[name]))


# Functions `…_micro_batch` run as CUDA graphs: tensors in, a tensor out, no draw from the CPU, and
# nothing that waits for the device. What else they depend on is part of their key.


def generator_step(state: TrainState, plan: Plan, stats: Stats) -> None:
    """Run Gmain: the adversarial loss and, if due, distillation, in one backward pass through G."""
    norms = []
    distillation = plan.distillation if plan.distillation and plan.distillation.due(state.step) else None
    augmented = set_augmentation(state)
    with training("G", GMAIN, state, plan, stats):
        for _ in micro_batches(GMAIN, state, plan):
            has_gradient = distillation is not None and distillation.weight
            diagnostics = stats.due_diagnostics(state.nimg) if has_gradient else None
            key = (GMAIN, bool(distillation), augmented) if diagnostics is None else None
            part = partial(generator_micro_batch, state, plan, stats, distillation, diagnostics)
            norms.append(plan.graphs.run(key, part, **draw_inputs(state, plan, plan.batch_gpu)))
    if distillation is not None and distillation.ratio is not None:
        state.sd_norms.copy_(average(norms, plan, f"{GMAIN} (step {state.step})"))


def generator_micro_batch(
    state: TrainState,
    plan: Plan,
    stats: Stats,
    distillation: Distillation | None,
    diagnostics: Diagnostics | None,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """Add the gradients of one micro-batch to those of G; return `sd_norms` as moved by it."""
    latents, replay = Latents(**inputs), NoiseReplay()
    ws = map_latents(state.G, latents)
    with replay:
        img = state.G.synthesis(ws, **plan.synthesis)

    leaf = img.detach().requires_grad_()
    logits = score(state, plan, leaf, latents.c)
    loss = losses.generator_loss(logits)
    (gradient,) = torch.autograd.grad(loss.mean(), leaf)
    stats.record(loss_G=loss, score_fake=logits, sign_fake=logits.sign())

    distillation_grad, norms = None, state.sd_norms.clone()
    if distillation is not None:
        with stats.phase(GDISTILL):
            distillation_grad, distances = distillation.image_gradient(
                state.teacher, leaf, latents, replay, plan.synthesis, gradient, norms
            )
            stats.record(loss_sd=distances)
            if distillation.ratio is not None:
                stats.record(sd_weight=distillation.auto_weight(norms))
    scale = len(img) / plan.batch
    if diagnostics is not None and distillation_grad is not None:
        with stats.phase(DIAGNOSE):
            diagnostics.compare_gradients(state.G, img, gradient * scale, distillation_grad * scale)
    img.backward((gradient if distillation_grad is None else gradient + distillation_grad) * scale)
    return norms


def path_length_step(state: TrainState, plan: Plan, stats: Stats) -> None:
    """Run Greg: path length regularization (StyleGAN2) on half of the batch, weighted by `path_interval`."""
    means = []
    with training("G", GREG, state, plan, stats):
        for _ in micro_batches(GREG, state, plan):
            part = partial(path_length_micro_batch, state, plan, stats)
            latents = draw_inputs(state, plan, max(plan.batch_gpu // 2, 1))
            means.append(plan.graphs.run(GREG, part, **latents))
    state.path_mean.copy_(average(means, plan, f"{GREG} (step {state.step})"))


def path_length_micro_batch(
    state: TrainState, plan: Plan, stats: Stats, **inputs: torch.Tensor
) -> torch.Tensor:
    """Add the gradients of one micro-batch to those of G; return `path_mean` as this micro-batch moves it."""
    ws = map_latents(state.G, Latents(**inputs))
    # Not fused: the gradient goes to the styles and leaves the weights out, which fused are one.
    img = state.G.synthesis(ws, **{**plan.synthesis, "fused_modconv": False})
    lengths = losses.path_lengths(img, ws)
    penalty, mean = losses.path_penalty(lengths, state.path_mean, plan.path_decay)
    assert plan.path_interval is not None, "only families with path length regularization come here"
    weight = plan.path_weight * plan.path_interval * (plan.batch_gpu / plan.batch)
    (penalty.mean() * weight).backward()
    stats.record(path_length=lengths, loss_path=penalty)
    return mean


def discriminator_step(state: TrainState, plan: Plan, reals: RealBatch, stats: Stats) -> None:
    """Run Dmain: real against generated images. The running averages inside G move here, once a step."""
    moving, augmented = moving_buffers(state.G), set_augmentation(state)
    before = after = [buffer.clone() for buffer in moving]
    signs = torch.zeros([], device=plan.device)
    with training("D", DMAIN, state, plan, stats):
        for index, (real, real_c) in zip(micro_batches(DMAIN, state, plan), reals, strict=True):
            key = (DMAIN, index == 0, augmented)
            part = partial(discriminator_micro_batch, state, plan, stats, index == 0)
            latents = draw_inputs(state, plan, plan.batch_gpu)
            signs += plan.graphs.run(key, part, real=real, real_c=real_c, **latents)
            if index == 0:
                # Every micro-batch starts from the same averages, on whatever rank it is computed.
                after = [buffer.clone() for buffer in moving]
                copy_all(moving, before)
    copy_all(moving, after)
    plan.group.broadcast(moving, f"{DMAIN} (step {state.step})")
    plan.group.all_reduce_sum([signs], f"{DMAIN} (step {state.step})")
    state.ada.observe(signs, plan.batch)


def discriminator_micro_batch(
    state: TrainState,
    plan: Plan,
    stats: Stats,
    update_emas: bool,
    real: torch.Tensor,
    real_c: torch.Tensor,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """Add the gradients of one micro-batch to those of D; return the sum of the signs of D on real images."""
    scale = len(real) / plan.batch
    latents = Latents(**inputs)
    with torch.no_grad():
        ws = map_latents(state.G, latents, update_emas=update_emas)
        fake = state.G.synthesis(ws, update_emas=update_emas, **plan.synthesis)
    fake_loss = losses.fake_loss(score(state, plan, fake, latents.c))
    (fake_loss.mean() * scale).backward()

    real_logits = score(state, plan, real, real_c)
    real_loss = losses.real_loss(real_logits)
    (real_loss.mean() * scale).backward()
    signs = real_logits.detach().sign()
    stats.record(loss_D=(fake_loss + real_loss).detach(), score_real=real_logits, sign_real=signs)
    return signs.sum()


def r1_step(state: TrainState, plan: Plan, reals: RealBatch, stats: Stats) -> None:
    """Run Dreg: the R1 penalty gamma/2·|∇D|² on real images, weighted by `r1_interval`."""
    augmented = set_augmentation(state)
    with training("D", DREG, state, plan, stats):
        for _, (real, real_c) in zip(micro_batches(DREG, state, plan), reals, strict=True):
            part = partial(r1_micro_batch, state, plan, stats)
            plan.graphs.run((DREG, augmented), part, real=real, real_c=real_c)


def r1_micro_batch(
    state: TrainState, plan: Plan, stats: Stats, real: torch.Tensor, real_c: torch.Tensor
) -> None:
    """Add the gradients of one micro-batch to those of D."""
    real = real.detach().requires_grad_()
    penalty = losses.r1_penalty(score(state, plan, real, real_c), real)
    weight = plan.gamma / 2 * plan.r1_interval * (len(real) / plan.batch)
    (penalty.mean() * weight).backward()
    stats.record(r1_penalty=penalty)


def finish_step(state: TrainState, plan: Plan) -> None:
    """Advance counters, averages and ADA, and leave random states that are equal on all ranks."""
    generator_trains = state.nimg >= plan.d_warmup_nimg
    state.step += 1
    state.nimg += plan.batch
    if generator_trains:
        update_averages(state, plan)
    state.ada.update(state.step, plan.batch)
    reseed(state.label_generator, plan.seed, state.step, BETWEEN)


def next_batch(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], plan: Plan) -> RealBatch:
    """Return the next real images of this rank as micro-batches, on the device, as float."""
    img, c = next(batches)
    img = images_to_float(img.to(plan.device, non_blocking=True))
    c = c.to(plan.device, non_blocking=True)
    return list(zip(img.split(plan.batch_gpu), c.split(plan.batch_gpu), strict=True))


def draw_inputs(state: TrainState, plan: Plan, size: int) -> dict[str, torch.Tensor]:
    """Draw latents and labels of `size` images, as arguments of a `…_micro_batch` function."""
    labels = plan.labels(size)
    return draw_latents(state.G, labels, plan.mixing, as_tensors=plan.graphs.enabled).tensors()


def set_augmentation(state: TrainState) -> bool:
    """Set the pipe to ADA's probability, and return whether images are augmented."""
    if state.augment_pipe is not None:
        state.augment_pipe.p.fill_(state.ada.p)
    return augments(state)


def augments(state: TrainState) -> bool:
    """Return whether images are augmented: at probability 0 the pipe is the identity and left out."""
    return state.augment_pipe is not None and state.ada.p > 0


def score(state: TrainState, plan: Plan, img: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return logits `[N, 1]` of images as D sees them: blurred (StyleGAN3-R from scratch), then augmented."""
    sigma = plan.blur_at(state.nimg)
    if sigma > 0:
        img = losses.blur(img, sigma)
    if state.augment_pipe is not None and augments(state):
        img = state.augment_pipe(img, full_padding=plan.graphs.enabled)
    return state.D(img, c, **plan.discriminator)


def micro_batches(phase: str, state: TrainState, plan: Plan) -> Iterator[int]:
    """Yield the indices of the micro-batches of this rank, each after seeding all random numbers for it.

    Indices count the micro-batches of all ranks, so that their draws do not depend on the number of ranks.
    """
    count = plan.batch // plan.group.world_size // plan.batch_gpu
    for index in range(plan.group.rank * count, (plan.group.rank + 1) * count):
        reseed(state.label_generator, plan.seed, state.step, phase, index)
        yield index


def average(parts: list[torch.Tensor], plan: Plan, what: str) -> torch.Tensor:
    """Return the mean over the micro-batches of all ranks."""
    total = torch.stack(parts).mean(dim=0) / plan.group.world_size
    plan.group.all_reduce_sum([total], what)
    return total


def moving_buffers(G: torch.nn.Module) -> list[torch.Tensor]:
    """Return the averages inside G that training moves: of w, and of StyleGAN3's magnitudes."""
    return [buffer for name, buffer in G.named_buffers() if name.endswith(("w_avg", "magnitude_ema"))]


def copy_all(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextlib.contextmanager
def training(name: str, phase: str, state: TrainState, plan: Plan, stats: Stats) -> Iterator[None]:
    """Collect new gradients of the network `name` (G or D), and of no other, in the block; then update it."""
    network = getattr(state, name)
    with stats.phase(phase):
        plan.graphs.clear_gradients(phase, network)
        network.requires_grad_(True)
        yield
        network.requires_grad_(False)
        plan.graphs.keep_gradients(phase, network)
        update(name, phase, state, plan, stats)


def update(name: str, phase: str, state: TrainState, plan: Plan, stats: Stats) -> None:
    """Sum the gradients of the network `name` (G or D) over all ranks and take an optimizer step.

    The norm of the gradients is recorded, so that a value that is not finite is noticed before a save. With
    `plan.skip_overflow`, such a step is taken with gradients of zero and counted.
    """
    network, optimizer = getattr(state, name), getattr(state, f"opt_{name}")
    gradients = [each.grad for each in network.parameters() if each.grad is not None]
    plan.group.all_reduce_sum(gradients, f"{phase} (step {state.step})")

    def step() -> None:
        norm = torch.nn.utils.get_total_norm(gradients)
        if plan.skip_overflow:
            overflow = ~norm.isfinite()
            for tensor in (norm, *gradients):
                tensor.masked_fill_(overflow, 0)
            stats.record(**{f"overflow_{name}": overflow})
        stats.record(**{f"grad_norm_{name}": norm})
        optimizer.step()

    plan.graphs.run((phase, "update"), step)


def reseed(generator: torch.Generator, *key: int | str) -> None:
    """Seed torch's global generators, and the one given, from `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    # The generator of CPUs takes 32 bits of a seed.
    seed = int.from_bytes(digest[:4], "little")
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(seed)
    else:  # without a GPU, torch.manual_seed takes 0.4 ms to queue a call for CUDA, with a traceback
        torch.default_generator.manual_seed(seed)
    generator.manual_seed(seed)
