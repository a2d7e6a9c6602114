"""Measure the time to read and decode one image from a folder, from zips, and from `dataset prepare`.

    python benchmarks/bench_load.py --out benchmarks/results/load_<machine>_<yyyymm>.md

The images are random, with the spectrum of photographs (1/f) and a little grain. All forms hold the same
ones (JPEG nearly), and are read in turn through `finetune.data.ImageSet` by one process, so that other
load on the machine affects all equally; the files are in the system's cache. Milliseconds per image, medians.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import _checkout  # noqa: F401
import numpy as np
import torch
from measuring import interleaved, machine, table, write_report
from PIL import Image

from finetune.data import ImageSet
from finetune.data.preparing import prepare

FORMS = (
    "folder of JPEG, quality 95",
    "folder of PNG",
    "deflated zip of PNG",
    "prepared, png",
    "prepared, tiff",
)


def image(side: int, rng: np.random.RandomState) -> Image.Image:
    """Return color noise with the spectrum 1/f^1.2 and a grain of 1.5 of 255."""
    frequency = np.fft.fftfreq(side)
    distance = np.hypot(*np.meshgrid(frequency, frequency))
    distance[0, 0] = np.inf
    amplitude = distance**-1.2
    waves = [np.fft.ifft2(np.fft.fft2(rng.randn(side, side)) * amplitude).real for _ in range(4)]
    channels = [waves[0] + 0.4 * wave for wave in waves[1:]]
    channels = [50 * each / each.std() + 128 + 1.5 * rng.randn(side, side) for each in channels]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def write_forms(folder: Path, side: int, count: int) -> dict[str, Path]:
    """Write the same images in every form; return name of the form -> path."""
    paths = [folder / f"{number}-{side}" for number in range(2)]
    paths += [folder / f"{number}-{side}.zip" for number in range(2, 5)]
    rng = np.random.RandomState(0)
    for path in paths[:2]:
        path.mkdir()
    for number in range(count):
        made = image(side, rng)
        made.save(paths[0] / f"{number:03}.jpg", quality=95)
        made.save(paths[1] / f"{number:03}.png")
    with zipfile.ZipFile(paths[2], "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(paths[1].iterdir()):
            archive.write(path, path.name)
    for path, encoding in zip(paths[3:], ("png", "tiff"), strict=True):
        prepare(paths[1], path, resolution=side, encoding=encoding)
    return dict(zip(FORMS, paths, strict=True))


def size_mib(path: Path) -> float:
    """Return the size of a folder or a file on disk."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="64,256,1024")
    parser.add_argument("--count", type=int, default=16, help="images")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write what was measured to this Markdown file")
    options = parser.parse_args()
    rows = []
    for side in map(int, options.sides.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            forms = write_forms(Path(folder), side, options.count)
            sets = {name: ImageSet(path, resolution=side, channels=3) for name, path in forms.items()}
            calls = {
                name: lambda each=each: [each[i] for i in range(options.count)]  # type: ignore[misc]
                for name, each in sets.items()
            }
            found = interleaved(calls, torch.device("cpu"), options.repeats)
            for name, sec in found.items():
                ms, kib = 1000 * sec / options.count, 1024 * size_mib(forms[name]) / options.count
                rows.append([side, name, f"{ms:.2f}", f"{kib:,.0f}"])
    text = table(["side", "form", "ms an image", "KiB an image"], rows)
    print(text)
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        record = {"machine": machine(torch.device("cpu")), "settings": settings}
        command = "python benchmarks/bench_load.py"
        write_report(options.out, "Reading images", command, [text], record)


if __name__ == "__main__":
    main()
