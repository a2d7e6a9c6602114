"""What `finetune doctor --build` builds ahead of time is what the networks ask for."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from torch_utils.ops.native import prebuild

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_build(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bench_build")
    sys.modules.pop("bench_build")


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
def test_built_ahead_prebuild_covers_training_step(bench_build, family):
    asked = bench_build.asked_for(family, 64)
    assert {plan.op for plan in asked} >= {"bias_act", "upfirdn2d"} and len(asked) > 20
    assert any(plan.op == "filtered_lrelu" for plan in asked) == (family != "stylegan2")
    assert any(plan.op == "fma" for plan in asked) == (family != "stylegan3-r")  # whose convolutions are 1x1
    assert any(("SG_DB", 1) in plan.defines for plan in asked if plan.op == "bias_act")
    assert set(asked) <= set(prebuild.specializations((9, 0)))
