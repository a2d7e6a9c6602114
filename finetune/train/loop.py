"""The training loop. One pass of the loop is one batch of real images; every phase is one function."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import torch

from finetune.data import images_to_float
from finetune.train import losses
from finetune.train.ema import ema_decay, update_average
from finetune.train.latents import NoiseReplay, draw_latents, map_latents
from finetune.train.state import Plan, TrainState
from finetune.train.watch import Watch

Reals = list[tuple[torch.Tensor, torch.Tensor]]


def train(
    state: TrainState, plan: Plan, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], watch: Watch
) -> None:
    """Train until `plan.total_nimg` images were seen or `watch` asks to stop.

    `batches` yields uint8 images `[batch, C, H, W]` and float32 labels `[batch, c_dim]`, on any device.
    """
    while state.nimg < plan.total_nimg and not watch.is_told_to_stop(state):
        with watch.phase("data"):
            img, c = next(batches)
            img, c = images_to_float(img.to(plan.device)), c.to(plan.device)
            reals = list(zip(img.split(plan.batch_gpu), c.split(plan.batch_gpu), strict=True))

        learns_alone = state.nimg < plan.d_warmup_nimg  # a new D first finds out what is real
        if not learns_alone:
            generator_step(state, plan, watch)
            if plan.path_interval and state.step % plan.path_interval == 0:
                path_length_step(state, plan, watch)
        discriminator_step(state, plan, reals, watch)
        if state.step % plan.r1_interval == 0 and plan.gamma > 0:
            r1_step(state, plan, reals, watch)

        state.step += 1
        state.nimg += plan.batch
        if not learns_alone:
            update_averages(state, plan)
        state.ada.update(state.step, plan.batch)
        reseed([state.label_generator], plan.seed, state.step, "between")  # what is saved is the same in all
        watch.end_of_step(state)


def update_averages(state: TrainState, plan: Plan) -> None:
    """Move G_ema, and the teacher where it is another network, after G."""
    decay = ema_decay(plan.batch, plan.ema_nimg, nimg=state.nimg, rampup=plan.ema_rampup)
    update_average(state.G_ema, state.G, decay)
    if plan.teacher_nimg is not None:
        decay = ema_decay(plan.batch, plan.teacher_nimg, nimg=state.nimg, rampup=plan.ema_rampup)
        update_average(state.teacher, state.G, decay)


def generator_step(state: TrainState, plan: Plan, watch: Watch) -> None:
    """Gmain: fool D and, where distillation is due, stay near the teacher; one backward pass through G."""
    norms = []
    with watch.phase("Gmain"), optimise("G", state, plan, watch):
        for index, size in micro_batches(plan):
            reseed([state.label_generator], plan.seed, state.step, "Gmain", index)
            draw = draw_latents(state.G, plan.labels(size), plan.mixing)
            ws = map_latents(state.G, draw)
            replay = NoiseReplay(plan.device)
            img = state.G.synthesis(ws, **plan.synthesis)

            leaf = img.detach().requires_grad_()
            logits = score(state, plan, leaf, draw.c)
            loss = losses.generator_loss(logits)
            (gradient,) = torch.autograd.grad(loss.mean(), leaf)
            watch.record("Gmain", loss_G=loss, score_fake=logits, sign_fake=logits.sign())

            pull, norms_now = None, state.sd_norms.clone()
            if plan.distillation and plan.distillation.due(state.step):
                with watch.phase("Gdistill"):
                    pull, distances = plan.distillation.image_gradient(
                        state.teacher,
                        leaf,
                        draw,
                        replay,
                        state.nimg,
                        plan.synthesis,
                        gradient,
                        norms_now,
                    )
                    watch.record("Gdistill", loss_sd=distances)
                    if plan.distillation.ratio is not None:
                        watch.record("Gdistill", sd_weight=plan.distillation.auto_weight(norms_now))
            share = size / plan.batch
            if pull is not None and (diagnostics := watch.wants_gradients(state)) is not None:
                with watch.phase("diagnose"):
                    diagnostics.compare_gradients(state.G, img, gradient * share, pull * share)
            img.backward((gradient if pull is None else gradient + pull) * share)
            norms.append(norms_now)
    if plan.distillation and plan.distillation.ratio is not None:
        state.sd_norms = average(norms, plan, f"Gmain (step {state.step})")


def path_length_step(state: TrainState, plan: Plan, watch: Watch) -> None:
    """Greg: path length regularisation (StyleGAN2) on half of the batch, counted `path_interval` times."""
    means = []
    with watch.phase("Greg"), optimise("G", state, plan, watch):
        for index, size in micro_batches(plan):
            reseed([state.label_generator], plan.seed, state.step, "Greg", index)
            draw = draw_latents(state.G, plan.labels(max(size // 2, 1)), plan.mixing)
            ws = map_latents(state.G, draw)
            # Not fused: the gradient goes to the styles and leaves the weights out, which fused are one.
            img = state.G.synthesis(ws, **{**plan.synthesis, "fused_modconv": False})
            lengths = losses.path_lengths(img, ws)
            penalty, mean = losses.path_penalty(lengths, state.path_mean, plan.path_decay)
            means.append(mean)
            weight = plan.path_weight * plan.path_interval * (size / plan.batch)
            (penalty.mean() * weight).backward()
            watch.record("Greg", path_length=lengths, loss_path=penalty)
    state.path_mean = average(means, plan, f"Greg (step {state.step})")


def discriminator_step(state: TrainState, plan: Plan, reals: Reals, watch: Watch) -> None:
    """Dmain: tell real from generated. The running averages inside G move here, once a step."""
    moving = moving_buffers(state.G)
    before = after = [buffer.clone() for buffer in moving]
    signs = torch.zeros([], device=plan.device)
    with watch.phase("Dmain"), optimise("D", state, plan, watch):
        for (index, _), (real, real_c) in zip(micro_batches(plan), reals, strict=True):
            reseed([state.label_generator], plan.seed, state.step, "Dmain", index)
            share = len(real) / plan.batch
            draw = draw_latents(state.G, plan.labels(len(real)), plan.mixing)
            with torch.no_grad():
                ws = map_latents(state.G, draw, update_emas=index == 0)
                fake = state.G.synthesis(ws, update_emas=index == 0, **plan.synthesis)
            if index == 0:
                # Every part of the batch starts from the same averages, wherever it is computed.
                after = [buffer.clone() for buffer in moving]
                put(moving, before)
            fake_loss = losses.fake_loss(score(state, plan, fake, draw.c))
            (fake_loss.mean() * share).backward()

            real_logits = score(state, plan, real, real_c)
            real_loss = losses.real_loss(real_logits)
            (real_loss.mean() * share).backward()
            signs += real_logits.detach().sign().sum()
            watch.record("Dmain", loss_D=(fake_loss + real_loss).detach(), score_real=real_logits)
            watch.record("Dmain", sign_real=real_logits.sign())
    put(moving, after)
    plan.processes.broadcast(moving, f"Dmain (step {state.step})")
    plan.processes.all_reduce_sum([signs], f"Dmain (step {state.step})")
    state.ada.observe(signs, plan.batch)


def r1_step(state: TrainState, plan: Plan, reals: Reals, watch: Watch) -> None:
    """Dreg: the R1 penalty gamma/2·|∇D|² on real images, counted `r1_interval` times."""
    with watch.phase("Dreg"), optimise("D", state, plan, watch):
        for (index, _), (real, real_c) in zip(micro_batches(plan), reals, strict=True):
            reseed([state.label_generator], plan.seed, state.step, "Dreg", index)
            real = real.detach().requires_grad_()
            penalty = losses.r1_penalty(score(state, plan, real, real_c), real)
            weight = plan.gamma / 2 * plan.r1_interval * (len(real) / plan.batch)
            (penalty.mean() * weight).backward()
            watch.record("Dreg", r1_penalty=penalty)


def score(state: TrainState, plan: Plan, img: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Logits `[N, 1]` of images as D sees them: blurred (StyleGAN3-R from scratch), then augmented."""
    sigma = plan.blur_at(state.nimg)
    if sigma > 0:
        img = losses.blur(img, sigma)
    # At probability 0 the pipe is the identity, which is not worth its resampling.
    if state.augment_pipe is not None and state.ada.p > 0:
        state.augment_pipe.p.fill_(state.ada.p)
        img = state.augment_pipe(img)
    return state.D(img, c, **plan.discriminator)


