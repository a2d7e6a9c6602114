"""Near copies of training images: planted ones are found, others are not."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import ImageSet, images_to_float
from finetune.demo.run import IMAGES
from finetune.errors import ConfigError
from finetune.metrics.evaluate import Evaluation
from finetune.metrics.memorization import find_near_copies


class Copier(torch.nn.Module):
    """A generator that shows a real image, shifted by a pixel, where z[0] > `above`, else noise."""

    z_dim, c_dim = 4, 0

    def __init__(self, image_set, above):
        super().__init__()
        real = np.stack([image_set[index][0] for index in range(len(image_set))])
        self.real = torch.nn.Parameter(images_to_float(torch.from_numpy(real)).roll(1, 3))
        self.above = above

    def forward(self, z, c, noise_mode):
        noise = torch.rand(len(z), *self.real.shape[1:], generator=torch.Generator().manual_seed(1)) * 2 - 1
        copied = self.real[(z[:, 1].abs() * 1000).long() % len(self.real)]
        return torch.where((z[:, 0] > self.above).reshape(-1, 1, 1, 1), copied, noise)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    with zipfile.ZipFile(IMAGES) as archive:
        archive.extractall(folder, sorted(archive.namelist())[:24])
    return ImageSet(folder, resolution=64, channels=3)


def test_memorization_finds_planted_copies(faces, tmp_path):
    evaluation = Evaluation(faces, ["memorization"])
    z = torch.randn([20, 4], generator=torch.Generator().manual_seed(0))
    planted = float((z[:, 0] > 0).float().mean())
    G = Copier(faces, above=0)
    found = evaluation.distances(G, 20)["memorization"]
    assert found.value == pytest.approx(planted) and 0.3 < planted < 0.7
    assert found.error == pytest.approx((planted * (1 - planted) / 20) ** 0.5)
    evaluation.write_pairs(G, 20, 0, tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size == (8 * 64, 4 * 64)
        pixels = np.asarray(sheet).astype(float)
    assert np.abs(np.roll(pixels[:64, :64], -1, axis=1) - pixels[64:128, :64]).mean() < 2  # the worst pair
    assert evaluation.distances(Copier(faces, above=9), 8)["memorization"].value == 0


def test_find_near_copies_measures_in_distances_of_real_images():
    real = torch.eye(10)  # the nearest neighbor is the square root of 2 away
    generated = torch.stack([real[3] * 0.5, real[7] * 0.2 + real[1] * 0.1])
    found = find_near_copies(generated, real, 10)
    assert found.index.tolist() == [3, 7]
    torch.testing.assert_close(found.distance, torch.tensor([0.5, 0.65**0.5]) / 2**0.5)
    assert found.fraction == 0.5


def test_find_near_copies_ignores_the_own_mirror_image():
    real = torch.eye(10)
    mirrored = torch.cat([real, real + 0.01])
    found = find_near_copies(real[:1] * 0.5, mirrored, 10)
    assert float(found.distance) == pytest.approx(0.5 / 2**0.5, abs=0.02)


def test_find_near_copies_leaves_exact_duplicates_out_of_the_median():
    real = torch.rand(80, 16)
    doubled = torch.cat([real, real[:60]])
    found = find_near_copies(real[:10] + 0.01, doubled, len(doubled))
    assert found.fraction == 1 and 0 < found.distance.max() < 0.2
    with pytest.raises(ConfigError, match="every real image has an exact duplicate"):
        find_near_copies(real[:2], real[:1].expand(80, -1), 80)
