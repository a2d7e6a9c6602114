"""The options: JSON both ways, all problems at once, and defaults with their reasons."""

import dataclasses
import json

import pytest

from finetune import recipes
from finetune.checkpoint.arguments import LIMITS
from finetune.config import TrainConfig
from finetune.errors import ConfigError
from finetune.options import OPTIONS, DistillWeight, TrainOptions, flag

FACTS = recipes.RunFacts("stylegan2", 256, 3, 0, 1500, "cpu", 2, from_scratch=False)


def assert_in_range(config):
    """Every value is one that a user can ask for; empty and 0 mean none, "scratch" is a recipe of its own."""
    for name, value in vars(config).items():
        if value not in ("", 0, recipes.SCRATCH):
            assert OPTIONS[name].problem(name, value) is None


def problems(**options):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**({"data": "images", "resume": "a.pkl"} | options)).validate()
    return caught.value.problems


def test_config_json_round_trip():
    for weight in (0.05, "auto:1", "auto:0.25"):
        asked = TrainOptions(data="images", resume="a.pkl", kimg=1.5, batch=8, sd_weight=weight, mirror=True)
        config, _ = recipes.resolve(asked, FACTS)
        assert TrainConfig.from_json(config.to_json()) == config
        assert json.loads(config.to_json())["sd_weight"] == weight


def test_config_sd_weight_is_parsed_once():
    assert DistillWeight.parse("auto:0.1") == DistillWeight(0.1, is_ratio=True)
    assert DistillWeight.parse("0.5") == DistillWeight.parse(0.5) == DistillWeight(0.5)
    assert not DistillWeight.parse(0) and str(DistillWeight.parse("auto:1.0")) == "auto:1"
    asked = TrainOptions(sd_weight="auto:0.1")
    assert asked.sd_weight == DistillWeight(0.1, is_ratio=True) == dataclasses.replace(asked).sd_weight
    for wrong in (-1, "nan", "inf", "auto:0", "auto:inf", "auto", "auto:", ":1", "ratio:1", "1:auto"):
        with pytest.raises(ConfigError, match="must be a number, or auto:RATIO"):
            DistillWeight.parse(wrong)


def test_config_from_json_lists_bad_entries():
    text = json.dumps({"batch": "eight", "hue": 1, "mirror": 1})
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(text)
    message = str(caught.value)
    assert all(name in message for name in ("batch", "'eight'", "hue", "mirror", "data"))
    with pytest.raises(ConfigError, match="not JSON"):
        TrainConfig.from_json("{")


def test_config_micro_batch_is_a_number_or_auto():
    assert [TrainOptions(batch_gpu=given).batch_gpu for given in (8, "8", "auto", None)] == [8, 8, 0, None]
    for wrong in ("largest", "", 2.5, "0", "-1"):
        with pytest.raises(ConfigError, match=f"--batch-gpu {wrong}: must be a whole number above 0"):
            TrainOptions(batch_gpu=wrong)
    by_default, given = (
        recipes.resolve(TrainOptions(data="x", resume="a.pkl", **asked), FACTS)
        for asked in ({}, {"batch_gpu": "auto"})
    )
    assert given == by_default


def test_config_of_a_run_older_than_an_option():
    config, _ = recipes.resolve(TrainOptions(data="x", resume="a.pkl"), FACTS)
    entries = json.loads(config.to_json())
    del entries["deterministic"]
    assert TrainConfig.from_json(json.dumps(entries)) == config


