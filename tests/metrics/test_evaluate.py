"""Distances of a generator to a set of pictures: right, seeded, in chunks; errors name what exists."""

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import ImageSet
from finetune.errors import ConfigError
from finetune.metrics import evaluate
from finetune.metrics.evaluate import Distance, Evaluation, distances
from finetune.metrics.random_fid import random_fid


class Painter(torch.nn.Module):
    """A generator in miniature: paints a whole picture in the colour that z says."""

    z_dim, c_dim = 3, 0

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, z, c, noise_mode="random"):
        assert noise_mode == "const"
        assert c.shape == (len(z), 0)
        return torch.tanh(z * self.scale)[:, :, None, None].expand(-1, -1, 16, 16)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.RandomState(0)
    for i in range(20):
        colour = (np.tanh(rng.randn(3)) * 127.5 + 127.5).round().astype(np.uint8)
        Image.fromarray(np.broadcast_to(colour, (16, 16, 3)).copy()).save(folder / f"{i:02}.png")
    return ImageSet(folder, resolution=16, channels=3)


def test_a_generator_nearer_to_the_pictures_scores_lower_in_both_spaces(colours):
    evaluation = Evaluation(colours)
    near, far = (evaluation.distances(Painter(scale), 20) for scale in (1.0, 0.1))
    for metric in evaluate.METRICS:
        assert 0 < near[metric].value < far[metric].value / 2
    assert near["random-fid"].spread > 0
    assert near["fd-effnet"].spread == 0


def test_the_number_is_the_one_of_random_fid_on_the_same_pictures(colours, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 7)
    found = distances(Painter(), colours, 12, seed=5, which=["random-fid"])
    z = torch.randn([12, 3], generator=torch.Generator().manual_seed(5))
    fake = Painter()(z, z[:, :0], noise_mode="const").mul(127.5).add(127.5).round() / 127.5 - 1
    real = torch.stack([torch.from_numpy(colours[i][0]) for i in range(20)]) / 127.5 - 1
    mean, spread = random_fid(fake.detach(), real)
    assert found == {"random-fid": Distance(pytest.approx(mean, rel=1e-4), pytest.approx(spread, rel=1e-3))}


def test_a_seed_gives_the_same_number_again_and_another_another(colours):
    evaluation = Evaluation(colours, ["random-fid"])
    first, again, other = (evaluation.distances(Painter(), 8, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["random-fid"].value != other["random-fid"].value


def test_progress_counts_pictures_to_the_end(colours):
    seen = []
    evaluation = Evaluation(colours, ["random-fid"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 20), (20, 20)]
    seen.clear()
    evaluation.distances(Painter(), 17, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 17), (17, 17)]


def test_wrong_requests_say_what_is_possible(colours):
    with pytest.raises(ConfigError, match="no metric is called fid; there are random-fid, fd-effnet"):
        Evaluation(colours, ["fid"])
    with pytest.raises(ConfigError, match="at least 2 generated pictures, not 1"):
        Evaluation(colours, ["random-fid"]).distances(Painter(), 1)
