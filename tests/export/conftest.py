from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def golden_checkpoint(golden_dir):
    """Call with a name of GOLDEN_NETWORKS: the checkpoint, loaded once; do not change it."""
    import finetune

    cache = {}

    def read(name: str):
        if name not in cache:
            cache[name] = finetune.load(golden_dir / f"{name}.pkl")
        return cache[name]

    return read