def micro_batches(plan: Plan) -> list[tuple[int, int]]:
    """The parts in which this process puts its share of a batch through the networks: (number, size).

    Numbers count the parts of all processes.
    """
    count = plan.batch // plan.processes.world_size // plan.batch_gpu
    first = plan.processes.rank * count
    return [(first + i, plan.batch_gpu) for i in range(count)]


def average(parts: list[torch.Tensor], plan: Plan, what: str) -> torch.Tensor:
    """The mean over the parts of a batch, those of other processes included."""
    total = torch.stack(parts).mean(dim=0) / plan.processes.world_size
    plan.processes.all_reduce_sum([total], what)
    return total


def moving_buffers(G: torch.nn.Module) -> list[torch.Tensor]:
    """The averages inside G that training moves: of w, and of StyleGAN3's magnitudes."""
    return [buffer for name, buffer in G.named_buffers() if name.endswith(("w_avg", "magnitude_ema"))]


def put(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextlib.contextmanager
def optimise(name: str, state: TrainState, plan: Plan, watch: Watch) -> Iterator[None]:
    """Collect gradients of the network `name` (G or D), and of no other, inside the block; then take a step.

    The norm of the gradients is recorded. Where it is not finite, the watch says so before anything is saved;
    or, with `plan.skip_overflow`, the step is taken with gradients of zero and counted.
    """
    network, optimizer = getattr(state, name), getattr(state, f"opt_{name}")
    optimizer.zero_grad(set_to_none=True)
    network.requires_grad_(True)
    yield
    network.requires_grad_(False)
    gradients = [each.grad for each in network.parameters() if each.grad is not None]
    plan.processes.all_reduce_sum(gradients, f"{watch.phase_name} (step {watch.step})")
    norm = torch.nn.utils.get_total_norm(gradients)
    if plan.skip_overflow:
        overflow = ~norm.isfinite()
        for tensor in (norm, *gradients):
            tensor.masked_fill_(overflow, 0)
        watch.record(watch.phase_name, **{f"overflow_{name}": overflow})
    watch.record(watch.phase_name, **{f"grad_norm_{name}": norm})
    with slowed(optimizer, plan.rate_share(name, state.nimg)):
        optimizer.step()


@contextlib.contextmanager
def slowed(optimizer: torch.optim.Optimizer, share: float) -> Iterator[None]:
    """The optimizer with this share of its learning rates inside the block; states hold the whole ones."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= share
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def reseed(generators: Iterable[torch.Generator], *key: int | str) -> None:
    """Seed torch's global generators, and those given, from `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    # The generator of CPUs takes 32 bits of a seed.
    seed = int.from_bytes(digest[:4], "little")
    torch.manual_seed(seed)
    for generator in generators:
        generator.manual_seed(seed)
