"""The settings of a training run: one YAML file, every key checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, NetworkConfig, PixelSize
from hpddrnet_trt.data.augment import AugmentConfig
from hpddrnet_trt.data.datasets import SPLITS, Layout
from hpddrnet_trt.models.network import VARIANTS, network_config

SIMULATED = "simulated"
# Keys of the first version, in files and training checkpoints of that time, and what they are called today.
_RENAMED = {
    "optimisation": "optimization",
    "optimiser": "optimizer",
    "quantisation": "quantization",
    "normalisation": "normalization",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkSection(_Section):
    """Which network, and what it starts from."""

    variant: Literal[tuple(VARIANTS)] = "hpddrnet-23-slim"  # type: ignore[valid-type]
    channels: int | None = Field(default=None, ge=1)  # another width than the variant's
    ppm_channels: int | None = Field(default=None, ge=1)
    head_channels: int | None = Field(default=None, ge=1)
    eca: Literal["context", "spatial", "none"] | None = None  # these four: another than the variant's
    pam: Literal["fusion", "context", "none"] | None = None
    detail: bool | None = None  # logits at 1/4, see models.network.Detail
    pool_border: Literal["zeros", "ignored"] | None = None  # see models.network.DAPPM
    pretrained: Path | None = None  # checkpoint whose backbone training starts from, ours or mmsegmentation's
    # Checkpoint of ours, or a shipped model's name, that training starts from as a whole: the other keys are then its
    # own, and with the same classes the normalisation, too.
    initial: Path | None = None

    @model_validator(mode="after")
    def _one_start(self) -> NetworkSection:
        if self.pretrained is not None and self.initial is not None:
            raise ValueError("pretrained (a backbone) and initial (a whole network) exclude each other; give one")
        return self

    def resolve(self, num_classes: int) -> NetworkConfig:
        """The network's configuration for a number of classes."""
        given = self.model_dump(exclude={"variant", "pretrained", "initial"}, exclude_none=True)
        return NetworkConfig(**{**dict(network_config(self.variant, num_classes)), **given})


class SimulationSection(_Section):
    """Size of the simulated data set, used when ``data.path`` is ``simulated``."""

    train: int = Field(default=24, ge=1)
    val: int = Field(default=6, ge=1)
    test: int = Field(default=6, ge=1)
    size: int = Field(default=512, ge=64)
    magnification: float = Field(default=2.0, ge=0.1, le=10)  # 1: 20 nm per pixel
    seed: int = Field(default=0, ge=0)


class DataSection(_Section):
    """Where images and masks come from."""

    path: str = SIMULATED  # a dataset folder, or "simulated"
    layout: Layout | None = None  # None: found out from the folder
    train_split: str = "train"
    val_split: str = "val"
    # 2/5: all specimens of fold_splits but those of the second of five folds are trained on, these are validated on.
    fold: str | None = Field(default=None, pattern=r"^[1-9][0-9]*/[1-9][0-9]*$")
    fold_splits: list[Literal[SPLITS]] = ["train", "val"]  # type: ignore[valid-type]
    separate_groups: bool = False  # leave out training images of specimens that other splits hold as well
    pixel_size_m: PixelSize | None = None  # metres, of pictures that state none of their own
    # Pixel size that pictures are brought to before crops are taken, in metres; median: of the training pictures, where
    # these differ; own: as they are.
    common_pixel_size: Literal["median", "own"] | PixelSize = "median"
    normalization: Literal["dataset", "imagenet"] = "dataset"
    cache_megabytes: int = Field(default=1024, ge=0)  # decoded images kept in memory, per worker process
    simulated: SimulationSection = SimulationSection()

    @model_validator(mode="after")
    def _a_fold_there_is(self) -> DataSection:
        number, count = self.fold_place or (1, 2)
        if number > count:
            raise ValueError(f"fold ({self.fold}) must be NUMBER/COUNT, the number at most the count")
        return self

    @property
    def fold_place(self) -> tuple[int, int] | None:
        """Number of the fold, from 1, and how many there are."""
        if self.fold is None:
            return None
        number, count = map(int, self.fold.split("/"))
        return number, count


