"""Tests of an op run once for each way that there is to compute it."""

from __future__ import annotations

import pytest

from torch_utils.ops import impl


@pytest.fixture(params=["ref", "native"])
def implementation(request):
    """Plain torch, or the kernels of the device that a test uses."""
    if request.param == "ref":
        impl.set_default_impl("ref")
    yield request.param
    impl.set_default_impl(None)
