"""Publish a checkpoint on the Hugging Face Hub: safetensors, sample images and a model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.checkpoint.load import Checkpoint
from finetune.checkpoint.provenance import NOT_KNOWN
from finetune.checkpoint.unpickle.stubs import printable
from finetune.errors import ConfigError
from finetune.export.save import save
from finetune.hub import download
from finetune.hub.huggingface import explained, library
from finetune.hub.identify import BY_NAME
from finetune.models import Network, image_size
from finetune.sampling import generate, save_grid

FILE, SAMPLES, CARD = "model.safetensors", "samples.png", "README.md"
NUM_SAMPLES = 16
PSI = 0.7
# Licenses that the Hub has an identifier for, and that checkpoints have; any other is "other".
IDENTIFIERS = re.compile(r"(?i)(mit|apache-2\.0|cc0-1\.0|unlicense|cc-by(-nc)?(-sa|-nd)?-[34]\.0)(?![\w-])")
SEVERAL = "; "  # between the licenses of a blend
USAGE = """## Usage

```bash
finetune generate --network hf://{repo} --seeds 0-15 --trunc {psi}{label} --outdir out
finetune convert hf://{repo} network.pkl    # for the StyleGAN2-ADA and StyleGAN3 code bases
```

```python
import finetune

G = finetune.load("hf://{repo}").best    # G(z, c) -> images in -1 to 1
```"""


def check_license(checkpoint: Checkpoint) -> str:
    """Return the license under which a checkpoint would be published; ConfigError if it is not known."""
    license = checkpoint.provenance.licence
    if not license or is_uncertain(license):
        what = f"not certain: {license}" if license else NOT_KNOWN
        raise ConfigError(
            f"{checkpoint.provenance.source}: its license is {what}. State it with --license TEXT, as the "
            "source of the weights does."
        )
    return license


def is_uncertain(license: str) -> bool:
    """Return whether a license, or one of those of a blend, was guessed from a file name or is not known."""
    return BY_NAME in license or NOT_KNOWN in license.split(SEVERAL)


def push(
    checkpoint: Checkpoint,
    repo: str,
    *,
    public: bool = False,
    which: str = "all",
    metrics: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Upload a checkpoint to `repo` ("user/name") in one commit, and return its URL.

    The repository is made if it does not exist: private, unless `public`. metrics: a measurement of the log
    of a run. Raises ConfigError for an unknown license, or a public repository without `public`;
    CheckpointError if the upload fails. Nothing is uploaded unless the file was read back and compared.
    """
    check_license(checkpoint)
    if download.is_offline():
        raise ConfigError(f"hf://{repo}: publishing needs the network, and {download.OFFLINE} forbids it.")
    hub = library()
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save(checkpoint, Path(folder) / FILE, which=which, progress=progress)
        if has_samples(checkpoint):
            save_grid(sample_images(checkpoint.generator), Path(folder) / SAMPLES)
        (Path(folder) / CARD).write_text(model_card(checkpoint, repo, metrics), encoding="utf-8")
        with explained(f"hf://{repo}: publishing"):
            api.create_repo(repo, private=not public, exist_ok=True)
            if not public and not api.model_info(repo).private:
                raise ConfigError(f"hf://{repo}: this repository is public. Use --public, or another name.")
            files = [hub.CommitOperationAdd(path.name, path) for path in sorted(Path(folder).iterdir())]
            commit = api.create_commit(repo, files, commit_message=f"Add {checkpoint.provenance.source}")
    return str(getattr(commit, "repo_url", None) or commit.commit_url)


def has_samples(checkpoint: Checkpoint) -> bool:
    """Return whether sample images can be made: no label vector is typical of a network that takes them."""
    return checkpoint.best is not None and checkpoint.label_kind != "vectors"


def sample_images(G: Network) -> list[np.ndarray]:
    """Return an image of each of the first seeds; with classes, seed i has class i modulo their number."""
    found = []
    for seed in range(NUM_SAMPLES):
        class_index = seed % G.c_dim if G.c_dim else None
        found += [image for _, image in generate(G, [seed], class_index=class_index, truncation_psi=PSI)]
    return found


def model_card(checkpoint: Checkpoint, repo: str, metrics: Mapping[str, Any] | None = None) -> str:
    """Return the model card: metadata, images, usage, license, data, metrics, origin of the weights."""
    origin = checkpoint.provenance
    network, license = checkpoint.network, check_license(checkpoint)
    height, width = image_size(network)
    what = f"{checkpoint.family} at {width} x {height} px"
    is_vector = checkpoint.label_kind == "vectors"
    what += f", labels of {network.c_dim} numbers" if is_vector else ""
    what += f", {network.c_dim} classes" if network.c_dim and not is_vector else ""
    label = f" --label {','.join(['0'] * network.c_dim)}" if is_vector else " --class 0"
    what += f", trained for {origin.nimg / 1000:g} kimg" if origin.nimg else ""
    data = (origin.training or {}).get("data") or "Not stated."
    metadata = _metadata(checkpoint, license).to_yaml()
    sections = [f"---\n{metadata}\n---", f"# {repo.partition('/')[2]}", f"{what}."]
    if has_samples(checkpoint):
        caption = f"{NUM_SAMPLES} images: seeds 0 to {NUM_SAMPLES - 1}, truncation psi {PSI}"
        caption += f", class = seed mod {network.c_dim}" if network.c_dim else ""
        sections.append(f"![{caption}]({SAMPLES})")
    sections += [
        USAGE.format(repo=repo, psi=PSI, label=label if network.c_dim else ""),
        f"## License\n\n{_text(license)}",
        f"## Data\n\n{_text(data)}",
        f"## Metrics\n\n{_metrics(metrics)}",
        "## Origin\n\n" + "\n".join(_origin(checkpoint.provenance.to_dict())),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(checkpoint: Checkpoint, license: str) -> Any:
    data = library().ModelCardData(
        library_name="stylegan-finetune",
        pipeline_tag="unconditional-image-generation",
        tags=["gan", checkpoint.family],
    )
    found, link = IDENTIFIERS.match(license), re.search(r"https?://\S+", license)
    if found and SEVERAL not in license:
        data.license = found[0].lower()
    else:
        data.license, data.license_name = "other", _text(license.partition(",")[0])
        data.license_link = link[0] if link else None
    return data


def _metrics(metrics: Mapping[str, Any] | None) -> str:
    from_log = dict(metrics or {})
    num = from_log.pop("num", "?")
    rows = [
        f"| {_text(name)} | {value:.4g} |"
        for name, value in from_log.items()
        if type(value) is float and not name.endswith(("_spread", "_error")) and name not in ("kimg", "sec")
    ]
    if not rows:
        return "Not measured."
    head = f"Measured during training, with {num} generated images.\n\n| metric | value |\n| --- | --- |\n"
    return head + "\n".join(rows)


def _origin(step: dict[str, Any] | None, indent: str = "") -> list[str]:
    """Return list items from the newest step to the oldest; the second parent of a blend is a list in one."""
    lines: list[str] = []
    while step:
        sha256 = _text(step["sha256"] or "not known")
        lines.append(f"{indent}- {_text(step['source'] or 'unnamed')}, SHA-256 {sha256}")
        if other := step.get("blended_with"):
            lines += [f"{indent}  blended with:", "", *_origin(other, indent + "  "), ""]
        step = step.get("parent")
    return lines


def _text(value: Any) -> str:
    """Return a text of a file for Markdown: one line, no markup."""
    return re.sub(r"[|<>`\[\]\\]", " ", printable(str(value)))
