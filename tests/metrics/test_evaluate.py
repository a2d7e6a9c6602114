"""Distances of a generator to a set of images: right, seeded, in chunks; errors name what exists."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import ImageSet
from finetune.distributed import ProcessGroup
from finetune.errors import CheckpointError, ConfigError, DataError, FinetuneError, WeightsMissing
from finetune.metrics import evaluate
from finetune.metrics.evaluate import Evaluation, MetricValue
from finetune.metrics.features import RandomFeatures
from finetune.metrics.frechet import FeatureStatistics
from finetune.models.stylegan2 import Generator
from finetune.options import OFFLINE_METRICS


class Painter(torch.nn.Module):
    """A generator in miniature: paints a whole image in the color that z says."""

    z_dim, c_dim = 3, 0

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, z, c, noise_mode="random"):
        assert noise_mode == "const"
        assert c.shape == (len(z), 0)
        return torch.tanh(z * self.scale)[:, :, None, None].expand(-1, -1, 16, 16)


class Mapped(Painter):
    """The same with a W."""

    w_dim, num_ws = 3, 1

    def mapping(self, z, c):
        return z[:, None]

    def synthesis(self, ws, noise_mode):
        return self(ws[:, 0], ws[:, 0, :0], noise_mode)


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors")
    rng = np.random.RandomState(0)
    for i in range(20):
        color = (np.tanh(rng.randn(3)) * 127.5 + 127.5).round().astype(np.uint8)
        Image.fromarray(np.broadcast_to(color, (16, 16, 3)).copy()).save(folder / f"{i:02}.png")
    return ImageSet(folder, resolution=16, channels=3)


def test_distances_closer_generator_scores_lower(colors):
    evaluation = Evaluation(colors, OFFLINE_METRICS)
    near, far = (evaluation.distances(Painter(scale), 20) for scale in (1.0, 0.1))
    for metric in OFFLINE_METRICS:
        assert 0 < near[metric].value < far[metric].value / 2
    assert near["random-fid"].spread > 0
    assert near["fd-effnet"].spread == 0


def test_distances_random_fid_agrees(colors, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 7)
    found = Evaluation(colors, ["random-fid"]).distances(Painter(), 12, seed=5)
    z = torch.randn([12, 3], generator=torch.Generator().manual_seed(5))
    fake = Painter()(z, z[:, :0], noise_mode="const").mul(127.5).add(127.5).round() / 127.5 - 1
    real = torch.stack([torch.from_numpy(colors[i][0]) for i in range(20)]) / 127.5 - 1
    values = []
    for seed in (0, 1, 2):
        sides = FeatureStatistics(), FeatureStatistics()
        for side, img in zip(sides, (real, fake.detach())):
            side.add(RandomFeatures(seed)(img))
        values.append(sides[0].distance(sides[1]))
    mean, spread = sum(values) / 3, torch.tensor(values).std().item()
    assert found == {
        "random-fid": MetricValue(pytest.approx(mean, rel=1e-4), pytest.approx(spread, rel=1e-3))
    }


def test_distances_depend_on_seed(colors):
    evaluation = Evaluation(colors, ["random-fid"])
    first, again, other = (evaluation.distances(Painter(), 8, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["random-fid"].value != other["random-fid"].value


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_distances_refuse_seed_out_of_range(colors, seed):
    with pytest.raises(ConfigError, match=f"seed {seed}: must be 0 to 4294967295"):
        Evaluation(colors, ["random-fid"]).distances(Painter(), 8, seed)


def test_evaluation_progress(colors):
    seen = []
    evaluation = Evaluation(colors, ["random-fid"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 20), (20, 20)]
    seen.clear()
    evaluation.distances(Painter(), 17, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 17), (17, 17)]


def test_evaluation_wrong_requests(colors):
    with pytest.raises(ConfigError, match=r"unknown metric \(fd\). Choose from random-fid, fd-effnet"):
        Evaluation(colors, ["fd"])
    with pytest.raises(ConfigError, match="a distance needs at least 2 generated images"):
        Evaluation(colors, ["random-fid"]).distances(Painter(), 1)
    with pytest.raises(CheckpointError, match="A generated image has non-finite values"):
        Evaluation(colors, ["random-fid"]).distances(Painter(float("nan")), 4)


def test_real_images_names_all_that_training_refuses(tmp_path):
    G = Generator(z_dim=4, c_dim=0, w_dim=4, img_resolution=16, img_channels=3, channel_base=64)
    for i in range(2):
        pixels = np.full((16, 16), 4000 + i, np.uint16)  # of a device with 12 bits: nearly black
        Image.fromarray(pixels).save(tmp_path / f"deep{i}.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="3 of 3 images cannot be used") as caught:
        evaluate.real_images(G, tmp_path)
    assert "no value above 4095 (12 bits): 2 (deep0.png, deep1.png)" in str(caught.value)
    assert "text.png: is no image" in str(caught.value)


class TestTheOtherMetrics:
    """Those of torch-fidelity, in features that need no download."""

    WHICH = ("fd-effnet", "kid-effnet", "prc-effnet", "random-fid")

    def test_distances_of_set_to_itself(self):
        features = torch.randn(40, 8)
        assert evaluate.precision_recall(features, features) == (1.0, 1.0)
        assert abs(evaluate.kid(features, features).value) < 0.5 * evaluate.kid(features, features + 1).value

    def test_kid_agrees_with_its_definition(self):
        a, b = torch.randn(30, 5).double(), torch.randn(30, 5).double() * 1.5
        kernel = lambda x, y: (x @ y.T / 5 + 1) ** 3  # noqa: E731
        xx, yy, xy = kernel(a, a), kernel(b, b), kernel(a, b)
        off = lambda k: (k.sum() - k.trace()) / (30 * 29)  # noqa: E731
        expected = float(off(xx) + off(yy) - 2 * xy.mean())
        assert evaluate.kid(a, b).value == pytest.approx(expected, rel=1e-9)

    def test_precision_and_recall_agree_with_their_definition(self):
        real, fake = torch.randn(30, 3), torch.randn(25, 3) * 0.5

        def inside(x, manifold):
            radius = torch.cdist(manifold, manifold).sort(dim=1).values[:, 3]
            return float((torch.cdist(x, manifold) <= radius).any(dim=1).float().mean())

        expected = (inside(fake, real), inside(real, fake))
        assert evaluate.precision_recall(fake, real) == pytest.approx(expected)
        assert expected[0] > expected[1]

    def test_distances_independent_of_batch_and_workers(self, colors):
        first = Evaluation(colors, self.WHICH, batch=16).distances(Painter(), 18)
        other = Evaluation(colors, self.WHICH, batch=5, workers=2).distances(Painter(), 18)
        assert {"precision-effnet", "recall-effnet", "kid-effnet"} <= first.keys()
        for name, each in first.items():
            assert other[name].value == pytest.approx(each.value, rel=1e-3, abs=1e-5), name

    def test_path_length_grows_with_step(self, colors):
        evaluation = Evaluation(colors, ["ppl-effnet"])
        slow, fast = (evaluation.distances(Mapped(scale), 12)["ppl-effnet"] for scale in (0.05, 0.2))
        assert 0 < slow.value < fast.value / 2 and fast.spread > 0
        assert evaluation.distances(Mapped(0.2), 12)["ppl-effnet"] == fast

    def test_evaluation_caches_real_statistics(self, colors, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
        first = Evaluation(colors, self.WHICH, cache=True).distances(Painter(), 6)
        files = sorted((tmp_path / "metrics").iterdir())
        assert len(files) == 4

        def unread(*args):
            raise AssertionError("the images are read again")

        with monkeypatch.context() as patch:
            patch.setattr(ImageSet, "_read", unread)
            assert Evaluation(colors, self.WHICH, cache=True).distances(Painter(), 6) == first
        files[0].write_bytes(files[0].read_bytes()[:50])
        assert Evaluation(colors, self.WHICH, cache=True).distances(Painter(), 6) == first
        other = ImageSet(colors.path, resolution=16, channels=3, mirror=True)
        Evaluation(other, ["random-fid"], cache=True)
        assert len(list((tmp_path / "metrics").iterdir())) == 7

    def test_inception_weights_are_verified(self, colors, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
        monkeypatch.setenv("FINETUNE_OFFLINE", "1")
        with pytest.raises(WeightsMissing, match="pytorch-fid-inception is not on this machine"):
            Evaluation(colors, ["fid"])
        (tmp_path / "w.pth").write_bytes(b"x")
        with pytest.raises(ConfigError, match=r"w\.pth: its sha256 is .*numbers are comparable only"):
            Evaluation(colors, ["kid"], inception=tmp_path / "w.pth")
        with pytest.raises(ConfigError, match="no such file"):
            Evaluation(colors, ["prc"], inception=tmp_path / "absent.pth")

    @pytest.mark.slow
    def test_inception_of_torch_fidelity(self, colors, tmp_path, monkeypatch):
        """With weights of its own shape, random: the real ones are not in any package."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

        monkeypatch.setattr(Network, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "w.pth")
        monkeypatch.setattr(evaluate, "inception_weights", lambda given, on_message: tmp_path / "w.pth")
        gray = ImageSet(colors.path, resolution=16, channels=1)
        found = Evaluation(gray, ["fid"], batch=10)._real["inception"].statistics
        assert found.mean.shape == (2048,) and bool(torch.isfinite(found.covariance).all())


