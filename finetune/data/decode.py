"""Decode images to `uint8 [C, H, W]`: formats, conversion of channels and sizes."""

from __future__ import annotations

import io
import re
import sys
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from finetune.data.problems import CUT_SHORT, NO_RULE, TOO_LARGE, UNREADABLE, WRONG_SIZE, Unusable
from finetune.options import FITS

# Nothing else is tried: for some formats (EPS) Pillow starts other programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "TGA", "AVIF", "JPEG2000")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I")
FORMATS_16_BIT_AS_I = ("PNG", "PPM", "JPEG2000")  # in other formats mode I has 32 bits
ORIENTATION_TAG = 0x0112
BITS_PER_SAMPLE_TAG = 0x0102
DEEP_COLOR = "finetune: 16 bits a channel"  # a key of Image.info
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The margins of `pad`; with alpha they are clear.
MARGIN: dict[str, str | tuple[int, ...]] = {"L": "white", "RGB": "white", "RGBA": (0, 0, 0, 0)}


def images_to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert `uint8` images to float32 in [-1, 1], the range of the networks."""
    return images.to(torch.float32) / 127.5 - 1


def height_and_width(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of `resolution`, which may be the side of a square."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def decode(data: bytes, *, resolution: int | tuple[int, int], channels: int, fit: str | None) -> np.ndarray:
    """Decode one image to `uint8 [channels, height, width]`. Raises Unusable."""
    image = to_channels(open_image(data), channels)
    pixels = np.asarray(fit_to_size(image, height_and_width(resolution), fit))
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def open_image(data: bytes, bits: int = 16) -> Image.Image:
    """Decode the first frame, upright by its EXIF, in a mode that `to_channels` supports.

    bits: how many of the 16 bits a channel of a color image its values use. Raises Unusable.
    """
    Image.init()
    with warnings.catch_warnings():
        # Pillow warns about harmless oddities of metadata; what matters here either fails or is a bomb.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image: Image.Image = _opened(data)
            image.load()
            turn = TURNS.get(_orientation(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            size = re.search(r"\((\d+) pixels\)", str(error))
            seen = f"{int(size[1]):,}" if size else "more"
            raise Unusable(TOO_LARGE, f"{seen} pixels, {Image.MAX_IMAGE_PIXELS:,} are allowed") from None
        except UnidentifiedImageError:
            if _is_cut_short(data):
                raise Unusable(CUT_SHORT, "damaged: not even its header is whole") from None
            raise Unusable(UNREADABLE, _what_else(data)) from None
        except Exception as error:  # the decoders raise nearly every built-in exception on damaged files
            kind = CUT_SHORT if _is_cut_short(data) else UNREADABLE
            raise Unusable(kind, f"damaged: {str(error) or type(error).__name__}") from None
        _check_mode(image)
        deep = not image.mode.startswith("I") and _bits_per_channel(image, data) == 16
        if deep and bits < 16:
            image = _rescaled_color(image, data, bits)
        image = image if turn is None else image.transpose(turn)
        image.info[DEEP_COLOR] = deep
        return image


def to_channels(image: Image.Image, channels: int, bits: int = 16) -> Image.Image:
    """Bring any mode to L (1 channel), RGB (3) or RGBA (4); with fewer than 4, alpha is laid on white.

    Raises Unusable if the values of a 16-bit image take more than `bits`.
    """
    if image.mode.startswith("I"):
        _check_bits(_gray_values(image), bits)
        image = _upper_byte(image, bits)
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK and YCbCr have no direct way to luminance
    wanted = {1: "L", 3: "RGB"}[channels]
    return image if image.mode == wanted else image.convert(wanted)


def fit_to_size(image: Image.Image, size: tuple[int, int], fit: str | None) -> Image.Image:
    """Bring an L, RGB or RGBA image to `size`, (height, width). Raises Unusable if fit is None."""
    height, width = size
    if image.size == (width, height):
        return image
    if fit is None:
        raise Unusable(WRONG_SIZE, f"{image.width}×{image.height}")
    scales = (width / image.width, height / image.height)
    if fit == "pad":
        scale = min(scales)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        padded = Image.new(image.mode, (width, height), MARGIN[image.mode])
        padded.paste(
            _resize(image, inner, (0, 0, *image.size)), ((width - inner[0]) // 2, (height - inner[1]) // 2)
        )
        return padded
    box = (0, 0, *image.size)
    if fit == "crop":
        scale = max(scales)
        inner = (min(image.width, round(width / scale)), min(image.height, round(height / scale)))
        left, top = (image.width - inner[0]) // 2, (image.height - inner[1]) // 2
        box = (left, top, left + inner[0], top + inner[1])
    elif fit != "stretch":
        raise ValueError(f"fit={fit!r} is none of {', '.join(FITS)}")
    return _resize(image, (width, height), box)


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Open an image without decoding its pixels. Raises whatever Pillow does."""
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Resize with Lanczos; an image much too large is first averaged down by a whole factor, for speed."""
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _upper_byte(image: Image.Image, bits: int = 16) -> Image.Image:
    """Convert a 16-bit gray image to L: the upper 8 of its `bits`, as Pillow itself does for 16-bit color."""
    values = _gray_values(image)
    gray = Image.fromarray(_upper_bits(values, bits))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _gray_values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64).clip(0, 65535)


def highest_deep_value(image: Image.Image) -> int | None:
    """Return the highest value in an image of 16 bits a channel, None for others.

    Of 16-bit color Pillow decodes the upper 8 bits only; the lower ones are taken as 255.
    """
    if image.mode.startswith("I"):
        return int(_gray_values(image).max())
    if not is_deep_color(image):
        return None
    extrema = np.reshape(image.getextrema(), (-1, 2))
    return int(extrema[: 1 if image.mode == "LA" else 3, 1].max()) << 8 | 255


def is_deep_color(image: Image.Image) -> bool:
    """Return whether an image that `open_image` gave had 16 bits a channel, of which the upper 8 are left."""
    return bool(image.info.get(DEEP_COLOR))


def _rescaled_color(image: Image.Image, data: bytes, bits: int) -> Image.Image:
    """Return a 16-bit color image with the upper 8 of its `bits`; alpha that takes more keeps its upper 8.

    Pillow decodes the upper byte of each value. The lower one is what it decodes if the bytes are taken to be
    in the other order.
    """
    lower = _opened(data)
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    try:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(image.mode)
        lower.tile = [_in_other_order(tile, other) for tile in lower.tile]
        lower.load()
    except (ValueError, KeyError, OSError):
        raise Unusable(NO_RULE, f"16-bit color in a kind of file that --bits {bits} cannot rescale") from None
    upper = np.asarray(image)
    values = upper.astype(np.int64) << 8 | np.asarray(lower)
    _check_bits(values[:, :, :3], bits)
    scaled = _upper_bits(values, bits)
    if values[:, :, 3:].any() and values[:, :, 3:].max() >> bits:
        scaled[:, :, 3:] = upper[:, :, 3:]
    return Image.fromarray(scaled)


def _in_other_order(tile: Any, other: dict[str, str]) -> Any:
    """Return an entry of `Image.tile` whose raw mode, such as RGB;16B, has the other order of bytes."""
    args = tile[3]
    raw, *rest = [args] if isinstance(args, str) else args
    mode, order = raw.split(";16")
    swapped = f"{mode};16{other[order]}"
    entry = (*tile[:3], swapped if isinstance(args, str) else (swapped, *rest))
    return entry if type(tile) is tuple else type(tile)(*entry)  # a class of its own since Pillow 11.1


def _check_bits(values: np.ndarray, bits: int) -> None:
    highest = int(values.max())
    if highest >> bits:
        raise Unusable(NO_RULE, f"a value of {highest}, which takes more than --bits {bits}")


def _upper_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Return the upper 8 of `bits` as uint8."""
    return (values >> (bits - 8) if bits >= 8 else values << (8 - bits)).astype(np.uint8)


