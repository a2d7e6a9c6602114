from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune import sampling
from finetune.errors import CheckpointError, ConfigError
from finetune.sampling import (
    generate,
    image_grid,
    label_from_class,
    near_square,
    run_network_chunked,
    save_grid,
    to_uint8,
    z_from_seeds,
)


@pytest.fixture(scope="module")
def G(golden_dir):  # noqa: N802
    return finetune.load(golden_dir / "stylegan2-32.pkl").G_ema


@pytest.fixture(scope="module")
def conditional(golden_dir):
    return finetune.load(golden_dir / "stylegan2-64-cond.pkl").G_ema


@pytest.fixture(scope="module")
def stylegan3(golden_dir):
    return finetune.load(golden_dir / "stylegan3-t-32.pkl").G_ema


def test_z_from_seeds_convention():
    z = z_from_seeds([7, 0, 7], 5)
    assert z.shape == (3, 5) and z.dtype == torch.float32
    expected = np.random.RandomState(7).randn(1, 5)[0].astype(np.float32)
    np.testing.assert_array_equal(z[0].numpy(), expected)
    assert torch.equal(z[0], z[2]) and not torch.equal(z[0], z[1])
    assert z_from_seeds([], 5).shape == (0, 5)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_z_from_seeds_refuses_out_of_range(seed):
    with pytest.raises(ConfigError, match=f"seed {seed}: must be 0 to"):
        z_from_seeds([0, seed], 4)


def test_labels(G, conditional):
    label = label_from_class(conditional, 3, 2)
    assert label.shape == (2, 5) and label.argmax(1).tolist() == [3, 3] and label.sum() == 2
    assert label_from_class(G, None, 2).shape == (2, 0)


@pytest.mark.parametrize(
    ("network", "class_index", "message"),
    [
        ("conditional", None, r"5 classes. Choose one from 0 to 4"),
        ("conditional", 5, r"--class 5: must be 0 to 4"),
        ("conditional", -1, r"--class -1: must be 0 to 4"),
        ("G", 0, r"--class 0: this network has no classes"),
    ],
)
def test_label_from_class_errors(request, network, class_index, message):
    with pytest.raises(ConfigError, match=message):
        next(generate(request.getfixturevalue(network), [0], class_index=class_index))


def test_to_uint8_inverts_images_to_float():
    steps = torch.arange(256, dtype=torch.uint8)
    img = (steps.float() / 127.5 - 1).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_uint8(img)[0, :, :, 0].reshape(-1), steps.numpy())
    outside = torch.tensor([-5.0, 5.0]).reshape(1, 1, 1, 2)
    assert to_uint8(outside).reshape(-1).tolist() == [0, 255]
    assert to_uint8(torch.zeros(3, 2, 4)).shape == (2, 4, 3)


def test_generate_equals_network_output(G):
    ((seed, image),) = generate(G, [42], truncation_psi=0.7, truncation_cutoff=2)
    z = z_from_seeds([42], G.z_dim)
    with torch.no_grad():
        img = G(z, torch.zeros([1, 0]), truncation_psi=0.7, truncation_cutoff=2, noise_mode="const")
    assert seed == 42 and image.dtype == np.uint8 and image.shape == (32, 32, 3)
    np.testing.assert_array_equal(image, to_uint8(img)[0])


@pytest.mark.parametrize("noise_mode", sampling.NOISE_MODES)
def test_generate_seed_independent_of_others(G, noise_mode):
    """Neither other seeds, their order, nor the random state change it."""
    torch.manual_seed(1)
    first = dict(generate(G, [3, 1, 2], noise_mode=noise_mode))
    torch.manual_seed(2)
    for seed, image in generate(G, [2, 3], noise_mode=noise_mode):
        np.testing.assert_array_equal(image, first[seed])
    assert not np.array_equal(first[1], first[2])


def test_generate_options_change_image(G):
    plain = dict(generate(G, [0]))[0]
    for options in ({"noise_mode": "random"}, {"noise_mode": "none"}, {"truncation_psi": 0.5}):
        assert not np.array_equal(dict(generate(G, [0], **options))[0], plain), options


