"""Change the number of classes: the label embedding, the layer after it, and the projection of D."""

from __future__ import annotations

import math
from typing import Any

import torch

from finetune.models.stylegan2 import unit_rms

DRAWN = "drawn at random"
PROJECTION_SPREAD = 0.1  # standard deviation of a new projection around 1, to break symmetry


def change(old: Any, new: Any, classes: str | None, kept: list[int | None], changed: dict[str, str]) -> None:
    """Compute the layers of `new` that depend on labels from `old`, and describe the changes in `changed`.

    kept: for each new class the old one whose embedding it gets, unless they are `fresh`.
    """
    if old.c_dim and new.c_dim:
        if classes == "fresh":
            new.mapping.embed.weight.copy_(torch.randn_like(new.mapping.embed.weight))
            new.mapping.embed.bias.zero_()
            changed["mapping.embed.weight"] = changed["mapping.embed.bias"] = DRAWN
        else:
            _carry_embedding(old.mapping.embed, new.mapping.embed, kept, changed)
    elif hasattr(new, "synthesis"):
        _change_first_layer(old.mapping, new.mapping, changed)
    elif new.c_dim:
        _begin_projection(old.b4, new, changed)
    else:
        _end_projection(old, new.b4, changed)


def average_embedding(mapping: Any) -> torch.Tensor:
    """Return the mean over classes of the normalized embedding: `[embed_features]`."""
    every_class = torch.eye(mapping.c_dim, device=mapping.embed.weight.device)
    return unit_rms(mapping.embed(every_class)).mean(dim=0)


def _carry_embedding(old: Any, new: Any, kept: list[int | None], changed: dict[str, str]) -> None:
    """Copy the embeddings of the classes kept; new classes get the average of all."""
    used = old.weight * old.weight_gain
    average = used.mean(dim=1)
    columns = [average if source is None else used[:, source] for source in kept]
    new.weight.copy_(torch.stack(columns, dim=1) / new.weight_gain)
    num_new = kept.count(None)
    what = f"{len(kept) - num_new} of {old.in_features} classes kept"
    changed["mapping.embed.weight"] = what + (f", {num_new} initialized to their average" if num_new else "")


def _change_first_layer(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Add label inputs with weight 0, or replace label inputs by their average over classes."""
    z_dim = old.z_dim
    used = old.fc0.weight * old.fc0.weight_gain
    weight = torch.zeros_like(new.fc0.weight)
    weight[:, :z_dim] = used[:, :z_dim] / new.fc0.weight_gain
    new.fc0.weight.copy_(weight)
    if not old.c_dim:
        changed["mapping.fc0.weight"] = "label inputs added with weight 0"
        return
    bias = old.fc0.bias * old.fc0.bias_gain + used[:, z_dim:] @ average_embedding(old)
    new.fc0.bias.copy_(bias / new.fc0.bias_gain)
    changed["mapping.fc0.weight"] = "label inputs removed"
    changed["mapping.fc0.bias"] = "average contribution of labels added"


def _begin_projection(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Score every class as D did without classes, up to a small random spread that breaks the symmetry."""
    last = getattr(new.mapping, f"fc{new.mapping.num_layers - 1}")
    # The projection is act(weight·y + bias) with act(u) = sqrt(2)·u above 0: initialized near 1.
    last.weight.copy_(torch.randn_like(last.weight) * (PROJECTION_SPREAD / (last.weight_gain * math.sqrt(2))))
    last.weight.div_(math.sqrt(last.in_features))
    last.bias.fill_(1 / (math.sqrt(2) * last.bias_gain))
    scale = 1 / math.sqrt(new.b4.cmap_dim)  # the logit is sum(out · cmap) / sqrt(cmap_dim)
    new.b4.out.weight.copy_(old.out.weight.expand_as(new.b4.out.weight) * scale)
    new.b4.out.bias.copy_(old.out.bias.expand_as(new.b4.out.bias) * scale)
    changed["b4.out.weight"] = changed["b4.out.bias"] = "scores as before, equal for all classes initially"


def _end_projection(old: Any, new: Any, changed: dict[str, str]) -> None:
    """Score as D did on average over the classes; the score is linear in the projection, so this is exact."""
    every_class = torch.eye(old.c_dim, device=old.b4.out.weight.device)
    projection = old.mapping(None, every_class).mean(dim=0) / math.sqrt(old.b4.cmap_dim)
    new.out.weight.copy_(projection[None] @ old.b4.out.weight)
    new.out.bias.copy_(projection[None] @ old.b4.out.bias)
    changed["b4.out.weight"] = changed["b4.out.bias"] = "average over the former classes"