class TestSeveralProcesses:
    """Threads stand for processes, and one list for torch.distributed's exchange."""

    WHICH = ("fd-effnet", "kid-effnet", "prc-effnet", "random-fid")

    @pytest.fixture
    def run(self, monkeypatch):
        def run(world, call):
            box, barrier, number = [None] * world, threading.Barrier(world, timeout=60), threading.local()

            def exchange(found, mine, group):
                box[number.rank] = mine
                barrier.wait()
                found[:] = box
                barrier.wait()

            monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)

            def one(rank):
                number.rank = rank
                try:
                    return call(ProcessGroup(rank, world))
                except FinetuneError as error:
                    return error

            with ThreadPoolExecutor(world) as pool:
                return list(pool.map(one, range(world)))

        return run

    def test_distances_of_ranks_equal_one(self, colors, run, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
        alone = Evaluation(colors, self.WHICH, batch=4).distances(Painter(), 18)
        seen = []

        def together(group):
            counted = []
            evaluation = Evaluation(colors, self.WHICH, batch=4, group=group, cache=True)
            found = evaluation.distances(Painter(), 18, progress=lambda *numbers: counted.append(numbers))
            seen.append(counted)
            return found

        assert run(3, together) == [alone] * 3  # the last batches are not whole, one is empty
        assert seen[0] == [(12, 18), (18, 18)]
        assert len(list((tmp_path / "metrics").iterdir())) == 4

    def test_evaluation_only_rank_0_keeps_statistics(self, colors, run):
        sides = run(2, lambda group: Evaluation(colors, ["fd-effnet"], batch=4, group=group)._real)
        assert [side["effnet"].statistics.count for side in sides] == [20, 0]

    def test_path_lengths_split_over_ranks(self, colors, run):
        alone = Evaluation(colors, ["ppl-effnet"], batch=4).distances(Mapped(0.2), 10)

        def call(group):
            side = Evaluation(colors, ["ppl-effnet"], batch=4, group=group)
            return side.distances(Mapped(0.2), 10)

        assert run(2, call) == [alone] * 2

    def test_evaluation_failure_reaches_all_ranks(self, colors, run):
        class Broken(Painter):
            def forward(self, z, c, noise_mode="random"):
                raise RuntimeError("out of memory")

        def call(group):
            G = Broken() if group.rank == 1 else Painter()
            return Evaluation(colors, ["random-fid"], batch=4, group=group).distances(G, 10)

        for error in run(2, call):
            assert str(error) == "a batch of images failed on rank 1: out of memory"
        few = run(2, lambda group: Evaluation(colors, ["prc-effnet"], group=group).distances(Painter(), 2))
        assert {str(error) for error in few} == {
            "precision and recall need more than 3 real and generated images. Use a larger --num or data set."
        }


class TestWhatNetworksThereAre:
    """Gray, color, alpha; with labels and without."""

    @pytest.mark.parametrize("channels, num_classes", [(1, 2), (3, 0), (4, 2)])
    def test_evaluation_all_metrics(self, channels, num_classes, tmp_path):
        labels = [[f"{i}.png", i % 2] for i in range(8)]
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        for i in range(8):
            Image.new("RGBA", (16, 16), (30 * i, 9, 9, 255 - 20 * i)).save(tmp_path / f"{i}.png")

        class G(torch.nn.Module):
            z_dim, w_dim, num_ws, c_dim = channels, channels, 2, num_classes
            seen: ClassVar = []

            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(()))

            def mapping(self, z, c):
                self.seen.append(c)
                return (z + c.sum(dim=1, keepdim=True))[:, None].expand(-1, 2, -1)

            def synthesis(self, ws, noise_mode):
                return torch.tanh(ws[:, 0] * self.scale)[:, :, None, None].expand(-1, -1, 16, 16)

            def forward(self, z, c, noise_mode):
                return self.synthesis(self.mapping(z, c), noise_mode)

        images = ImageSet(tmp_path, resolution=16, channels=channels, use_labels=num_classes > 0)
        found = Evaluation(images, ["fd-effnet", "prc-effnet", "ppl-effnet"]).distances(G(), 8)
        assert found.keys() == {"fd-effnet", "precision-effnet", "recall-effnet", "ppl-effnet"}
        assert found["fd-effnet"].value > 0 and found["ppl-effnet"].value > 0
        labels, ends = G.seen[0], G.seen[1:]
        assert len(ends) == 2 and torch.equal(*ends)  # a path begins and ends in one class
        assert labels.shape == (8, num_classes) and labels.sum() == (8 if num_classes else 0)

    def test_evaluation_refuses_one_image(self, tmp_path):
        Image.new("RGB", (16, 16)).save(tmp_path / "only.png")
        with pytest.raises(ConfigError, match=r"one image, and a distance needs at least 2"):
            Evaluation(ImageSet(tmp_path, resolution=16, channels=3, mirror=True), ["random-fid"])
        Image.new("RGB", (16, 16), "red").save(tmp_path / "second.png")
        with pytest.raises(ConfigError, match=r"need more than 3 real and generated images"):
            Evaluation(ImageSet(tmp_path, resolution=16, channels=3), ["prc-effnet"])

    def test_evaluation_missing_weights_name_metric(self, colors, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_OFFLINE", "1")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(
            WeightsMissing, match=r"^ppl: no weights for it: .*\n.*ppl-effnet needs no download"
        ):
            Evaluation(colors, ["ppl"])
