"""How CUDA multiplies float32 numbers: switched around a run, and back."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import after_each_step, options, quiet

from finetune.device import float32_math, training_math
from finetune.train import run


def switches():
    backends = torch.backends
    return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark


@pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="torch has no cuDNN")
def test_float32_math_limits_the_algorithms_that_cudnn_tries():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark_limit
    with training_math("auto"):
        assert cudnn.benchmark_limit == 4 < before
        with float32_math(tf32=True):  # as around the distance of self-distillation
            assert cudnn.benchmark_limit == 4
    assert cudnn.benchmark_limit == before


def test_float32_math_disables_tf32():
    before = switches()
    assert before[0], "torch's default, which the block is there for, has changed"
    with float32_math():
        assert switches() == (False, False, before[2])
        with float32_math(tf32=True, benchmark=True):
            assert switches() == (True, True, True)
        assert switches() == (False, False, before[2])
    assert switches() == before


@pytest.fixture
def precision_names():
    """The objects with `fp32_precision` of torch 2.9 and later, restored after the test."""
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):
        pytest.skip("torch has no fp32_precision")
    objects = backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    before, (convolutions, products, _) = [each.fp32_precision for each in objects], switches()
    yield objects
    backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = convolutions, products
    for each, value in zip(objects, before):
        each.fp32_precision = value


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["all", "products", "convolutions"])
def test_float32_math_overrides_and_restores_fp32_precision(changed, precision_names):
    """Once these names were used, torch may refuse to read `allow_tf32`."""
    precision_names[changed].fp32_precision = "ieee" if changed == 2 else "tf32"
    before = [each.fp32_precision for each in precision_names]
    for _ in range(2):
        with float32_math():
            assert [each.fp32_precision for each in precision_names[1:]] == ["ieee"] * 3
            assert switches()[:2] == (False, False), "torch.compile reads these"
            with float32_math(tf32=True):
                assert [each.fp32_precision for each in precision_names[1:]] == ["tf32"] * 3
        assert [each.fp32_precision for each in precision_names] == before
    if changed == 1:
        assert torch.backends.cudnn.allow_tf32, "it could be read before, and still can"


def test_float32_math_sums_float16_in_float32():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    with float32_math():
        assert matmul.allow_fp16_reduced_precision_reduction is False
    assert before is matmul.allow_fp16_reduced_precision_reduction is True


def test_float32_math_restores_switches_after_error():
    before = switches()
    with pytest.raises(KeyError), float32_math(benchmark=True):
        raise KeyError
    assert switches() == before


def test_train_computes_in_float32(images, tmp_path, monkeypatch):
    before, seen = switches(), []
    after_each_step(monkeypatch, lambda state: seen.append(switches()))
    run(options(images, tmp_path, kimg=0.004), console=quiet())
    assert seen and all(each[:2] == (False, False) for each in seen)
    assert switches() == before


def test_deterministic_math_is_restored():
    before = torch.are_deterministic_algorithms_enabled(), switches()
    with pytest.raises(KeyError), training_math("auto", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled() and not switches()[2]
        raise KeyError
    assert (torch.are_deterministic_algorithms_enabled(), switches()) == before
    with training_math("auto"):
        assert not torch.are_deterministic_algorithms_enabled() and switches()[2]
