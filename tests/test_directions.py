from __future__ import annotations

import pytest
import torch

import finetune
from finetune.directions import principal_directions
from finetune.errors import ConfigError


class FakeG(torch.nn.Module):
    """A mapping whose w has known principal directions: 5 along axis 2, 3 along axis 0, and 0.1 elsewhere."""

    z_dim = w_dim = 4

    def __init__(self, c_dim=0):
        super().__init__()
        self.c_dim = c_dim

    def mapping(self, z, c):
        w = z * torch.tensor([3.0, 0.1, 5.0, 0.1]) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        if self.c_dim:  # classes differ along axis 1
            w = w + torch.tensor([0.0, 100.0, 0.0, 0.0]) * c.argmax(dim=1, keepdim=True)
        return w.unsqueeze(1).repeat(1, 6, 1)


def test_directions_of_known_distribution():
    found = principal_directions(FakeG(), 2)
    assert found.mean.shape == (4,) and found.vectors.shape == (2, 4) and found.vectors.dtype == torch.float32
    torch.testing.assert_close(found.std, torch.tensor([5.0, 3.0]), rtol=0.03, atol=0)
    torch.testing.assert_close(found.mean, torch.tensor([1.0, 2.0, 3.0, 4.0]), rtol=0, atol=0.15)
    expected = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found.vectors, expected, rtol=0, atol=0.03)


def test_directions_leave_out_differences_between_classes():
    found = principal_directions(FakeG(c_dim=3), 2)
    torch.testing.assert_close(found.std, torch.tensor([5.0, 3.0]), rtol=0.03, atol=0)
    assert found.mean[1] == pytest.approx(102, abs=0.1)
    assert principal_directions(FakeG(c_dim=3), 1, class_index=2).mean[1] == pytest.approx(202, abs=0.1)
    one = principal_directions(FakeG(c_dim=3), 1, label=[0, 0.5, 0])
    assert one.mean[1] == pytest.approx(102, abs=0.1) and one.std == pytest.approx(5, rel=0.03)


@pytest.mark.parametrize("name", ["stylegan2-32", "stylegan2-64-cond"])
def test_directions_of_network(golden_dir, name):
    G = finetune.load(golden_dir / f"{name}.pkl").best
    found = principal_directions(G, 3)
    again = principal_directions(G, 3)
    assert all(torch.equal(getattr(found, key), getattr(again, key)) for key in ("mean", "vectors", "std"))
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3), rtol=0, atol=1e-5)
    assert (found.std[:-1] >= found.std[1:]).all() and found.std[-1] > 0


def test_directions_errors():
    with pytest.raises(ConfigError, match="5 directions of w cannot be computed: choose 1 to 4"):
        principal_directions(FakeG(), 5)
    with pytest.raises(ConfigError, match="0 directions"):
        principal_directions(FakeG(), 0)
    with pytest.raises(ConfigError, match="--class 3: must be 0 to 2"):
        principal_directions(FakeG(c_dim=3), 1, class_index=3)
