"""The page of a generator in a headless Chromium, and how it is written."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import finetune
from finetune.cli import cli
from finetune.directions import principal_directions
from finetune.errors import ConfigError
from finetune.export import web_runtime
from finetune.export.onnx import MIN_TORCH
from finetune.export.web import write_page
from finetune.sampling import to_uint8, z_from_seeds

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "finetune" / "demo" / "faces-3d-64.pkl"
FEW = {name: b"content of " + name.encode() for name in web_runtime.FILES}


# ---- The files of onnxruntime-web


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FINETUNE_OFFLINE", raising=False)
    hashes = {name: web_runtime._sha256(content) for name, content in FEW.items()}
    monkeypatch.setattr(web_runtime, "FILES", hashes)
    return tmp_path / "cache"


def fake_npm(monkeypatch, contents, error=None):
    """Let `npm pack` write an archive of `contents`, or fail with `error`; return its calls."""
    calls = []

    def run(command, *, cwd, **kwargs):
        calls.append(command)
        if error:
            raise subprocess.CalledProcessError(1, command, stderr=error)
        with tarfile.open(Path(cwd) / "x.tgz", "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"package/dist/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    monkeypatch.setattr(web_runtime.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(web_runtime.subprocess, "run", run)
    return calls


def test_runtime_is_fetched_once(cache, monkeypatch):
    calls = fake_npm(monkeypatch, {**FEW, "other.js": b""})
    for _ in range(2):
        found = web_runtime.runtime_files()
        assert {name: path.read_bytes() for name, path in found.items()} == FEW
    assert len(calls) == 1 and f"onnxruntime-web@{web_runtime.VERSION}" in calls[0]
    next(iter(found.values())).write_bytes(b"damaged")
    assert web_runtime.runtime_files() == found and len(calls) == 2
    assert {name: path.read_bytes() for name, path in found.items()} == FEW


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        (
            {**FEW, "ort.wasm.min.mjs": b"x"},
            None,
            r"onnxruntime-web \S+: ort.wasm.min.mjs has the SHA-256 2d711",
        ),
        ({}, None, r"not fetched by npm \(.*not found"),
        (
            {},
            "npm error code E404\nnpm error 404",
            r"not fetched by npm \(npm error code E404\)",
        ),
    ],
)
def test_runtime_refuses_other_files(cache, monkeypatch, contents, error, message):
    fake_npm(monkeypatch, contents, error)
    with pytest.raises(ConfigError, match=message) as caught:
        web_runtime.runtime_files()
    assert "give it as --runtime DIR" in str(caught.value)
    assert not list(cache.rglob("*.mjs"))


def test_runtime_without_npm_or_network(cache, monkeypatch):
    monkeypatch.setattr(web_runtime.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="and npm is not installed"):
        web_runtime.runtime_files()
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    with pytest.raises(ConfigError, match="FINETUNE_OFFLINE forbids fetching it"):
        web_runtime.runtime_files()


def test_runtime_of_folder(cache, tmp_path):
    for name, content in list(FEW.items())[1:]:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"lacks {next(iter(FEW))}.")):
        web_runtime.runtime_files(tmp_path)
    (tmp_path / next(iter(FEW))).write_bytes(b"another version")
    assert set(web_runtime.runtime_files(tmp_path)) == set(FEW)


# ---- Arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "full"], "full: exists. Move it, write elsewhere, or use --force"),
        (["--out", "full/file", "--force"], "full/file: this is a file"),
        (["--out", "new", "--half"], "web with --half: needs float32 weights. Use one of safetensors, "),
        (["--out", "new", "--which", "D"], "--which D: a page has one generator. Use G_ema or G."),
        pytest.param(
            ["--out", "new", "--runtime", "full"],
            "--runtime full: lacks ort.wasm.min.mjs",
            marks=pytest.mark.skipif(torch.__version__ < MIN_TORCH, reason=f"needs torch {MIN_TORCH}"),
        ),
        (
            ["--out", "x.pkl", "--format", "stylegan-pkl", "--original", "{source}"],
            "no effect without --format web",
        ),
    ],
)
def test_web_export_errors(golden_dir, tmp_path, monkeypatch, args, message):
    source = golden_dir / "stylegan2-32.pkl"
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    args = [
        "export",
        "--network",
        str(source),
        "--format",
        "web",
        *(arg.format(source=source) for arg in args),
    ]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2 and message in result.output, result.output
    assert sorted(map(str, Path().rglob("*"))) == ["full", "full/file"]


# ---- In a browser


def torch_image(G, seed, *, psi=1.0, label=0, target=None, mix=0.0, pc1=0.0):
    """Return the image that the page has to show, uint8 [H, W, C]."""
    c = torch.zeros([1, G.c_dim])
    if G.c_dim:
        c[0, label] = 1
    with torch.no_grad():
        ws = G.mapping(z_from_seeds([seed], G.z_dim), c, truncation_psi=psi)
        if target is not None:
            ws = ws.lerp(G.mapping(z_from_seeds([target], G.z_dim), c, truncation_psi=psi), mix)
        return to_uint8(G.synthesis(ws + pc1, noise_mode="const"))[0]


def shown(driver, channels=3):
    """Return the pixels of the canvas, uint8 [H, W, C]."""
    pixels = driver.execute_script(
        "const c = document.getElementById('image');"
        "return [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];"
    )
    return np.array(pixels[2:], np.uint8).reshape(*pixels[:2], 4)[:, :, :channels]


def difference(a, b):
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.fixture(scope="module")
def runtime():
    if torch.__version__ < MIN_TORCH:
        pytest.skip(f"needs torch {MIN_TORCH}")
    try:
        return next(iter(web_runtime.runtime_files().values())).parent
    except ConfigError as error:
        pytest.skip(f"{error.what}")


@pytest.fixture(scope="module")
def pair():
    """The bundled checkpoint, and one with other weights as fine-tuning would give it."""
    first = finetune.load(DEMO)
    G = copy.deepcopy(first.G_ema)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in G.parameters():
            parameter.add_(
                0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
            )
    return dataclasses.replace(first, G_ema=G), first


@pytest.fixture(scope="module")
def page(browser, runtime, pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "page"
    written = write_page(folder, pair[0], original=pair[1], runtime=runtime)
    assert written.num_images == 8 and written.max_difference < 1e-4
    with browser.serve(folder) as address:
        yield folder, address


@pytest.mark.browser
def test_page_images_equal_torch(browser, page, pair):
    tuned, first = (checkpoint.G_ema for checkpoint in pair)
    middle = copy.deepcopy(tuned)
    for ours, theirs in zip(middle.state_dict().values(), first.state_dict().values()):
        ours.lerp_(theirs, 0.5)
    directions = principal_directions(tuned, 1)
    with browser.chromium() as driver:
        assert re.fullmatch(r"WebAssembly, \d+ ms per image", browser.open_page(driver, page[1]))
        assert difference(shown(driver), torch_image(tuned, 0)) <= 1
        for alpha, G in ((0, first), (0.5, middle), (1, tuned)):
            browser.set_controls(driver, seed=7, psi=0.7, alpha=alpha)
            assert difference(shown(driver), torch_image(G, 7, psi=0.7)) <= 1, alpha
        browser.set_controls(driver, seed=2**32 - 1, psi=1, target=3, mix=0.25, pc1=-1.5)
        edit = -1.5 * directions.std[0] * directions.vectors[0]
        assert difference(shown(driver), torch_image(tuned, 2**32 - 1, target=3, mix=0.25, pc1=edit)) <= 1
        requested = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert len(requested) > 5 and all(name.startswith((page[1], "blob:", "data:")) for name in requested)
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_page_controls_by_keyboard(browser, page, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with browser.chromium(downloads=tmp_path) as driver:
        browser.open_page(driver, page[1])
        reached = []
        for _ in range(15):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            reached.append(driver.switch_to.active_element.get_attribute("id"))
        pcs = [f"pc{i}" for i in range(1, 7)]
        assert reached == [
            *("seed", "random", "psi", "alpha", "target", "play", "mix"), *pcs, "defaults", "save"
        ]  # fmt: skip
        value = {key: lambda key=key: driver.find_element("id", key).get_property("value") for key in reached}

        driver.find_element("id", "random").send_keys(Keys.ENTER)
        driver.find_element("id", "alpha").send_keys(Keys.ARROW_LEFT)
        driver.find_element("id", "pc2").send_keys(Keys.ARROW_RIGHT)
        assert value["seed"]() != "0" and value["alpha"]() == "0.99" and value["pc2"]() == "0.1"
        driver.find_element("id", "defaults").send_keys(Keys.SPACE)
        assert (value["seed"](), value["alpha"](), value["pc2"]()) == ("0", "1", "0")

        browser.set_controls(driver, seed=5)
        driver.find_element("id", "save").send_keys(Keys.ENTER)
        saved = tmp_path / "seed0005.png"
        for _ in range(100):
            if saved.exists():
                break
            time.sleep(0.1)
        assert np.array_equal(np.asarray(Image.open(saved).convert("RGB")), shown(driver))

        driver.find_element("id", "play").send_keys(Keys.ENTER)
        time.sleep(3)
        driver.find_element("id", "play").send_keys(Keys.ENTER)
        assert value["mix"]() != "0" or value["seed"]() != "5"
        assert driver.find_element("id", "play").text == "Play"
        time.sleep(1)
        before = shown(driver)
        time.sleep(0.5)
        assert np.array_equal(shown(driver), before)
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_page_on_phone(browser, page):
    with browser.chromium(phone=True) as driver:
        browser.open_page(driver, page[1])
        width, content = driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert width == 360 and content <= width
        heights = driver.execute_script(
            "return [...document.querySelectorAll('input, button')].map(e => e.offsetHeight)"
        )
        assert min(heights) >= 40  # pixels, for fingers
        unnamed = (
            "return [...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length"
        )
        assert driver.execute_script(unnamed) == 0


@pytest.mark.browser
def test_page_with_classes(browser, runtime, golden_dir, tmp_path):
    checkpoint = finetune.load(golden_dir / "stylegan2-64-cond.pkl")
    write_page(tmp_path, checkpoint, runtime=runtime)
    with browser.serve(tmp_path) as address, browser.chromium() as driver:
        browser.open_page(driver, address)
        assert driver.find_element("id", "class").is_displayed()
        assert not driver.find_element("id", "alpha").is_displayed()
        browser.set_controls(driver, seed=4, **{"class": 3})
        assert difference(shown(driver), torch_image(checkpoint.G_ema, 4, label=3)) <= 1


@pytest.mark.browser
def test_page_states_what_is_wrong(browser, page):
    folder, address = page
    (folder / "mapping.onnx").rename(folder / "hidden")
    try:
        with browser.chromium() as driver:
            assert browser.open_page(driver, address).startswith("This page does not work here: ")
            assert driver.find_element("id", "status").get_attribute("role") == "alert"
            status = browser.open_page(driver, (folder / "index.html").as_uri())
            assert "python -m http.server" in status
    finally:
        (folder / "hidden").rename(folder / "mapping.onnx")
