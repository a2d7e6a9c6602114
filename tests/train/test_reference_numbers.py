"""Two steps of training give the numbers that 55a9cab gave: tests/stress/reference_run.py in short.

The numbers were printed by this file's `numbers` at that commit. They guard what a comparison of new code
with itself cannot notice: a renamed phase, which is hashed into every draw, or a lost factor.
"""

import json

import pytest
import torch
from tiny_runs import options, quiet

from finetune.train import run

# Low learning rates keep rounding errors from growing; what they do is seen in `weight_distance`.
SETTINGS = dict(
    kimg=0.016, tick=0.008, batch=8, batch_gpu=4, aug="fixed", p=0.3, sd_weight="auto:0.2", sd_interval=1,
    sd_teacher_kimg=0.1, ema_kimg=0.01, glr=1e-4, dlr=1e-4, lr_warmup_kimg=0.03, cond=True, seed=3, snap=100,
    fit="stretch", save_every_min=0,
)  # fmt: skip
LOGGED = (
    "loss_G", "loss_D", "loss_sd", "sd_weight", "r1_penalty", "loss_path", "score_real", "weight_distance",
)  # fmt: skip
RECORDED = {
    "stylegan2-ada": {
        "path_mean": 0.014913220889866352,
        "sd_norms 0": 0.0011554894736036658,
        "sd_norms 1": 0.002142723184078932,
        "opt_G exp_avg_sq": 1.5815636060022389,
        "opt_D exp_avg_sq": 0.0007889523398228525,
        "loss_G 1": 0.503068,
        "loss_D 1": 1.40449,
        "loss_sd 1": 1.172,
        "sd_weight 1": 0.0928892,
        "r1_penalty 1": 0.00319695,
        "loss_path 1": 2.19539,
        "score_real 1": 0.392309,
        "weight_distance 1": 0.000480083,
        "loss_G 2": 0.715858,
        "loss_D 2": 1.64871,
        "loss_sd 2": 1.82864,
        "sd_weight 2": 0.107747,
        "score_real 2": 0.472224,
        "weight_distance 2": 0.000275731,
    },
    "stylegan3-t": {
        "path_mean": 0.0,
        "sd_norms 0": 0.0013430053368210793,
        "sd_norms 1": 0.0005516295786947012,
        "opt_G exp_avg_sq": 0.0008343988352937753,
        "opt_D exp_avg_sq": 0.0007335920126217525,
        "loss_G 1": 0.709451,
        "loss_D 1": 1.57537,
        "loss_sd 1": 0.114765,
        "sd_weight 1": 0.376986,
        "r1_penalty 1": 0.00264942,
        "score_real 1": -0.373584,
        "weight_distance 1": 0.000444363,
        "loss_G 2": 0.739225,
        "loss_D 2": 1.5596,
        "loss_sd 2": 0.0841769,
        "sd_weight 2": 0.486717,
        "score_real 2": -0.390866,
        "weight_distance 2": 0.000255216,
    },
    "stylegan3-r": {
        "path_mean": 0.0,
        "sd_norms 0": 0.0020430241711437702,
        "sd_norms 1": 0.0002547025796957314,
        "opt_G exp_avg_sq": 0.0002093190521354257,
        "opt_D exp_avg_sq": 0.003527202121560624,
        "loss_G 1": 1.03402,
        "loss_D 1": 1.76559,
        "loss_sd 1": 0.0180273,
        "sd_weight 1": 1.3132,
        "r1_penalty 1": 0.00592993,
        "score_real 1": -0.983058,
        "weight_distance 1": 0.000552968,
        "loss_G 2": 1.08856,
        "loss_D 2": 1.60012,
        "loss_sd 2": 0.0243442,
        "sd_weight 2": 1.61826,
        "score_real 2": -0.764252,
        "weight_distance 2": 0.000317587,
    },
}


def numbers(run_dir):
    """The running averages of a run and the lines of its log."""
    (path,) = run_dir.glob("training-state-000000.016.pt")
    state = torch.load(path, weights_only=True)
    found = {"path_mean": float(state["path_mean"])}
    found |= {f"sd_norms {i}": norm for i, norm in enumerate(state["sd_norms"].tolist())}
    for name in ("opt_G", "opt_D"):
        squares = [each["exp_avg_sq"].double().flatten() for each in state[name]["state"].values()]
        found[f"{name} exp_avg_sq"] = float(torch.cat(squares).norm())
    for line in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines()):
        found |= {f"{name} {line['step']}": line[name] for name in LOGGED if name in line}
    return found


@pytest.mark.parametrize("family", ["stylegan2-ada", "stylegan3-t", "stylegan3-r"])
def test_train_matches_recorded_numbers(family, golden_dir, images, tmp_path):
    resume = str(golden_dir / f"{family}-32.pkl")
    config = options(images, tmp_path, **SETTINGS, resume=resume, data=str(images(32, 3)))
    found = numbers(run(config, console=quiet()).run_dir)
    assert found.keys() == RECORDED[family].keys()
    for name, value in RECORDED[family].items():
        # Squares of small gradients carry more rounding: the ops in plain torch change them by 1.1e-5, and
        # 55a9cab on a CPU without AVX-512 by 2.6e-5.
        is_square = "exp_avg_sq" in name or "r1_penalty" in name
        assert found[name] == pytest.approx(value, rel=1e-4 if is_square else 1e-5), name
