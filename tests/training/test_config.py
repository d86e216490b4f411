"""Configuration files: what is read, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.training.config import TrainConfig, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
TUNING = "quantization.enabled=true optimization.freeze_norm=true"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    if "auto" in path.read_text():  # left to the pictures and the machine, see test_plan.py
        return
    config = load_config(path)
    assert config.run.name == path.stem.replace("_", "-")
    assert config.network.resolve(3).num_classes == 3


def test_mudrock_is_the_authors_schedule() -> None:
    config = load_config(CONFIGS / "mudrock.yaml")
    optimization, loss = config.optimization, config.loss
    assert (optimization.optimizer, optimization.lr, optimization.momentum) == ("sgd", 0.01, 0.9)
    assert (optimization.weight_decay, optimization.schedule, optimization.power) == (5e-4, "poly", 0.9)
    assert (optimization.max_steps, optimization.final_lr) == (120_000, 0)
    assert (loss.kind, loss.ohem_threshold, loss.ohem_min_kept, loss.auxiliary_weight) == ("ohem", 0.9, 131072, 0.6)
    assert config.augmentation.crop == (1024, 1024)


FIRST_VERSION = """
data:
  normalisation: imagenet
optimisation:
  optimiser: sgd
  freeze_norm: true
quantisation:
  enabled: true
"""


def test_keys_of_the_first_version_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(FIRST_VERSION)
    config = load_config(path, ["optimisation.lr=0.5", "quantisation.images=3"])
    optimization, quantization = config.optimization, config.quantization
    assert (optimization.optimizer, optimization.lr, optimization.freeze_norm) == ("sgd", 0.5, True)
    assert (quantization.enabled, quantization.images, config.data.normalization) == (True, 3, "imagenet")
    assert load_config(path).differences(yaml.safe_load(FIRST_VERSION)) == []
    path.write_text("optimisation: {lr: 1}\noptimization: {lr: 2}")
    with pytest.raises(UsageError, match="optimization is given under its present and its former name"):
        load_config(path)


def test_overrides_replace_and_create_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optimization:\n  lr: 0.1\nrun:\n")
    config = load_config(path, ["optimization.lr=1e-3", "run.name=b", "loss.class_weights=[1, 2.5]"])
    assert (config.optimization.lr, config.run.name, config.loss.class_weights) == (1e-3, "b", [1.0, 2.5])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("optimization.lr=-1", ["optimization.lr = -1", "greater than 0"]),
        ("optimization.lr=fast", ["optimization.lr = 'fast'", "number"]),
        ("optimization.max_stepz=3", ["unknown key optimization.max_stepz", "did you mean optimization.max_steps?"]),
        ("optimizer.lr=3", ["unknown key optimizer", "did you mean optimization?"]),
        ("data.simulated.trian=3", ["did you mean data.simulated.train?"]),
        ("zzz=3", ["unknown key zzz", "known keys: network, data"]),
        ("network.variant=unet", ["network.variant = 'unet'", "'hpddrnet-23-slim'"]),
        ("loss.class_weights=heavy", ["loss.class_weights = 'heavy'", "'balanced'", "list"]),
        ("augmentation.crop=[100,100]", ["augmentation.crop [100, 100]", "multiples of 8"]),
        ("augmentation.gamma=[2,1]", ["gamma must be a range"]),
        ("optimization.warmup_steps=99999", ["warmup_steps (99999)", "max_steps"]),
        ("optimization.accumulate=3", ["batch_size (8)", "accumulate (3)"]),
        ("optimization.lr=.inf", ["optimization.lr = inf", "finite"]),
        ("run.name=../x", ["run.name = '../x'"]),
        ("optimization.lr", ["'optimization.lr'", "section.key=value"]),
        ("run.name=[", ["not valid YAML"]),
        ("quantization.enabled=true", ["needs optimization.freeze_norm=true"]),
        (f"{TUNING} run.precision=bf16-mixed", ["needs run.precision=32, not bf16-mixed"]),
        (f"{TUNING} network.initial=a network.pretrained=b", ["exclude each other"]),
        ("quantization.percentile=101", ["quantization.percentile = 101 is not allowed"]),
        ("run.precision=8", ["run.precision"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(overrides: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, overrides.split())
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="does not exist"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(UsageError, match="must hold sections"):
        load_config(broken)
    broken.write_text("run: 3")
    with pytest.raises(UsageError, match=r"broken\.yaml: run = 3"):
        load_config(broken)


def test_differences_name_what_changes_the_weights_only() -> None:
    before = TrainConfig()
    stored = before.model_dump(mode="json")
    assert before.differences(stored) == []
    harmless = load_config(None, ["run.workers=3", "run.val_every=7", "run.folder=elsewhere", "run.devices=2"])
    assert harmless.differences(stored) == []
    other = load_config(None, ["optimization.lr=0.5", "augmentation.crop=[64, 64]"])
    assert other.differences(stored) == [
        "augmentation.crop: [512, 512] -> [64, 64]",
        "optimization.lr: 0.001 -> 0.5",
    ]


def test_a_run_from_before_a_setting_existed_had_its_default() -> None:
    stored = TrainConfig().model_dump(mode="json")
    del stored["quantization"], stored["optimization"]["freeze_norm"]
    assert TrainConfig().differences(stored) == []
    tuned = load_config(None, ["quantization.enabled=true", "optimization.freeze_norm=true"])
    assert tuned.differences(stored) == [
        "optimization.freeze_norm: False -> True",
        "quantization.enabled: False -> True",
    ]


def test_precision_is_fp32_unless_asked_and_32_needs_no_quotes() -> None:
    assert load_config(None).run.precision == "32"
    assert load_config(None, ["run.precision=32"]).run.precision == "32"
