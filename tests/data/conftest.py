"""Small images as bytes, and folders and zips of them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def image_bytes(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    """Encode an image, or an array, in memory."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels of a shape such as (height, width, 3)."""
    return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


@pytest.fixture(name="encode")
def encode_fixture():
    return image_bytes


@pytest.fixture(name="noise")
def noise_fixture():
    return noise


@pytest.fixture
def write_set(tmp_path):
    """Call with name -> bytes or JSON content to get a folder, or a zip where the set's name ends in .zip."""

    def write(files: dict, name: str = "set") -> Path:
        path = tmp_path / name
        encoded = {
            key: value if isinstance(value, bytes) else json.dumps(value).encode()
            for key, value in files.items()
        }
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for key, value in encoded.items():
                    archive.writestr(key, value)
            return path
        path.mkdir(parents=True, exist_ok=True)
        for key, value in encoded.items():
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            (path / key).write_bytes(value)
        return path

    return write


@pytest.fixture
def eight(write_set):
    """Eight random 8×8 images `a/0.png` … `b/7.png` of three classes: a folder or (kind=".zip") a zip."""

    def write(kind: str = "", labels: bool = True) -> Path:
        files: dict = {f"{'ab'[i // 4]}/{i}.png": image_bytes(noise(8, 8, 3, seed=i)) for i in range(8)}
        if labels:
            files["dataset.json"] = {"labels": [[name, i % 3] for i, name in enumerate(list(files))]}
        return write_set(files, f"eight{kind}")

    return write