def test_generate_class_changes_image(conditional):
    images = [next(generate(conditional, [0], class_index=index))[1] for index in (0, 1)]
    assert not np.array_equal(*images)


def test_generate_keeps_random_state(G):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(generate(G, [0, 1], noise_mode="random"))
    assert torch.equal(torch.rand(3), expected)


def test_generate_stylegan3_options(stylegan3):
    images = [next(generate(stylegan3, [0], noise_mode=mode))[1] for mode in sampling.NOISE_MODES]
    assert all(np.array_equal(images[0], other) for other in images[1:])


def test_generate_progress_and_no_gradients(G):
    seen = []
    trainable = copy.deepcopy(G).requires_grad_(True)
    list(generate(trainable, [4, 5], progress=lambda *numbers: seen.append(numbers)))
    assert seen == [(1, 2), (2, 2)]
    assert torch.is_grad_enabled()


def test_generate_refuses_noise_mode(G):
    with pytest.raises(ConfigError, match="--noise-mode loud: must be one of const, random, none"):
        next(generate(G, [0], noise_mode="loud"))


def test_generate_refuses_non_finite_output(G):
    broken = copy.deepcopy(G)
    with torch.no_grad():
        broken.synthesis.b32.torgb.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="seed 8: the image has non-finite values"):
        next(generate(broken, [8]))


def test_run_network_chunked_independent_of_chunk(conditional):
    z, c = z_from_seeds(range(5), conditional.z_dim), label_from_class(conditional, 2, 5)
    whole = run_network_chunked(conditional, z, c, chunk=5, noise_mode="const")
    parts = run_network_chunked(conditional, z, c, chunk=2, noise_mode="const")
    assert whole.shape == (5, 3, 64, 64) and not parts.requires_grad
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_image_grid_channels(channels, mode):
    images = [np.full([2, 3, channels], 10 * i, dtype=np.uint8) for i in range(1, 6)]
    sheet = image_grid(images, columns=2)
    assert sheet.mode == mode and sheet.size == (6, 6)
    array = np.asarray(sheet).reshape(6, 6, channels)
    assert [int(array[y, x, 0]) for y in (0, 2, 4) for x in (0, 3)] == [10, 20, 30, 40, 50, 0]


def test_image_grid_width():
    images = [np.full([2, 2, 3], i, dtype=np.uint8) for i in range(3)]
    assert image_grid(images, columns=10**9).size == (6, 2)


def test_image_grid_errors(tmp_path):
    with pytest.raises(ConfigError, match="2 image channels"):
        image_grid([np.zeros([2, 2, 2], dtype=np.uint8)], 1)
    with pytest.raises(ConfigError, match="at least one image"):
        image_grid([], 1)


def test_save_grid_takes_tensors_and_arrays(tmp_path):
    floats = torch.linspace(-1, 1, 7 * 3 * 4 * 4).reshape(7, 3, 4, 4)
    arrays = list(to_uint8(floats))
    bytes_ = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)
    sheets = []
    for index, images in enumerate((floats, bytes_, arrays)):
        path = save_grid(images, tmp_path / "new" / f"{index}.png", grid=(3, 2))
        with Image.open(path) as sheet:
            assert sheet.size == (12, 8)
            sheets.append(np.asarray(sheet))
    assert np.array_equal(sheets[0], sheets[1]) and np.array_equal(sheets[0], sheets[2])
    np.testing.assert_array_equal(sheets[0][4:8, 8:12], arrays[5])
    with Image.open(save_grid(floats, tmp_path / "square.png")) as sheet:
        assert sheet.size == (12, 12)


def test_near_square():
    assert [near_square(n) for n in (1, 2, 4, 5, 9, 10)] == [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_devices(golden_dir, device):
    """Const noise gives the same image on every device up to rounding; random noise repeats on each."""
    G = finetune.load(golden_dir / "stylegan2-32.pkl", device=device).G_ema
    images = [next(generate(G, [0], noise_mode="random"))[1] for _ in range(2)]
    assert np.array_equal(*images)
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    next(generate(G, [0], noise_mode="random"))
    after = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(state, after)
