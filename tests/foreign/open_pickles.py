"""Run as a script, in another process: open pickles with `pickle.load` in the stand-in tree, and use them.

Arguments: the tree, then for each file: the pickle, a .npz with `z c real`, and the .npz to write.
"""

import copy
import json
import os
import pickle
import sys

import numpy as np

sys.path[:] = [sys.argv[1], *(path for path in sys.path if path)]
sys.modules["finetune"] = None  # importing it fails, wherever it may be installed

import torch  # noqa: E402

import dnnlib  # noqa: E402
import torch_utils  # noqa: E402

for package in (dnnlib, torch_utils):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
torch.set_num_threads(1)


def use(data, inputs):
    """Numbers out of every network of the file, as a program that knows nothing of ours would get them."""
    G, D = data["G_ema"], data["D"]
    z, c, real = (torch.from_numpy(inputs[key]) for key in ("z", "c", "real"))
    found = {"modes": [data[name].training for name in ("G", "D", "G_ema")]}
    with torch.no_grad():
        found["ws"] = G.mapping(z, c)
        found["img"] = G(z, c, noise_mode="const")
        found["img_none"] = G(z, c, noise_mode="none")
        found["img_trunc"] = G(z, c, truncation_psi=0.5, noise_mode="const")
        found["logits_real"] = D(real, c)
        if data["augment_pipe"] is not None:
            data["augment_pipe"].p.fill_(1)  # or else which images it touches is random
            found["augmented"] = data["augment_pipe"](real, debug_percentile=0.3)
    # Editors copy networks, pickle them again, and use parts of them.
    with torch.no_grad():
        for name, again in (("copied", copy.deepcopy(G)), ("pickled", pickle.loads(pickle.dumps(G)))):
            found[f"img_{name}"] = again(z, c, noise_mode="const")
        found["img_parts"] = by_parts(G, found["ws"])
    found["param_sums"] = [float(p.double().sum()) for p in data["G"].parameters()]
    # They train on as well.
    for network in (data["G"], D):
        network.train().requires_grad_(True)
    loss = torch.nn.functional.softplus(-D(data["G"](z, c), c)).mean()
    loss.backward()
    grads = [p.grad for network in (data["G"], D) for p in network.parameters()]
    found["trained"] = [grad is not None and bool(torch.isfinite(grad).all()) for grad in grads]
    found["sizes"] = [G.z_dim, G.c_dim, G.w_dim, G.img_resolution, G.img_channels, G.num_ws]
    found["init_kwargs"] = json.dumps(dict(G.init_kwargs))
    found["entry"] = json.dumps(data["finetune"])
    return found


def by_parts(G, ws):
    """The image of `ws` block by block, or layer by layer, as editors and visualizers compute it."""
    x = img = None
    if hasattr(G.synthesis, "layer_names"):
        x = G.synthesis.input(ws[:, 0])
        for name, w in zip(G.synthesis.layer_names, ws.unbind(1)[1:]):
            x = getattr(G.synthesis, name)(x, w)
        return x * G.synthesis.output_scale
    first = 0
    for resolution in G.synthesis.block_resolutions:
        block = getattr(G.synthesis, f"b{resolution}")
        rows = ws.narrow(1, first, block.num_conv + block.num_torgb)
        x, img = block(x, img, rows, noise_mode="const")
        first += block.num_conv
    return img


arguments = sys.argv[2:]
for source, given, target in zip(arguments[::3], arguments[1::3], arguments[2::3]):
    # The StyleGAN2 code base has no such op.
    name, missing = "torch_utils.ops.filtered_lrelu", "stylegan2" in os.path.basename(source)
    sys.modules.pop(name, None)
    vars(torch_utils.ops if hasattr(torch_utils, "ops") else torch_utils).pop("filtered_lrelu", None)
    if missing:
        sys.modules[name] = None
    with open(source, "rb") as file:
        data = pickle.load(file)
    with np.load(given) as inputs:
        np.savez(target, **use(data, inputs))
