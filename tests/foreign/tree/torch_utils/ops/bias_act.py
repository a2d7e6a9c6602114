import math

import torch

from dnnlib import EasyDict

_F = torch.nn.functional
_R2 = math.sqrt(2)
_TABLE = {
    "linear": (lambda x, alpha: x, 1, 0),
    "relu": (lambda x, alpha: _F.relu(x), _R2, 0),
    "lrelu": (lambda x, alpha: _F.leaky_relu(x, alpha), _R2, 0.2),
    "tanh": (lambda x, alpha: torch.tanh(x), 1, 0),
    "sigmoid": (lambda x, alpha: torch.sigmoid(x), 1, 0),
    "elu": (lambda x, alpha: _F.elu(x), 1, 0),
    "selu": (lambda x, alpha: _F.selu(x), 1, 0),
    "softplus": (lambda x, alpha: _F.softplus(x), 1, 0),
    "swish": (lambda x, alpha: torch.sigmoid(x) * x, _R2, 0),
}
activation_funcs = {
    name: EasyDict(func=func, def_gain=gain, def_alpha=alpha) for name, (func, gain, alpha) in _TABLE.items()
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None):
    spec = activation_funcs[act]
    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = spec.func(x, spec.def_alpha if alpha is None else alpha) * (spec.def_gain if gain is None else gain)
    return x if clamp is None or clamp < 0 else x.clamp(-clamp, clamp)