def test_config_lists_all_problems():
    found = problems(kimg=-1, p=2.0, target=float("nan"), sd_backbone="vgg", batch=10, batch_gpu=4)
    text = "\n".join(found)
    assert all(name in text for name in ("--kimg", "--p 2.0", "--target", "--sd-backbone vgg", "--batch 10"))
    assert len(found) >= 5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resume": None}, "--scratch"),
        ({"scratch": "stylegan2", "resolution": 64}, "Use either --resume"),
        ({"cbase": 1024}, "--cbase"),
        ({"resume": None, "scratch": "stylegan2"}, "--resolution: needed"),
        ({"resume": None, "scratch": "stylegan2", "resolution": 48}, "power of two"),
        ({"resume": None, "scratch": "stylegan2", "resolution": 64, "sd_teacher": "initial"}, "--sd-teacher"),
        ({"resume": None, "scratch": "stylegan2", "resolution": 64, "freezed": 2}, "--freezed"),
        (
            {"resume": None, "scratch": "stylegan2", "resolution": 64, "cbase": 32},
            "--cbase 32: must be at least",
        ),
        ({"resume": None, "scratch": "stylegan2", "resolution": 32768}, "must be at most 16384"),
        ({"aug": "fixed"}, "--p"),
        ({"p": 0.2}, "no effect"),
        ({"aug": "noaug", "target": 0.5}, "no effect"),
        ({"aug": "noaug", "augpipe": "bgc"}, "no effect"),
        ({"aug": "fixed", "p": 0.0, "augpipe": "bgc"}, "--augpipe bgc: has no effect with --p 0"),
        ({"resume": None, "scratch": "stylegan2", "resolution": 64, "recipe": "adapt"}, "--recipe adapt"),
        ({"fit": "squeeze"}, "--fit squeeze"),
        ({"sd_teacher": "initial", "sd_teacher_kimg": 5.0}, "--sd-teacher-kimg"),
        ({"d_warmup_kimg": 5.0}, "--d-warmup-kimg 5.0: has no effect without --new-d"),
        ({"resume": ""}, "--resume: empty. Pass the checkpoint"),
        ({"seed": 2**32}, "--seed 4294967296: must be at most 4294967295"),
    ],
)
def test_config_refuses_combinations(options, words):
    assert any(words in problem for problem in problems(**options))


def test_config_defaults_have_reasons():
    config, reasons = recipes.resolve(TrainOptions(data="images", resume="a.pkl"), FACTS)
    assert_in_range(config)
    table = {reason.name: reason for reason in reasons}
    assert all(reason.why for reason in reasons)
    assert all(getattr(config, name) == reason.value for name, reason in table.items())
    assert config.batch == 16 and config.gamma == pytest.approx(0.0002 * 256**2 / 16, rel=1e-3)
    assert config.ema_kimg == 16 * 10 / 32
    assert "user-specified" not in {reason.why for reason in reasons}
    assert "256 px" in table["gamma"].why and "images: 1500" in table["kimg"].why
    assert config.cbase == 0  # the checkpoint has its own


def test_config_user_values_determine_others():
    config, reasons = recipes.resolve(TrainOptions(data="x", resume="a.pkl", batch=64, glr=0.01), FACTS)
    assert (config.batch, config.glr) == (64, 0.01)
    assert config.gamma == pytest.approx(0.0002 * 256**2 / 64, rel=1e-3)
    assert next(reason.why for reason in reasons if reason.name == "batch") == "user-specified"


@pytest.mark.parametrize("resolution, gamma", [(128, 0.5), (256, 2), (512, 8), (1024, 32)])
def test_config_stylegan3_gamma_is_published(resolution, gamma):
    assert recipes.r1_gamma("stylegan3-t", resolution**2, batch=32) == pytest.approx(gamma)


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
@pytest.mark.parametrize("resolution", [16, 64, 256, 1024])
@pytest.mark.parametrize("batch", [None, 7])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("scratch", [False, True])
def test_config_resolved_is_complete_and_valid(family, resolution, batch, device_type, scratch):
    facts = recipes.RunFacts(family, resolution, 3, 0, 100, device_type, 8, from_scratch=scratch)
    start = {"scratch": family, "resolution": resolution} if scratch else {"resume": "a.pkl"}
    config, _ = recipes.resolve(TrainOptions(data="x", batch=batch, **start), facts)
    assert_in_range(config)
    assert config.batch % config.batch_gpu == 0
    assert None not in vars(config).values()
    again, _ = recipes.resolve(config.as_options(), facts)  # as a resumed run does
    assert again == config