class OptimizationSection(_Section):
    """Optimizer, learning rate and length of the training. One step updates the weights once."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    final_lr: float = Field(default=0.0, ge=0)
    schedule: Literal["poly", "cosine"] = "cosine"
    power: float = Field(default=0.9, gt=0)  # of the poly schedule
    warmup_steps: int = Field(default=0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of SGD
    weight_decay: float = Field(default=5e-4, ge=0)
    max_steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)  # images per step, over all devices and accumulated passes
    accumulate: int = Field(default=1, ge=1)  # forward passes per step
    clip_norm: float | None = Field(default=None, gt=0)  # largest norm of the gradient
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # weight averaging; None: off
    freeze_norm: bool = False  # batch-norm uses the mean and variance it has, and leaves them as they are

    @model_validator(mode="after")
    def _consistent(self) -> OptimizationSection:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr ({self.final_lr}) must not exceed lr ({self.lr})")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps})")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        return self


class LossSection(_Section):
    """What is minimised."""

    kind: Literal["ohem", "cross-entropy"] = "ohem"
    ohem_threshold: float = Field(default=0.9, gt=0, le=1)
    ohem_min_kept: int = Field(default=131072, ge=0)  # pixels per forward pass of one device
    # Added to it, so that areas count and not only pixels; cldice: and that lines are whole, see losses.CenterlineDice.
    overlap: Literal["none", "dice", "lovasz", "cldice"] = "none"
    overlap_weight: float = Field(default=1.0, gt=0)
    auxiliary_weight: float = Field(default=0.6, ge=0)
    # How often a pixel beside another class counts in the cross-entropy: above 1 for fine edges, below 1 where masks
    # are a pixel off.
    boundary_weight: float = Field(default=1.0, ge=0)
    class_weights: Literal["none", "balanced"] | list[Annotated[float, Field(gt=0)]] = "none"


class QuantizationSection(_Section):
    """Train with the rounding of the INT8 form, see :mod:`hpddrnet_trt.training.qat`."""

    enabled: bool = False
    images: int = Field(default=32, ge=1)  # the first training crops, which give the activations' ranges
    percentile: float = Field(default=100.0, ge=90, le=100)  # of a batch's values that a range holds, in percent


class RunSection(_Section):
    """Where the run goes, how often it reports and what it runs on."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    folder: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    resume: Literal["auto", "never"] = "auto"  # auto: continue from last.ckpt when there is one
    val_every: int = Field(default=200, ge=1)  # steps
    checkpoint_every: int = Field(default=200, ge=1)  # steps
    log_every: int = Field(default=10, ge=1)  # steps
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["all"] = 1  # per node
    num_nodes: int = Field(default=1, ge=1)
    strategy: Literal["auto", "ddp", "ddp_spawn", "ddp_notebook"] = "auto"  # as in Lightning's Trainer
    # FP32: BF16 training falls far behind (train/README.md), and attention's scores outgrow FP16.
    precision: Annotated[Literal["32", "bf16-mixed", "16-mixed"], BeforeValidator(str)] = "32"
    deterministic: bool = False  # ask the GPU for repeatable kernels; a CPU's are
    workers: int = Field(default=0, ge=0)  # processes that load and augment images
    threads: int | None = Field(default=None, ge=1)  # CPU threads of the network
    progress: bool = True

    @property
    def path(self) -> Path:
        return self.folder / self.name


