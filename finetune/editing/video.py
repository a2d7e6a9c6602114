"""Frames and files of videos: walks through w, and morphs from one network to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from finetune.data.decode import to_channels
from finetune.editing.interpolate import Interpolation
from finetune.editing.latents import LatentTable
from finetune.errors import ConfigError
from finetune.models import Network
from finetune.sampling import image_grid, near_square, synthesize
from torch_utils.files import atomic_write

KINDS = (".mp4", ".gif", ".webp")
GIF_MAX_FPS = 50  # viewers slow down shorter delays than 2/100 s
WEBP_QUALITY = 90
H264_CRF = "16"  # visually lossless
BT709, LIMITED_RANGE = 1, 1  # numbers of ITU-T H.273 and FFmpeg

Frame = tuple[Network, torch.Tensor]  # a network and ws [cells, num_ws, w_dim]


def walk(keys: Sequence[torch.Tensor], steps: int, *, loop: bool) -> Iterator[torch.Tensor]:
    """Yield points of a smooth curve through `keys`, equal to a key at every `steps`-th point.

    A loop ends one step before its first point; otherwise the last key ends the curve. Two keys that are not
    a loop give a straight line. Source: Catmull and Rom, "A class of local interpolating splines" (1974).
    """
    count = len(keys)

    def key(index: int) -> torch.Tensor:
        if loop:
            return keys[index % count]
        if index < 0:
            return 2 * keys[0] - keys[1]
        return keys[index] if index < count else 2 * keys[-1] - keys[-2]

    for index in range(count if loop else count - 1):
        before, start, end, after = (key(index + offset) for offset in (-1, 0, 1, 2))
        yield start
        for step in range(1, steps):
            t = step / steps
            yield 0.5 * (
                2 * start
                + (end - before) * t
                + (2 * before - 5 * start + 4 * end - after) * t**2
                + (3 * start - before - 3 * end + after) * t**3
            )
    if not loop:
        yield keys[-1]


def walk_frames(table: LatentTable, steps: int, *, loop: bool, cells: int = 1) -> tuple[int, Iterator[Frame]]:
    """Return the number of frames of a walk, and the frames.

    With several columns each row is a cell that moves along its columns; otherwise the rows are divided among
    `cells`, each of which moves from row to row. ConfigError if there is nothing to move between.
    """
    rows = list(table)
    if len(table.columns) > 1:
        keys = torch.stack(rows, dim=1)  # [columns, rows, num_ws, w_dim]
    else:
        if len(rows) % cells:
            raise ConfigError(
                f"{len(rows)} seeds cannot be divided among {cells} cells of --grid.",
                hint=f"Give a multiple of {cells} seeds, or another --grid.",
            )
        keys = torch.cat(rows).unflatten(0, (cells, -1)).transpose(0, 1)
    if len(keys) < 2:
        raise ConfigError(
            "The video has nothing to interpolate between.",
            hint="Give more seeds (as many for each cell of --grid), several values of --trunc, --class or "
            "--edit, or a second network (--to).",
        )
    count = len(keys) * steps if loop else (len(keys) - 1) * steps + 1
    return count, ((table.G, ws) for ws in walk(list(keys), steps, loop=loop))


def morph_frames(table: LatentTable, B: Network, steps: int, *, loop: bool) -> tuple[int, Iterator[Frame]]:
    """Return the number of frames of a morph, and the frames: `steps` from the network of `table` to `B`.

    Each row of the table is a cell. The weights of the whole network are interpolated, so w changes as well;
    a loop goes there and back. ConfigError if the table has several columns or the architectures differ.
    """
    if len(table.columns) > 1:
        raise ConfigError("--to: --trunc, --class and --edit take one value each in a morph.")
    between = Interpolation(table.G, B)
    moving = LatentTable(between.network, table.rows, table.columns, table.cutoff, table.mix_layers)
    count = 2 * steps if loop else steps + 1

    def frames() -> Iterator[Frame]:
        for index in range(count):
            G = between.set((1 - math.cos(math.pi * index / steps)) / 2)
            yield G, torch.cat(list(moving))

    return count, frames()


def render(
    frames: Iterable[Frame],
    grid: tuple[int, int],
    *,
    noise_mode: str = "const",
    noise_seeds: Sequence[int] = (0,),
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Image.Image]:
    """Yield the image of each frame: its cells in `grid` (columns, rows), equal to those of `generate`."""
    for done, (G, cells) in enumerate(frames, 1):
        images = [
            synthesize(G, ws, noise_mode=noise_mode, seed=seed)
            for ws, seed in zip(cells, itertools.cycle(noise_seeds))
        ]
        yield image_grid(images, grid[0])
        progress(done)


def full_grid(count: int) -> tuple[int, int]:
    """Return (columns, rows) for `count` cells: without empty places, if that is not much wider than high."""
    columns = next(n for n in range(math.isqrt(count - 1) + 1, count + 1) if count % n == 0)
    return (columns, count // columns) if columns <= 3 * (count // columns) else near_square(count)


def check_kind(path: Path, fps: int) -> str:
    """Return one of KINDS, or "" for a folder: one that exists, or a name without suffix.

    Raises ConfigError if no video of `fps` can be written under this name on this machine.
    """
    kind = "" if path.is_dir() else path.suffix.lower()
    if kind not in ("", *KINDS):
        raise ConfigError(f"{path} has no video suffix. Use {', '.join(KINDS)}, or a folder.")
    if kind == ".gif" and fps > GIF_MAX_FPS:
        raise ConfigError(f"--fps {fps}: GIF has at most {GIF_MAX_FPS}. Use {GIF_MAX_FPS} or less.")
    if kind == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"{path}: mp4 needs PyAV, which is not installed.",
                hint="pip install 'stylegan-finetune[video]', or use .gif or .webp.",
            ) from None
    return kind


def write_video(path: Path, images: Iterable[Image.Image], *, fps: int, count: int) -> None:
    """Write images as mp4 (H.264), GIF (256 colors, 1/100 s) or WebP by the suffix, or as PNGs in a folder.

    `count` is the number of images. Transparency is laid on white except in WebP and PNG. WriteError if the
    file cannot be written; a file that was at `path` before is then untouched. In a folder, frames of an
    earlier video are replaced.
    """
    kind = check_kind(path, fps)
    if kind == "":
        path.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            image.save(path / f"frame{index:05d}.png")
        while (old := path / f"frame{count:05d}.png").is_file():  # of a longer video
            old.unlink()
            count += 1
        return
    with atomic_write(path) as stream:
        if kind == ".mp4":
            _write_mp4(stream, images, fps)
            return
        # Round the times, not the delays, whose errors would add up.
        unit = 10 if kind == ".gif" else 1  # milliseconds
        times = [round(1000 * index / fps / unit) * unit for index in range(count + 1)]
        delays = [end - start for start, end in itertools.pairwise(times)]
        options: dict = {"format": kind[1:], "save_all": True, "loop": 0, "duration": delays}
        if kind == ".gif":
            images = (to_channels(image, 3) for image in images)
        else:
            options |= {"quality": WEBP_QUALITY}
        rest = iter(images)
        next(rest).save(stream, append_images=rest, **options)


def _write_mp4(stream, images: Iterable[Image.Image], fps: int) -> None:
    import av

    with av.open(stream, "w", format="mp4") as container:
        video = None
        for image in images:
            frame = av.VideoFrame.from_image(to_channels(image, 3))
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            if video is None:
                video = container.add_stream("libx264", rate=fps, options={"crf": H264_CRF})
                video.width, video.height, video.pix_fmt = frame.width, frame.height, "yuv420p"
                context = video.codec_context  # without these, players guess the colors by the size
                context.colorspace = context.color_primaries = context.color_trc = BT709
                context.color_range = LIMITED_RANGE
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode())
