"""--recipe: which numbers a recipe gives, from where, and that a flag overrides its row."""

import dataclasses

import pytest

from finetune import recipes
from finetune.options import OPTIONS, RECIPES, TrainOptions

BASE = recipes.RunFacts("stylegan2", 256, 3, 0, 5000, "cpu", 2, from_scratch=False, num_freezable=19)
FFHQ = recipes.Published("stylegan3-t-ffhq-1024x1024", trained=(32.8, 32), finetune=(6.6, 32))

BY_RECIPE = {
    "kimg", "batch", "gamma", "glr", "dlr", "lr_warmup_kimg", "ema_kimg", "freezed", "aug", "target",
    "sd_weight",
}  # fmt: skip


def settle(facts=BASE, **options):
    config, reasons = recipes.resolve(TrainOptions(**{"data": "x", "resume": "a.pkl", **options}), facts)
    return config, {reason.name: reason for reason in reasons}


@pytest.mark.parametrize("num_images, recipe", [(999, "few-shot"), (1000, "adapt"), (70_000, "adapt")])
def test_recipe_auto_by_number_of_images(num_images, recipe):
    config, table = settle(dataclasses.replace(BASE, num_images=num_images))
    assert config.recipe == recipe == table["recipe"].value
    assert str(num_images) in table["recipe"].why or "--recipe improve" in table["recipe"].why


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_images", [50, 1500, 70_000])
def test_recipe_sets_every_option_with_reason(recipe, num_images):
    facts = dataclasses.replace(BASE, num_images=num_images, published=FFHQ)
    config, table = settle(facts, recipe=recipe)
    assert all(reason.why and "{" not in reason.why for reason in table.values())
    for name in ("gamma", "glr", "dlr", "batch", "ema_kimg", "aug", "freezed", "sd_weight", "kimg"):
        assert table[name].value == getattr(config, name) is not None


def test_recipe_few_shot_measures_memorization():
    few = dataclasses.replace(BASE, num_images=100, has_effnet=True)
    assert settle(few)[0].metrics == "random-fid,memorization"
    assert settle(dataclasses.replace(few, has_effnet=False))[0].metrics == "random-fid"
    assert settle()[0].metrics == "random-fid" and settle(metrics="none")[0].metrics == "none"


def test_recipe_few_shot_distills_only_if_asked():
    few = dataclasses.replace(BASE, num_images=100)
    asked = ({}, {"sd_weight": "auto:0.3"}, {"sd_preset": "authors"}, {"recipe": "adapt"})
    weights = [str(settle(few, **given)[0].sd_weight) for given in asked]
    assert weights == ["0", "auto:0.3", "1", "auto:1"]
    assert settle(few)[0].sd_backbone == "ms-ssim"  # for the log


@pytest.mark.parametrize(
    "asked, weight",
    [
        ({}, "auto:0.1"),
        ({"recipe": "few-shot"}, "0"),
        ({"sd_preset": "authors"}, "1"),
        ({"sd_weight": 2}, "2"),
    ],
)
def test_recipe_ms_ssim_has_a_smaller_ratio(asked, weight):
    assert str(settle(sd_backbone="ms-ssim", **asked)[0].sd_weight) == weight


def test_recipe_short_runs_measure_fewer_images():
    assert [settle(kimg=kimg)[0].metrics_num for kimg in (0.1, 3.0, 200.0)] == [200, 600, 1000]
    assert settle(dataclasses.replace(BASE, device_type="cuda"), kimg=1.0)[0].metrics_num == 5000


def test_recipe_published_gamma_scaled_to_batch():
    facts = dataclasses.replace(BASE, family="stylegan3-t", resolution=1024, published=FFHQ)
    for recipe, gamma in (("improve", 32.8), ("adapt", 6.6), ("few-shot", 6.6)):
        config, table = settle(facts, recipe=recipe)
        assert config.batch == 32 and config.gamma == gamma
        assert FFHQ.name in table["gamma"].why
        assert settle(facts, recipe=recipe, batch=8)[0].gamma == pytest.approx(gamma * 4)
    assert settle(facts, recipe="custom")[0].gamma == pytest.approx(32)
    unknown = dataclasses.replace(facts, published=recipes.Published("other"))
    assert settle(unknown, recipe="improve")[0].gamma == pytest.approx(32)