class TrainConfig(_Section):
    """Everything a run depends on. See ``train/configs`` for complete examples."""

    network: NetworkSection = NetworkSection()
    data: DataSection = DataSection()
    augmentation: AugmentConfig = AugmentConfig()
    optimization: OptimizationSection = OptimizationSection()
    loss: LossSection = LossSection()
    quantization: QuantizationSection = QuantizationSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for name, sizes in (("crop", (self.augmentation.crop,)), ("crops", self.augmentation.crops)):
            for size in sizes:
                if any(side % SIZE_MULTIPLE for side in size):
                    raise ValueError(
                        f"augmentation.{name} {list(size)} must be multiples of {SIZE_MULTIPLE} (height, width)"
                    )
        if self.quantization.enabled and not self.optimization.freeze_norm:
            raise ValueError(
                "quantization.enabled needs optimization.freeze_norm=true: INT8 folds batch-norm's statistics into the "
                "weights, and those of a batch would hide the shift that rounding causes"
            )
        if self.quantization.enabled and self.run.precision != "32":
            raise ValueError(
                f"quantization.enabled needs run.precision=32, not {self.run.precision}, which rounds once more"
            )
        return self

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Keys whose value differs from a stored configuration, as ``key: stored -> now``.

        A key that is younger than the stored run had its default then. Keys that cannot change the
        weights are left out (folder, resume, how often to report), and so are those that say what to
        run on: a run may move to another machine, though only the same kind of device continues it to
        the last bit.
        """
        now = _flatten(self.model_dump(mode="json"))
        before = {**_flatten(TrainConfig().model_dump(mode="json")), **_flatten(renamed(stored))}
        return [
            f"{key}: {before.get(key)} -> {now.get(key)}"
            for key in sorted({*now, *before})
            if key not in _MAY_CHANGE and before.get(key) != now.get(key)
        ]


_MAY_CHANGE = {
    f"run.{key}"
    for key in (
        "folder", "resume", "val_every", "checkpoint_every", "log_every", "accelerator", "devices", "num_nodes",
        "strategy", "workers", "threads", "progress",
    )
} | {"data.cache_megabytes", "data.path"}  # fmt: skip


def renamed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with the keys of the first version replaced by today's, at every level.

    Raises :class:`UsageError` when both stand in one section.
    """
    now: dict[str, Any] = {}
    for key, value in content.items():
        today = _RENAMED.get(key, key)
        if today in now:
            raise UsageError(f"{today} is given under its present and its former name; give one of them")
        now[today] = renamed(value) if isinstance(value, Mapping) else value
    return now


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply ``section.key=value`` overrides; every key is checked.

    Parameters: ``path`` the file, or None for the defaults; ``overrides`` values are read as YAML. What a recipe leaves
    open (``auto``) is for :func:`hpddrnet_trt.training.plan.plan_run`.
    Raises :class:`UsageError` naming the key, the value and what is allowed.
    """
    content = read_settings(path)
    for override in overrides:
        apply_override(content, override)
    return checked(content, path)


def read_settings(path: str | Path | None) -> dict[str, Any]:
    """The sections of a YAML file, or none, unchecked; keys of the first version (``optimisation``) are still read.

    Raises :class:`UsageError` for what is not YAML.
    """
    return {} if path is None else renamed(_read_yaml(existing_file(path, "configuration file")))


def checked(content: Mapping[str, Any], path: str | Path | None = None) -> TrainConfig:
    """The configuration of what :func:`read_settings` read; :class:`UsageError` naming the key, the value and what is
    allowed."""
    source = "the configuration" if path is None else str(path)
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as exc:
        raise UsageError(f"{source}: {_sentence(exc.errors())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not valid YAML ({' '.join(str(exc).split())}); correct it") from exc
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold sections with keys (network: ..., data: ...), not {type(content).__name__}")
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set what ``section.key=value`` says; :class:`UsageError` for another form."""
    key, equals, text = override.partition("=")
    parts = [_RENAMED.get(part, part) for part in key.strip().split(".")]
    if not equals or not all(parts):
        raise UsageError(f"override {override!r} is not of the form section.key=value, e.g. optimization.lr=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise UsageError(f"the value of override {override!r} is not valid YAML; quote it") from exc
    section = content
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"override {override!r}: {part} is not a section")
        section = inner
    section[parts[-1]] = value


def _sentence(errors: Sequence[Any]) -> str:
    """One readable sentence from pydantic's errors: about the first key at fault."""
    error = errors[0]
    location, known = _locate(error["loc"])
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    # One error for each branch of a union, e.g. "none", "balanced" or a list.
    about = [other["msg"] for other in errors if _locate(other["loc"])[0] == location]
    return f"{key} = {error['input']!r} is not allowed: {'; or '.join(text[0].lower() + text[1:] for text in about)}"


def _locate(path: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """The key an error is about, and the keys known in its section; pydantic's path goes on into
    the branches of a union and the items of a list, which are no keys."""
    model: Any = TrainConfig
    location: list[str] = []
    known: list[str] = []
    for part in path:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
        known = list(model.model_fields)
        location.append(str(part))
        model = model.model_fields[str(part)].annotation if part in model.model_fields else None
    return location, known


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
