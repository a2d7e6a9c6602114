"""Make data sets larger than the bundled ones: from two npm packages, and from photographs in classes.

    npm pack @lobehub/fluent-emoji-3d@1.1.0      # unpack the .tgz into a folder: its `package` is FLUENT
    npm pack emoji-datasource-google@16.0.0      # likewise: its `package` is GOOGLE
    python benchmarks/make_sets.py --fluent FLUENT --google GOOGLE --size 32 --out sets

writes `fluent-32.zip` (1,871 images) and `google-32.zip` (1,636): on white, without skin tones, and Noto
without flags, each image once. Names are code points; Noto's categories are its labels (dataset.json). The
same packages and Pillow give the same bytes.

    python benchmarks/make_sets.py --photos PHOTOS.zip --size 64 --out sets

writes the sets of the jobs of `ab_distillation.py` (`PHOTO_SETS`) from a zip whose folders are classes; the
jobs do it by themselves. Licenses: Fluent Emoji, MIT; Noto Emoji's images, Apache-2.0.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path

from PIL import Image

SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
# Sets of photographs: (folders that belong to it, or those that do not; at most so many images).
PHOTO_SETS: dict[str, tuple[tuple[str, ...], bool, int | None]] = {
    "clothing": (("Hat",), False, None),
    "dresses": (("Dress",), True, None),
    "shoes": (("Shoes",), True, None),
    "hats": (("Hat",), True, None),
    "hats-50": (("Hat",), True, 50),
    "hats-10": (("Hat",), True, 10),
}
MARGIN = 1 / 16  # Fluent leaves that much free on each side, Noto hardly anything


def on_white(path: Path, size: int, margin: float = 0.0) -> Image.Image:
    """Return the image on a white square of `size` pixels, with a margin in parts of the size."""
    inner = round(size * (1 - 2 * margin))
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    square = Image.new("RGB", (size, size), "white")
    square.paste(
        flat.resize((inner, inner), Image.Resampling.LANCZOS), ((size - inner) // 2, (size - inner) // 2)
    )
    return square


def write_zip(path: Path, images: dict[str, Image.Image], labels: dict[str, int] | None = None) -> None:
    """Write PNGs, uncompressed and with fixed dates, in the order of their names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)

        for name, image in sorted(images.items()):
            stream = io.BytesIO()
            image.save(stream, "PNG", optimize=True)
            add(name, stream.getvalue())
        if labels:
            add("dataset.json", json.dumps({"labels": sorted(labels.items())}).encode())
    print(f"{path}: {len(images):,} images, {path.stat().st_size / 1e6:.2f} MB")


def fluent(folder: Path, size: int) -> dict[str, Image.Image]:
    """Return every image of the package except skin tone variants."""
    files = sorted((folder / "assets").glob("*.webp"))
    chosen = [path for path in files if not any(tone in path.stem.split("-") for tone in SKIN_TONES)]
    return {f"{path.stem}.png": on_white(path, size) for path in chosen}


def google(folder: Path, size: int) -> tuple[dict[str, Image.Image], dict[str, int]]:
    """Return every entry of `emoji.json` with an image, except flags and skin tone swatches; its category."""
    entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    chosen = [
        entry
        for entry in entries
        if entry["has_img_google"] and entry["category"] not in ("Flags", "Component")
    ]
    categories = sorted({entry["category"] for entry in chosen})
    images = {
        entry["image"]: on_white(folder / "img" / "google" / "64" / entry["image"], size, MARGIN)
        for entry in chosen
    }
    return images, {entry["image"]: categories.index(entry["category"]) for entry in chosen}


def photos(path: Path, name: str, size: int) -> dict[str, Image.Image]:
    """Return the photographs of a set of `PHOTO_SETS`, resized; those of a small set are spread evenly."""
    folders, is_inside, limit = PHOTO_SETS[name]
    with zipfile.ZipFile(path) as archive:
        files = sorted(each for each in archive.namelist() if each.lower().endswith((".jpg", ".png")))
        files = [each for each in files if (each.split("/")[0] in folders) == is_inside]
        if not files:
            raise ValueError(f"{path}: no images for the set {name} (folders {', '.join(folders)}).")
        chosen = files[:: len(files) // limit][:limit] if limit else files
        found = {}
        for each in chosen:
            with archive.open(each) as stream, Image.open(stream) as image:
                square = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
            found[each.replace("/", "-").rpartition(".")[0] + ".png"] = square
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fluent", type=Path, help="the unpacked package @lobehub/fluent-emoji-3d")
    parser.add_argument("--google", type=Path, help="the unpacked package emoji-datasource-google")
    parser.add_argument("--photos", type=Path, help="a zip of photographs, one folder for each class")
    parser.add_argument("--size", type=int, default=64, choices=[16, 32, 64, 128], help="in pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the zips")
    options = parser.parse_args()
    if not (options.fluent or options.google or options.photos):
        sys.exit("name a source with --fluent, --google or --photos.")
    for folder, part in ((options.fluent, "assets"), (options.google, "emoji.json")):
        if folder and not (folder / part).exists():
            sys.exit(f"{folder} is not the unpacked package: it has no {part}.")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.fluent:
        write_zip(options.out / f"fluent-{options.size}.zip", fluent(options.fluent, options.size))
    if options.google:
        write_zip(options.out / f"google-{options.size}.zip", *google(options.google, options.size))
    for name in PHOTO_SETS if options.photos else ():
        images = photos(options.photos, name, options.size)
        write_zip(options.out / f"{name}-{options.size}.zip", images)


if __name__ == "__main__":
    main()
