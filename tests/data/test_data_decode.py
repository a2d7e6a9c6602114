"""The stated rules: modes to channels, orientation, sizes, and what is refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from finetune.data.decode import (
    TURNS,
    decode,
    fit_to_size,
    images_to_float,
    num_frames,
    open_image,
    unusual,
)
from finetune.data.problems import CUT_SHORT, NO_RULE, TOO_LARGE, UNREADABLE, WRONG_SIZE, Unusable

COLORS = {1: [54], 3: [180, 0, 0], 4: [180, 0, 0, 255]}  # dark red; its luminance is 0.299 * 180


def one(data: bytes, channels: int) -> list[int]:
    """The pixel that an image of one color has everywhere."""
    pixels = decode(data, resolution=4, channels=channels, fit=None)
    assert pixels.dtype == np.uint8 and pixels.shape == (channels, 4, 4) and pixels.flags.c_contiguous
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def plain(mode: str, color, size=(4, 4)) -> Image.Image:
    return Image.new(mode, size, color)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "TGA"])
def test_decode_reads_every_container(encode, kind, channels):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert one(encode(plain("RGB", (180, 0, 0)), kind, **options), channels) == COLORS[channels]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_jpeg_is_close(encode, channels):
    got = one(encode(plain("RGB", (180, 0, 0)), "JPEG", quality=95), channels)
    assert np.abs(np.subtract(got, COLORS[channels])).max() <= 2


MODES = {
    # what is stored: gray, color, color with alpha
    "bilevel": ("1", 1, [255], [255] * 3, [255] * 4),
    "gray": ("L", 100, [100], [100] * 3, [100, 100, 100, 255]),
    "gray+alpha": ("LA", (100, 51), [224], [224] * 3, [100, 100, 100, 51]),  # 255 - (255-100) * 51/255
    "color+alpha": ("RGBA", (0, 0, 0, 51), [204], [204] * 3, [0, 0, 0, 51]),
    "clear": ("RGBA", (9, 8, 7, 0), [255], [255] * 3, [9, 8, 7, 0]),
    "palette": ("P", 0, [0], [0] * 3, [0, 0, 0, 255]),
}


@pytest.mark.parametrize("name", MODES)
def test_decode_converts_modes(encode, name):
    mode, color, gray, rgb, rgba = MODES[name]
    data = encode(plain(mode, color))
    assert open_image(data).mode == mode
    assert (one(data, 1), one(data, 3), one(data, 4)) == (gray, rgb, rgba)


def test_decode_converts_cmyk_jpeg(encode):
    data = encode(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=100)
    assert open_image(data).mode == "CMYK"
    red, green, blue = one(data, 3)
    assert red > 240 and green < 15 and blue < 15
    assert abs(one(data, 1)[0] - 76) <= 6 and one(data, 4)[3] == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_16_bit_gray_keeps_upper_byte(encode, kind):
    # Spread over the whole range: a reader that clips at 255 gives white everywhere.
    values = np.linspace(0, 65535, 16).round().astype(np.uint16).reshape(4, 4)
    data = b"P5 4 4 65535\n" + values.astype(">u2").tobytes() if kind == "PPM" else encode(values, kind)
    for channels in (1, 3):
        pixels = decode(data, resolution=4, channels=channels, fit=None)
        assert (pixels == (values >> 8).astype(np.uint8)).all()


def test_decode_transparent_png_color_as_alpha(encode):
    data = encode(plain("RGB", (10, 20, 30)), transparency=(10, 20, 30))
    assert one(data, 3) == [255] * 3 and one(data, 4)[3] == 0
    palette = plain("P", 0)
    palette.putpalette([10, 20, 30] * 256)
    data = encode(palette, transparency=0)
    assert one(data, 3) == [255] * 3 and one(data, 4) == [10, 20, 30, 0]
    data = encode(np.full((4, 4), 1000, np.uint16), transparency=1000)
    assert one(data, 1) == [255] and one(data, 4)[3] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_decode_applies_exif_orientation_once(encode, noise, kind, orientation):
    upright = noise(3, 5, 3)
    inverse = {None: None, **{turn: turn for turn in Image.Transpose}}
    inverse[Image.Transpose.ROTATE_90] = Image.Transpose.ROTATE_270
    inverse[Image.Transpose.ROTATE_270] = Image.Transpose.ROTATE_90
    undo = inverse[TURNS.get(orientation)]
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(np.asarray(open_image(data)), upright)


def test_decode_orientation_follows_exif_table(encode):
    # Orientation 6, as phones write it: row 0 of the file is the right side of the scene.
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.asarray(open_image(encode(stored, exif=exif)))
    assert upright.shape == (3, 2, 3) and (upright[:, 1] == 255).all() and (upright[:, 0] == 0).all()


def test_decode_ignores_damaged_exif(encode):
    data = encode(plain("RGB", (180, 0, 0)), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0")
    assert one(data, 3) == COLORS[3]


def test_decode_takes_first_frame_of_animation(encode):
    frames = [plain("RGB", (180, 0, 0)), plain("RGB", (0, 0, 180))]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert (
            one(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options), 3) == COLORS[3]
        )


def halves(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_fit_crop_takes_the_center(noise):
    pixels = noise(8, 14, 3)
    got = np.asarray(fit_to_size(Image.fromarray(pixels), (8, 8), "crop"))
    assert np.array_equal(got, pixels[:, 3:11])
    tall = np.asarray(fit_to_size(Image.fromarray(pixels.swapaxes(0, 1)), (8, 8), "crop"))
    assert np.array_equal(tall, pixels.swapaxes(0, 1)[3:11])


def test_fit_pad_adds_margins(noise):
    pixels = noise(4, 8, 3)
    got = np.asarray(fit_to_size(Image.fromarray(pixels), (8, 8), "pad"))
    assert np.array_equal(got[2:6], pixels) and (got[:2] == 255).all() and (got[6:] == 255).all()
    clear = np.asarray(fit_to_size(Image.fromarray(pixels).convert("RGBA"), (8, 8), "pad"))
    assert (
        np.array_equal(clear[2:6, :, :3], pixels)
        and (clear[:2] == 0).all()
        and (clear[2:6, :, 3] == 255).all()
    )
    assert fit_to_size(Image.new("L", (200, 1)), (8, 8), "pad").size == (8, 8)


def test_fit_stretch_uses_everything():
    got = np.asarray(fit_to_size(halves(64, 16), (16, 16), "stretch")).astype(int)
    # Lanczos reaches three pixels to either side of the edge in the middle.
    assert (got[:, :5] == [255, 0, 0]).all() and (got[:, 11:] == [0, 0, 255]).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [5, 48, 300])
def test_fit_keeps_color_and_orientation(fit, size):
    got = np.asarray(fit_to_size(halves(size, size), (16, 16), fit)).astype(int)
    assert got.shape == (16, 16, 3)
    ringing = 0.06 * 255  # what Lanczos overshoots beside an edge
    assert (abs(got[:, :4] - [255, 0, 0]) < ringing).all()
    assert (abs(got[:, 12:] - [0, 0, 255]) < ringing).all()


def test_fit_shrinks_without_aliasing():
    # A checkerboard of single pixels has to become gray, not black or white.
    board = ((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)
    got = np.asarray(fit_to_size(Image.fromarray(board), (16, 16), "stretch")).astype(int)
    assert (abs(got - 127.5) < 3).all()


def test_fit_hidden_color_does_not_bleed():
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = [0, 255, 0, 0]  # green, but clear
    pixels[:, 16:] = [255, 0, 0, 255]
    got = np.asarray(fit_to_size(Image.fromarray(pixels), (8, 8), "stretch"))
    visible = got[got[..., 3] > 0]
    assert (visible[:, 1] == 0).all() and len(visible) >= 32


def test_fit_equal_size_is_unchanged(noise):
    pixels = noise(8, 8, 3)
    for fit in (None, "crop", "pad", "stretch"):
        assert np.array_equal(np.asarray(fit_to_size(Image.fromarray(pixels), (8, 8), fit)), pixels)
    with pytest.raises(Unusable) as caught:
        fit_to_size(Image.fromarray(pixels), (4, 4), None)
    assert (caught.value.kind, caught.value.detail) == (WRONG_SIZE, "8×8")
    with pytest.raises(ValueError, match="squash"):
        fit_to_size(Image.fromarray(pixels), (4, 4), "squash")


def refusal(data: bytes) -> Unusable:
    with pytest.raises(Unusable) as caught:
        open_image(data)
    return caught.value


def test_decode_names_files_that_are_no_image():
    assert refusal(b"").detail == "is empty"
    assert "LFS" in refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n").detail
    assert "web page" in refusal(b"\n<!DOCTYPE html><p>404").detail
    assert refusal(b"\0" * 100).kind == UNREADABLE
    assert (
        refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n").kind == UNREADABLE
    )  # starts no program


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_decode_refuses_truncated_files(encode, noise, kind):
    data = encode(noise(32, 32, 3), kind)
    for keep in (len(data) // 2, 40):
        problem = refusal(data[:keep])
        # What a TIFF holds is said at its end, so that of half of one nothing is known.
        assert problem.kind == (UNREADABLE if kind == "TIFF" else CUT_SHORT) and problem.detail


def test_decode_damaged_but_complete_is_not_truncated(encode, noise):
    data = bytearray(encode(noise(32, 32, 3)))
    data[60:80] = bytes(20)
    assert refusal(bytes(data)).kind == UNREADABLE


@pytest.mark.parametrize(
    "mode, what",
    [
        ("L", None),
        ("RGB", None),
        ("1", None),
        ("P", "palette"),
        ("LA", "transparency"),
        ("RGBA", "transparency"),
    ],
)
def test_unusual_describes_mode(encode, mode, what):
    data = encode(Image.new(mode, (4, 4)))
    assert unusual(open_image(data)) == what and num_frames(data) == 1


def test_unusual_describes_16_bit_and_alpha(encode):
    def seen(data):
        return unusual(open_image(data))

    assert seen(encode(Image.new("CMYK", (4, 4)), "JPEG")) == "CMYK"
    assert seen(encode(np.zeros((4, 4), np.uint16))) == "16 bits a channel"
    assert seen(encode(Image.new("P", (4, 4)), transparency=0)) == "palette, transparency"
    # 16-bit color, which Pillow gives as 8-bit RGB: a 1×1 PNG by hand.
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(7))), (b"IEND", b""))
    parts = [len(d).to_bytes(4, "big") + t + d + zlib.crc32(t + d).to_bytes(4, "big") for t, d in chunks]
    assert seen(b"\x89PNG\r\n\x1a\n" + b"".join(parts)) == "16 bits a channel"


def test_num_frames_counts_frames(encode):
    frames = [plain("RGB", (180, 0, 0)), plain("RGB", (0, 0, 180)), plain("RGB", (0, 180, 0))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        assert num_frames(encode(frames[0], kind, save_all=True, append_images=frames[1:])) == 3
    assert num_frames(b"") == 1


def test_decode_flipped_bytes_raise_only_unusable(encode, noise):
    rng = np.random.RandomState(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        good = encode(noise(16, 16, 3), kind)
        for _ in range(40):
            data = bytearray(good)
            for place in rng.randint(0, len(data), 4):
                data[place] ^= 1 << rng.randint(8)
            try:
                decode(bytes(data), resolution=16, channels=3, fit="crop")
            except Unusable as problem:
                assert problem.detail


def test_decode_refuses_too_many_pixels(encode, monkeypatch):
    data = encode(plain("L", 0, (20, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert open_image(data).size == (20, 30)
    for allowed in (599, 100):  # Pillow warns up to twice the limit and raises above
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
        problem = refusal(data)
        assert problem.kind == TOO_LARGE and problem.detail == f"600 pixels, {allowed} are allowed"


def test_decode_refuses_32_bit_values(encode):
    assert refusal(encode(np.zeros((4, 4), np.float32), "TIFF")).kind == NO_RULE
    assert refusal(encode(np.zeros((4, 4), np.int32), "TIFF")).kind == NO_RULE


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow without JPEG 2000")
def test_decode_jpeg_2000_with_16_bits(encode):
    values = np.full((16, 16), 0xABCD, np.uint16)
    pixels = decode(encode(values, "JPEG2000"), resolution=16, channels=1, fit=None)
    assert (pixels == 0xAB).all()


def test_images_to_float_spans_the_range_of_the_networks():
    got = images_to_float(torch.arange(256, dtype=torch.uint8))
    assert got.dtype == torch.float32 and got[0] == -1 and got[255] == 1
    assert torch.allclose(got.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-7)