def test_config_omits_options_without_effect():
    off, reasons = recipes.resolve(TrainOptions(data="x", resume="a", sd_weight=0.0, aug="noaug"), FACTS)
    names = {reason.name for reason in reasons}
    assert not names & {"sd_preset", "sd_teacher", "augpipe", "target"}
    assert not off.sd_weight and (off.sd_backbone, off.sd_interval) == ("ms-ssim", 64)
    on, _ = recipes.resolve(TrainOptions(data="x", resume="a", sd_backbone="l2"), FACTS)
    assert on.sd_weight == recipes.SD_WEIGHT and on.sd_interval == 1


def test_config_sd_preset_authors():
    preset = {"data": "x", "resume": "a", "sd_preset": "authors"}
    config, reasons = recipes.resolve(TrainOptions(**preset), FACTS)
    found = (config.sd_backbone, config.sd_augment, config.sd_interval, str(config.sd_weight))
    assert found == ("lpips-vgg", True, 1, "1")
    assert "authors" in next(reason.why for reason in reasons if reason.name == "sd_augment")
    other, _ = recipes.resolve(TrainOptions(**preset, sd_augment=False, sd_weight=2), FACTS)
    assert (other.sd_augment, other.sd_weight.value, other.sd_interval) == (False, 2, 1)


@pytest.mark.parametrize(
    "batch, group_size, part", [(32, 4, 32), (7, 4, 1), (6, 4, 3), (100, 4, 20), (12, 8, 6), (7, 1, 7)]
)
def test_config_batch_gpu_fits_groups_of_d(batch, group_size, part):
    facts = dataclasses.replace(FACTS, group_size=group_size)
    config, reasons = recipes.resolve(TrainOptions(data="x", resume="a", batch=batch), facts)
    assert config.batch_gpu == part
    why = next(reason.why for reason in reasons if reason.name == "batch_gpu")
    assert ("does not divide" in why) == (part < min(batch, group_size))


@pytest.mark.parametrize("kimg, length", [(None, 200), (5, 5)])
def test_config_refuses_a_run_in_which_d_trains_alone(kimg, length):
    asked = TrainOptions(data="x", resume="a", new_d=True, kimg=kimg, d_warmup_kimg=length)
    asked.validate()
    with pytest.raises(ConfigError, match=f"--d-warmup-kimg {length}: D would train alone for all {length}"):
        recipes.resolve(asked, FACTS)
    shorter = dataclasses.replace(asked, d_warmup_kimg=length - 1)
    assert recipes.resolve(shorter, FACTS)[0].d_warmup_kimg == length - 1


def test_options_expand_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    asked = TrainOptions(data="~/images", resume="~/runs/00000-x", outdir="~/runs")
    assert (asked.data, asked.resume, asked.outdir) == (
        "/home/anna/images",
        "/home/anna/runs/00000-x",
        "/home/anna/runs",
    )
    assert TrainOptions(resume="https://x.org/~anna/a.pkl").resume == "https://x.org/~anna/a.pkl"


def test_config_flags_match_fields():
    assert flag("sd_weight") == "--sd-weight"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"graphs": "auto"}, ("graphs", "no effect: CUDA graphs need a GPU")),
        ({}, None),
    ],
)
def test_config_lists_options_without_effect(options, line):
    _, reasons = recipes.resolve(TrainOptions(data="images", resume="a.pkl", **options), FACTS)
    found = [(reason.name, reason.why) for reason in reasons if "no effect" in reason.why]
    assert found == ([line] if line else [])


def test_sizes_of_scratch_are_those_that_files_may_have():
    names = {"resolution": "img_resolution", "cbase": "channel_base", "cmax": "channel_max", "z_dim": "z_dim"}
    for option, argument in (names | {"map_depth": "num_layers"}).items():
        assert OPTIONS[option].at_most == LIMITS[argument][1]
