"""Output of `finetune dataset check`, as text and JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.data.image_set import CACHE_BYTES
from finetune.data.problems import KINDS, REFUSED, REMARKS, Problem, escaped, listed
from finetune.data.scanning import Scan, counted, enlargement, tally

SHOWN_CLASSES = 20
KIND_IDS = REFUSED | REMARKS
VERBS = {"crop": "cropped", "pad": "padded", "stretch": "stretched", None: "refused"}


def what_training_does(
    found: Scan, size: tuple[int, int] | None, channels: int | None, fit: str | None
) -> dict[str, Any]:
    """Return how many images training at (height, width) uses unchanged and how many it changes, by change.

    Empty without a size. Counts of images, and MiB decoded (of 3 channels if unknown).
    """
    if size is None:
        return {}
    height, width = size
    others = {seen: count for seen, count in found.sizes.items() if seen != (width, height)}

    def count(is_met: Callable[[int, int], bool]) -> int:
        return sum(num for seen, num in others.items() if is_met(*seen))

    counts = {
        "as_they_are": found.sizes.get((width, height), 0),
        "other_aspect": count(lambda w, h: w * height != h * width),
        "enlarged": count(lambda w, h: enlargement((w, h), (width, height), fit) > 1),
        "shrunk": count(lambda w, h: enlargement((w, h), (width, height), fit) < 1),
        "other_sizes": sum(others.values()),
    }
    num_bytes = sum(found.sizes.values()) * (channels or 3) * height * width
    return {
        "resolution": max(size),
        "width": width,
        "height": height,
        "fit": fit,
        **counts,
        "decoded_mib": round(num_bytes / 2**20, 1),
        "in_memory": num_bytes <= CACHE_BYTES,
    }


def as_values(found: Scan, use_labels: bool, training: dict[str, Any]) -> dict[str, Any]:
    """Return all findings as plain values."""
    return {
        "path": str(found.path),
        "ok": not found.problems,
        "num_images": found.num_images,
        "num_ignored": found.num_ignored,
        "num_unchanged": found.num_known,
        "sizes": {f"{width}x{height}": count for (width, height), count in found.sizes.items()},
        "modes": found.modes,
        "labels_checked": use_labels,
        "num_classes": found.num_classes,
        "class_counts": found.class_counts,
        "training": training or None,
        "problem_counts": _counts(found.problems),
        "remark_counts": _counts(found.remarks),
        "problems": [_values(problem) for problem in found.problems],
        "remarks": [_values(remark) for remark in found.remarks],
        "notes": found.notes,
    }


def as_text(found: Scan, training: dict[str, Any]) -> str:
    """Return all findings as text: a summary, then problems by kind, then notes."""
    head = f"{escaped(str(found.path))}: {counted(found.num_images, 'image')}"
    if found.ignored:
        suffixes = {escaped(suffix): count for suffix, count in found.ignored.items()}
        head += f", {counted(found.num_ignored, 'other file')} skipped ({tally(suffixes, shown=5)})"
    lines = [head]
    if found.num_known:
        lines.append(f"{'unchanged':<12}{found.num_known}, not decoded again; --fresh decodes all")
    sizes = {f"{width}×{height}": count for (width, height), count in found.sizes.items()}
    lines += [f"{'sizes':<12}{tally(sizes)}"] if sizes else []
    lines += [f"{'stored as':<12}{tally(found.modes)}"] if sizes else []
    lines += [f"{'classes':<12}{_classes(found)}"] if found.num_classes else []
    lines.append(f"{'training':<12}{_training(found, training)}")
    lines += [f"{'note':<12}{note}" for note in found.notes]
    if found.problems:
        lines += ["", "Training refuses:", *listed(found.problems, shown=None)]
    if found.remarks:
        lines += ["", "Accepted by training, with remarks:", *listed(found.remarks, shown=None)]
    if not found.problems:
        lines += ["", "Training accepts this data set."]
    return "\n".join(lines)


def _training(found: Scan, training: dict[str, Any]) -> str:
    if not training:
        if len(found.sizes) == 1 and (size := next(iter(found.sizes)))[0] == size[1]:
            return f"as they are, with a checkpoint of {size[0]} pixels; others are resized by --fit"
        return "use --resolution or --network to see how these sizes are handled"
    others = training["other_sizes"]
    parts = [f"at {training['width']}×{training['height']}: {training['as_they_are']} as they are"]
    if others:
        changes = [f"{training[key]} {key}" for key in ("shrunk", "enlarged") if training[key]]
        if training["other_aspect"]:
            changes.append(f"{training['other_aspect']} {VERBS[training['fit']]}")
        fitted = f"{others} of other sizes ({', '.join(changes)})"
        parts.append(fitted if training["fit"] else f"{others} refused")
    where = "read into memory once" if training["in_memory"] else "decoded again each time, by --workers"
    return f"{', '.join(parts)}; {training['decoded_mib']:g} MiB decoded, {where}"


def _classes(found: Scan) -> str:
    counts = found.class_counts
    if not counts:
        return f"vectors of {found.num_classes} numbers"
    if len(counts) <= SHOWN_CLASSES:
        return f"{len(counts)} ({', '.join(f'{index}: {count}' for index, count in enumerate(counts))})"
    few, many = min(counts), max(counts)
    fewest = f"{counted(few, 'image')} (class {counts.index(few)})"
    return f"{len(counts)}, from {fewest} to {many} ({counts.index(many)})"


def _counts(problems: list[Problem]) -> dict[str, int]:
    counts = {KIND_IDS[kind]: sum(problem.kind == kind for problem in problems) for kind in KINDS}
    return {name: count for name, count in counts.items() if count}


def _values(problem: Problem) -> dict[str, str]:
    return {"name": problem.name, "kind": KIND_IDS[problem.kind], "detail": problem.detail}