def _check_mode(image: Image.Image) -> None:
    """Raise Unusable if there is no rule to convert the values of this image to 8 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format not in FORMATS_16_BIT_AS_I):
        kind = "floating-point numbers" if image.mode == "F" else "integers"
        raise Unusable(NO_RULE, f"32-bit {kind}, without a defined black and white")
    if image.mode not in MODES and not image.mode.startswith("I;16"):
        raise Unusable(NO_RULE, f"color mode {image.mode}")


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """Return bits per channel in the file, for formats that may have more than 8 in color."""
    if data.startswith(b"\x89PNG"):
        return data[24]
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE_TAG, 8)
    return max(bits) if isinstance(bits, tuple) else bits


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata is no reason to refuse an image whose pixels are whole
        return 1


def unusual(image: Image.Image) -> str | None:
    """Describe what `to_channels` changes by a rule users may not expect; None for plain L and RGB."""
    found = []
    if image.mode.startswith("I") or is_deep_color(image):
        found.append("16 bits a channel")
    if image.mode in ("P", "PA"):
        found.append("palette")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        found.append(image.mode)
    if image.has_transparency_data:
        found.append("transparency")
    return ", ".join(found) or None


def num_frames(data: bytes) -> int:
    """Return how many frames or pages an image has that `open_image` can open; 1 if it is no sequence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _opened(data)
            # The further images of an MPO are previews of the first.
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        except Exception:  # only the first frame is used, and that one is whole
            return 1


def _is_cut_short(data: bytes) -> bool:
    """Return whether the end of a damaged file is missing, by the end marker of its format."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"BM"):
        return len(data) < int.from_bytes(data[2:6], "little")
    return data.startswith(b"GIF8") and not data.rstrip(b"\0").endswith(b";")


def _what_else(data: bytes) -> str:
    """Describe a file that is no image: the frequent cases."""
    start = data[:512].lstrip().lower()
    if not data:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image (git lfs pull fetches it)"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image (a failed download?)"
    return "is no image of a kind that can be read"
