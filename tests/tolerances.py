"""Every tolerance that the tests use, with where it comes from."""

from __future__ import annotations

import numpy as np
import torch

# golden/README.md: ops in float64, relative to the largest value (filters and their gain are float32).
OPS_F64 = 1e-6
# golden/README.md: networks in float32, relative to the largest value.
NETWORK_F32 = 1e-4
# golden/README.md: gradients of networks in float32.
GRADIENT_F32 = 1e-3
# Two ways to compute one quantity, sums of some hundred terms: a few hundred units in the last place.
SAME_F64 = 1e-12
SAME_F32 = 1e-5
# Float32 convolutions split in TF32: tensor cores add eight products at once and cut off what is below 2^-23
# of the running sum. 1,728 products are 216 additions: 2.6e-5 a convolution at most, four of them in a chain.
SPLIT_F32 = 1e-4
# float16 against float32: ten bits of mantissa (5e-4 a rounding), one convolution and a network.
CONV_F16 = 5e-3
NETWORK_F16 = 2e-2
# Two processes against one: the first steps of Adam divide small gradients by their size, rounding and all.
PROCESSES = 1e-3


def sum_of_products(dtype: torch.dtype, terms: int, stored: int = 1) -> float:
    """Bound the error of a sum of products, in units of the sum of the magnitudes of its products.

    dtype: of the factors, taken as exact, and of what is stored. terms: products in a sum. stored: how often
    the result or something that it is made of is rounded to `dtype`, each time by half a unit in the last
    place. Sums are taken in float32 or wider, in any order: each addition rounds by half a unit of float32 at
    most, of a partial sum that is no larger than the sum of the magnitudes (Higham, "Accuracy and Stability
    of Numerical Algorithms", section 3.1). What a convolution gives on a GPU has to be held to this and
    not to another algorithm's error: cuDNN chooses a different order of additions for each layout and size.
    """
    inside = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return stored * torch.finfo(dtype).eps / 2 + terms * inside / 2


def assert_close(actual, expected, rel: float, name: str = "") -> None:
    """Assert that two arrays have one shape and differ by at most `rel` times the largest value expected."""
    actual, expected = (
        np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=np.float64)
        for value in (actual, expected)
    )
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    assert np.isfinite(actual).all(), f"{name}: not finite"
    scale = max(float(np.abs(expected).max()), 1e-12)
    error = float(np.abs(actual - expected).max()) / scale
    assert error <= rel, f"{name}: relative error {error:.3g} is above {rel:g} (largest value {scale:.3g})"
