"""Make the two data sets of the demo: the same faces, shaded (Fluent 3D) and flat (Twemoji).

    npm pack @lobehub/fluent-emoji-3d@1.1.0      # unpack the .tgz into a folder: its `package` is FLUENT
    npm pack emoji-datasource-twitter@16.0.0     # likewise: its `package` is TWEMOJI
    python finetune/demo/make_sets.py FLUENT TWEMOJI finetune/demo

writes `faces-3d.zip` and `faces-flat.zip`. One image is one code point in both sets, under the same name; a
round face covers the same 56 of 64 pixels in both, so that what differs between the sets is the style and not
the place. A second run writes the same bytes (elsewhere they may differ with the zlib that Pillow was built
with, the pixels do not). Authors and licenses: ATTRIBUTION.md.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

from PIL import Image

SIZE = 64  # width and height of an image, in pixels
TWEMOJI_SIZE = 56  # Twemoji draws to the edge of the image; Fluent leaves 4 of 64 pixels free on each side

FACES = {
    "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
    "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative", "face-costume", "cat-face",
    "monkey-face", "person",
}  # fmt: skip
HEADS = {
    "monkey_face", "dog", "wolf", "fox_face", "raccoon", "cat", "lion_face", "tiger", "cow", "pig", "mouse",
    "hamster", "rabbit", "bear", "polar_bear", "koala", "panda_face", "frog", "hatched_chick", "octopus",
    "new_moon_with_face", "full_moon_with_face", "sun_with_face", "jack_o_lantern",
    "person_with_crown", "prince", "princess", "man_with_turban", "man-wearing-turban",
    "woman-wearing-turban", "person_with_headscarf", "angel", "santa", "mrs_claus", "mx_claus", "vampire",
    "male_vampire", "female_vampire", "elf", "male_elf", "female_elf", "cop", "male-police-officer",
    "female-police-officer", "guardsman", "male-guard", "female-guard", "student", "male-student",
    "female-student", "cook", "male-cook", "female-cook", "pilot", "male-pilot", "female-pilot",
    "firefighter", "male-firefighter", "female-firefighter", "construction_worker",
    "male-construction-worker", "female-construction-worker",
}  # fmt: skip
LEFT_OUT = {"face_in_clouds", "dotted_line_face", "skull_and_crossbones", "shaking_face"}  # hardly a head


def chosen(emoji: list[dict]) -> list[dict]:
    """Return the entries of `emoji.json` that show a face from the front, in Unicode's order."""
    picked = [
        entry
        for entry in emoji
        if (entry["subcategory"] in FACES or entry["short_name"] in HEADS)
        and entry["short_name"] not in LEFT_OUT
    ]
    return sorted(picked, key=lambda entry: entry["sort_order"])


def fluent_file(folder: Path, entry: dict) -> Path | None:
    """Return the Fluent image of an entry: named by its code points, with or without variation selector."""
    for codes in (entry["unified"], entry["non_qualified"]):
        if codes and (path := folder / "assets" / f"{codes.lower()}.webp").is_file():
            return path
    return None


def on_white(path: Path, size: int) -> Image.Image:
    """Return the image on white, `size` pixels wide and high, centered on a white square of SIZE."""
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    small = Image.alpha_composite(white, rgba).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(small, ((SIZE - size) // 2, (SIZE - size) // 2))
    return square


def write_zip(path: Path, images: dict[str, Image.Image]) -> None:
    """Write the images as PNG into an uncompressed zip with fixed dates, in the order of their names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, image in sorted(images.items()):
            data = io.BytesIO()
            image.save(data, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the two image sets of the demo.")
    parser.add_argument("fluent", type=Path, help="the unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("twemoji", type=Path, help="the unpacked npm package emoji-datasource-twitter")
    parser.add_argument("outdir", type=Path, help="where the two zip files go")
    options = parser.parse_args()

    shaded, flat = {}, {}
    for entry in chosen(json.loads((options.twemoji / "emoji.json").read_text())):
        source = fluent_file(options.fluent, entry)
        target = options.twemoji / "img" / "twitter" / "64" / entry["image"]
        if source is None or not target.is_file():
            print(f"left out, not in both packages: {entry['short_name']}")
            continue
        name = f"{entry['unified'].lower()}.png"
        shaded[name] = on_white(source, SIZE)
        flat[name] = on_white(target, TWEMOJI_SIZE)
    for name, images in (("faces-3d.zip", shaded), ("faces-flat.zip", flat)):
        write_zip(options.outdir / name, images)
        print(f"{name}: {len(images)} images, {(options.outdir / name).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