def test_recipe_published_learning_rates_and_target():
    known = recipes.Published("a", trained=(1.0, 64), glr=0.0025, dlr=0.0015, target=0.7)
    facts = dataclasses.replace(BASE, published=known)
    for recipe in ("improve", "adapt", "few-shot"):
        config, table = settle(facts, recipe=recipe)
        assert (config.glr, config.dlr) == (0.0025, 0.0015)
        assert "published settings of a" in table["glr"].why and "published settings of a" in table["dlr"].why
        assert config.target == (0.7 if recipe == "improve" else 0.6)  # that of its own images
    assert settle(facts, recipe="improve", glr=0.001)[0].glr == 0.001
    config, table = settle(facts, recipe="custom")
    assert (config.glr, config.dlr) == (0.002, 0.002) and "published rate" in table["glr"].why


@pytest.mark.parametrize("family", ["stylegan2", "stylegan3-t", "stylegan3-r"])
@pytest.mark.parametrize("scratch", [False, True])
def test_recipe_values_have_rules_with_sources(family, scratch):
    """Every number that --recipe is about, also where there is no checkpoint."""
    facts = dataclasses.replace(BASE, family=family, from_scratch=scratch)
    start = {"resume": None, "scratch": family} if scratch else {}
    config, table = settle(facts, **start)
    for name in BY_RECIPE - {"freezed"} if scratch else BY_RECIPE:
        recipe = recipes.SCRATCH if scratch else config.recipe
        assert config.recipe == recipe and table[name].value == getattr(config, name)
        sources = [rule.source for rule in recipes.RULES if rule.option == name and recipe in rule.recipes]
        assert any(table[name].why.endswith(f"; {source}") for source in sources if source)


def test_recipe_freezed_and_aug_by_number_of_images():
    few, table = settle(dataclasses.replace(BASE, num_images=200))
    assert (few.freezed, few.aug) == (8, "ada") and "19 layers" in table["freezed"].why
    assert settle(dataclasses.replace(BASE, num_images=200, num_freezable=25))[0].freezed == 10
    many = dataclasses.replace(BASE, num_images=70_000)
    assert settle(many, recipe="improve")[0].aug == "noaug"
    assert settle(many, recipe="adapt")[0].aug == "ada"
    assert settle(recipe="improve")[0].freezed == 0
    assert settle(dataclasses.replace(BASE, num_images=200, converts_d=True))[0].freezed == 0


def test_recipe_option_overrides_rule():
    facts = dataclasses.replace(BASE, num_images=200, published=FFHQ)
    config, table = settle(facts, freezed=0, gamma=3.0, aug="noaug", kimg=7.0)
    assert (config.freezed, config.gamma, config.aug, config.kimg) == (0, 3.0, "noaug", 7.0)
    assert {table[name].why for name in ("freezed", "gamma", "aug", "kimg")} == {"user-specified"}


def test_recipe_batch_gpu_is_found_by_trial_on_gpu():
    facts = dataclasses.replace(BASE, device_type="cuda", num_processes=2)
    config, table = settle(facts, batch=96)
    assert config.batch_gpu == 48 and "found by trial" in table["batch_gpu"].why
    assert settle(batch=96)[0].batch_gpu == 32  # on a CPU


def test_rules_cover_options():
    for rule in recipes.RULES:
        assert set(rule.recipes) <= {*RECIPES, recipes.SCRATCH}
        if rule.option in BY_RECIPE and rule.why and rule.value != 0:
            assert rule.source, f"{rule.option}: where does {rule.value} come from?"
    ruled = {rule.option for rule in recipes.RULES}
    assert ruled <= OPTIONS.keys()
    assert {name for name, option in OPTIONS.items() if option.default is None} - {"data"} <= ruled
