"""Describes one run completely and reads it from the command line."""

import argparse
import json
import math
import shlex
import typing
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any, NoReturn

import torch

from files import read_bytes
from models import MODELS
from sources import DATASETS
from sources.folder import FITS
from utils import choose, nearest

# Where a run is kept, how often, with how many others, and how long its processes wait: fields that say
# nothing about what it is.
STORAGE_FIELDS = ("output", "resume", "mirror", "checkpoint_seconds", "seeds", "process_timeout")
# Fields that may differ between a run and its continuation: they change no number.
MAY_DIFFER = ("data", "device", "share_muon")
# What describes a run in its folder, and several seeds of one in the folder above theirs.
RUN_FILE, SEEDS_FILE = "config.json", "seeds.json"

CHOICES = {
    "model": tuple(MODELS),
    "dataset": tuple(DATASETS),
    "fit": tuple(FITS),
    "optimizer": ("adam", "adamw", "sgd", "muon"),
    "scheduler": ("onecycle", "none"),
    "lr_rule": ("steepest", "valley", "minimum_over_ten", "minimum"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}


BEST: dict[str, Any] = {
    "optimizer": "muon",
    "lr": 0.05,  # of Muon; norms, biases and the last layer train by SGD at 8 times that
    "weight_decay": 0.025,
    "head_lr_scale": 1 / 64,
    "label_smoothing": 0.1,
    "ema_decay": 0.99,
}


S11: dict[str, Any] = {"model": "resnet18", "epochs": 20, "flip": False, "cutout": 16}


# A recipe is a diff from the defaults. Measured on two cores of an AMD EPYC with bf16.
RECIPES: dict[str, dict[str, Any]] = {
    # The exercise as written: 93.11 % (1 seed) in 65 minutes.
    "custom_resnet": {},
    # The same network and epochs: 94.37 % (1 seed) in 65 minutes.
    "custom_resnet_best": BEST,
    # 94.00 % (1 seed) in ten epochs, by six views of each test image: 56 minutes on one core of an Intel
    # Xeon with bf16.
    "speedrun": {**BEST, "epochs": 10, "ema_decay": 0.0, "padding": 2, "cutout": 0, "tta": True},
    # 20 epochs: ResNet18 94.69 % (1 seed) in 95 minutes; ResNet34 is not measured yet.
    "resnet18": {**BEST, "model": "resnet18", "epochs": 20, "cutout": 16},
    "resnet34": {**BEST, "model": "resnet34", "epochs": 20, "cutout": 16},
    # Full CIFAR-10 on a laptop: 87.15 ± 0.26 % (3 seeds) in 3.5 minutes.
    "quick": {"width": 16, "epochs": 10},
    # The sample in the repository: 71.20 % of its 1,000 test images in a minute, and no network.
    "demo": {"dataset": "cifar10-sample", "width": 16, "epochs": 40, "batch_size": 128},
    # Sessions 10 to 12 of the course as five write-ups word them, with Adam and one-cycle at the rate
    # that is found. docs/benchmarks.md says what differs. The accuracy here is not measured yet.
    # Session 10, biases in the convolutions: the write-up states 90.31 %.
    "s10_custom_resnet": {"bias": True, "weight_decay": 1e-7},
    # Session 11, crop and CutOut 16 alone: 91.38 %; the second with the steepest rate: 91.03 %.
    "s11_resnet18": {**S11, "weight_decay": 1e-7},
    "s11_resnet18_steepest": {**S11, "lr_rule": "steepest"},
    # Session 12: 90.3 %; the second with the steepest rate and batches of 256: 87.58 %.
    "s12_custom_resnet": {"weight_decay": 1e-4},
    "s12_custom_resnet_steepest": {"lr_rule": "steepest", "batch_size": 256},
}


def setting(
    default: Any, help: str, group: str = "", low: float | None = None, high: float = math.inf
) -> Any:
    """A field with its one default and its one help text, of one line at 100 columns.

    Args:
        group: title of the part of --help that begins here; the fields that follow belong to it.
        low, high: least and greatest value of a number; without a `low` it is not checked here.
    """
    return field(default=default, metadata={"help": help, "group": group, "range": (low, high)})


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, completely: every field is a flag, every default is the exercise's.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is allowed.
    """

    model: str = setting("custom_resnet", "network", group="model")
    width: int = setting(64, "channels of the first layer; of a ResNet 8 or more", low=1, high=1024)
    dropout: float = setting(
        0.0, "probability before the linear layer; custom_resnet only", low=0, high=0.99
    )
    bias: bool = setting(False, "biases in the convolutions; custom_resnet only")
    init_from: str | None = setting(None, "begin with these weights: of a run, a weights file or a .pth")
    dataset: str = setting("cifar10", "", group="data")
    data: str = setting("datasets", "folder that holds the dataset, or to download it to")
    image_size: int = setting(32, "side that a folder's images are resized to, pixels", low=8, high=1024)
    fit: str = setting("squeeze", "for a folder's images that are not square")
    val_split: float = setting(
        0.0, "fraction of the training images held out for validation", low=0, high=0.9
    )
    epochs: int = setting(24, "passes over the training images", group="training", low=1)
    batch_size: int | None = setting(None, "images per step; none: 512, a folder fewer", low=2)
    optimizer: str = setting("adam", "update rule, sgd and muon with momentum 0.9")
    weight_decay: float = setting(
        0.0, "L2 penalty, not on norms and biases; decoupled with adamw, muon", low=0
    )
    head_lr_scale: float = setting(
        1.0, "learning rate of the last linear layer / the others'", low=1e-6, high=1e6
    )
    scheduler: str = setting("onecycle", "learning-rate schedule")
    lr: float | None = setting(None, "peak learning rate; none: found by the range test")
    lr_rule: str = setting("minimum", "range test's suggestion")
    peak_epoch: float = setting(5.0, "epoch at whose end the rate peaks; at 0.3 of a shorter run", low=0)
    label_smoothing: float = setting(
        0.0, "share of each target spread over all classes", low=0, high=0.99
    )
    ema_decay: float = setting(
        0.0, "decay of a moving average of the weights (EMA); 0: none", low=0, high=0.9999
    )
    padding: int = setting(
        4, "reflected border before the random crop, pixels; 0: no crop", group="augmentation", low=0
    )
    flip: bool | None = setting(None, "mirror half of the images; svhn's digits only with --flip")
    cutout: int = setting(8, "side of the erased square, pixels; 0: none", low=0)
    # Under 1: test images have their colours, and a network should have seen some.
    grayscale: float = setting(0.0, "probability of turning an image grey", low=0, high=0.99)
    tta: bool = setting(False, "evaluate at the end by the mean logits of six views of each image")
    workers: int = setting(
        0,
        "data-loading processes; 0: whole batches, with other random numbers",
        group="where and how it runs",
        low=0,
        high=256,
    )
    precision: str = setting("auto", "number format of the forward pass")
    compile: bool = setting(False, "torch.compile the network: slow at first; meant for a GPU")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto: the fastest there is")
    seed: int = setting(0, "of weights, order and augmentation", low=0, high=2**32 - 1)
    seeds: int | None = setting(None, "so many runs, with seeds from --seed on; none: one run", low=1)
    sync_norm: bool = setting(True, "normalise over the rows of all processes (torchrun)")
    share_muon: bool = setting(False, "muon: each process orthogonalises some of the matrices")
    process_timeout: float = setting(300.0, "seconds until a process without answer is lost", low=1)
    deterministic: bool = setting(False, "on CUDA, only kernels that repeat to the bit; slower")
    output: str | None = setting(None, "run folder; none: runs/MODEL-DATASET-TIME")
    resume: bool = setting(False, "continue the run in --output from its newest whole checkpoint")
    mirror: str | None = setting(None, "second folder for checkpoints, such as one on a mounted drive")
    checkpoint_seconds: float = setting(60.0, "time between checkpoints within an epoch", low=0)
    max_train_batches: int | None = setting(None, "training batches per epoch, for a smoke run", low=1)
    max_test_batches: int | None = setting(None, "test batches per evaluation, for a smoke run", low=1)

    def __post_init__(self) -> None:
        for name in ("data", "output", "mirror", "device"):  # a Path or a torch.device is its text
            if isinstance(getattr(self, name), PurePath | torch.device):
                object.__setattr__(self, name, str(getattr(self, name)))
        if self.flip is None:
            object.__setattr__(self, "flip", self.dataset != "svhn")
        if self.batch_size is None and self.dataset != "folder":  # of a folder, once it is counted
            object.__setattr__(self, "batch_size", 512)
        for name, kind in typing.get_type_hints(Config).items():
            kinds = typing.get_args(kind) or (kind,)
            value = getattr(self, name)
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                wanted = " or ".join(one.__name__ for one in kinds).replace("NoneType", "none")
                raise ValueError(f"{name} must be {wanted}, not {value!r}")
        for name, choices in CHOICES.items():
            choose(name, getattr(self, name), choices)
        for item in fields(self):
            _in_range(item.name, getattr(self, item.name), *item.metadata["range"])
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be positive and finite, not {self.lr}")
        if self.seeds and self.seed + self.seeds > 2**32:
            raise ValueError(f"seeds must be at most {2**32 - self.seed} from there, not {self.seeds}")
        if self.resume and not self.output:
            raise ValueError("resume needs output, the folder of the run to continue")
        side = self.image_size
        if self.cutout >= side:
            raise ValueError(f"cutout must be under the image side, {side}, not {self.cutout}")
        if self.padding >= side:
            raise ValueError(f"padding must be under the image side, {side}, not {self.padding}")
        if self.model != "custom_resnet" and (self.dropout or self.bias):
            raise ValueError(f"dropout and bias are custom_resnet's; {self.model} has neither")
        if self.tta and not self.flip:
            raise ValueError("tta averages with mirror images, which training without flip never shows")
        if self.dataset != "folder" and self.image_size != 32:
            raise ValueError(f"image_size is the folder dataset's; {self.dataset} is 32 px")
        if self.dataset != "folder" and self.fit != Config.fit:
            raise ValueError(f"fit is the folder dataset's; the images of {self.dataset} are square")

    @property
    def model_options(self) -> dict:
        """The keyword arguments of `make_model`."""
        custom = {"dropout": self.dropout, "bias": self.bias} if self.model == "custom_resnet" else {}
        return {"width": self.width, **custom}

    @property
    def optimizer_options(self) -> dict:
        """The keyword arguments of `make_optimizer`."""
        return {"weight_decay": self.weight_decay, "head_lr_scale": self.head_lr_scale}

    @property
    def identity(self) -> dict:
        """What the run is, apart from where it is kept."""
        return {name: value for name, value in asdict(self).items() if name not in STORAGE_FIELDS}

    @property
    def recipe(self) -> dict:
        """What runs have in common that differ in their seed alone."""
        return {
            name: value for name, value in self.identity.items() if name not in ("seed", *MAY_DIFFER)
        }

    @property
    def fit_options(self) -> dict:
        """The keyword arguments of `fit_model` that are plain fields."""
        names = ("precision", "label_smoothing", "ema_decay", "seed", "compile", "tta", "sync_norm")
        return {name: getattr(self, name) for name in names}

    @property
    def checkpoint_options(self) -> dict:
        """The keyword arguments of `Checkpoints` that are plain fields."""
        return {"resume": self.resume, "mirror": self.mirror, "seconds": self.checkpoint_seconds}


def _in_range(name: str, value: Any, low: float | None, high: float) -> None:
    """Refuse a number that is too small or too large."""
    if value is None or low is None or low <= value <= high:
        return
    upper = "" if high == math.inf else f" and at most {high}"
    raise ValueError(f"{name} must be at least {low}{upper}, not {value}")


def make_parser(prog: str, description: str | None, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose errors are one line, exit code 2, and name the nearest flag."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=29),
    )

    settings = {f"--{item.name.replace('_', '-')}" for item in fields(Config)}

    def refuse(message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        hint = nearest(flags[0], parser._option_string_actions) if flags else ""
        if flags and flags[0] in settings:
            hint = f"; {flags[0]} is a setting of training, and {prog} takes it from the run"
        parser.exit(2, f"{prog}: {message}{hint}\n")

    parser.error = refuse  # type: ignore[method-assign]  # instead of a class with this one method
    return parser


def parse_config(argv: list[str], prog: str = "main.py", usage: str | None = None) -> Config:
    """Read a run from flags: the recipe's fields, then whatever the flags override.

    Raises:
        SystemExit: 2, after one line on stderr that names the flag and what is allowed.
    """
    parser = make_parser(prog, None, usage or f"{prog} [flags]")
    parser._optionals.title = "flags, each shown with its default"
    parser.add_argument(
        "--recipe",
        default="custom_resnet",
        metavar="custom_resnet",
        help=f"starting point: {', '.join(RECIPES)}",
    )
    types = typing.get_type_hints(Config)
    group: argparse._ActionsContainer = parser
    for item in fields(Config):
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        add_flag(group, item, types[item.name])
    settings = vars(parser.parse_args(argv))
    try:
        recipe = settings.pop("recipe")
        choose("recipe", recipe, RECIPES)
        settings = RECIPES[recipe] | settings
        if settings.get("resume") and settings.get("output"):
            for path in described(settings["output"]):
                return resumed(settings, path)
        return Config(**settings)
    except ValueError as error:
        parser.error(str(error))


def described(folder: str | Path) -> list[Path]:
    """The file that describes the run or the seeds in a folder; none if neither is there."""
    return [path for path in (Path(folder, RUN_FILE), Path(folder, SEEDS_FILE)) if path.exists()]


def resumed(settings: dict[str, Any], path: Path) -> Config:
    """The run whose configuration lies in a file, with what is given of where and how it is kept.

    Raises:
        ValueError: something is given that is not as the run has it; all that differs is named.
    """
    try:
        stored = json.loads(read_bytes(path))
        check_version(stored)
        before = Config(**stored)
        now = Config(**{**stored, **settings})
    except (OSError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not what a run writes ({error})") from None
    if (now.seeds or 0) < (before.seeds or 0):
        raise ValueError(f"seeds must be at least {before.seeds}, as {path} says, not {now.seeds}")
    # A folder of one run in which nothing is trained yet may be begun anew, as something else.
    if path.name == SEEDS_FILE or any(path.parent.glob("checkpoints/step-*.ckpt")):
        named = {name: value for name, value in now.identity.items() if name in settings}
        check_same_settings(before.identity, named)
    return now


def check_version(stored: dict) -> None:
    """Refuse the configuration of a run that has settings which are not of this version.

    Raises:
        ValueError: they are named.
    """
    unknown = ", ".join(sorted(stored.keys() - {item.name for item in fields(Config)}))
    if unknown:
        raise ValueError(
            f"the run is of another version of this package, which has the settings {unknown}: continue "
            "it with that version, or start another with another --output (and --mirror)"
        )


def check_same_settings(before: dict, now: dict) -> None:
    """Refuse to continue a run with other settings: all that differ are named, and what would do.

    Raises:
        ValueError: one line.
    """
    free = (*MAY_DIFFER, "workers") if before.get("workers") and now.get("workers") else MAY_DIFFER
    other = {
        name: (before.get(name), value)
        for name, value in now.items()
        if name not in free and before.get(name) != value
    }
    if other:
        differences = ", ".join(f"{name} {old}, not {new}" for name, (old, new) in other.items())
        cures = " ".join(flag_of(name, old) for name, (old, _) in other.items())
        raise ValueError(
            f"the run has {differences}: continue it {cures}, "
            "or start another with another --output (and --mirror)"
        )


def flag_of(name: str, value: Any) -> str:
    """How a setting is given on the command line, in words."""
    flag = name.replace("_", "-")
    if value is None:
        return f"without --{flag}"
    if isinstance(value, bool):
        return f"with --{'' if value else 'no-'}{flag}"
    return f"with --{flag} {value}"


def command_of(config: Config) -> str:
    """The command that starts the same run again, in a folder of its own."""
    words = ["python", "main.py"]
    usual = asdict(Config(dataset=config.dataset)) | {"dataset": Config.dataset}
    for item in fields(Config):
        value = getattr(config, item.name)
        if value == usual[item.name] or item.name in STORAGE_FIELDS:
            continue
        name = item.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def add_flag(group: argparse._ActionsContainer, item: Field, kind: type) -> None:
    """Turn a field of `Config` into a flag of a parser's group; a flag not given leaves no trace.

    The help shows the default in the value's place, and of --FLAG and --no-FLAG the one that changes it.
    """
    name = item.name.replace("_", "-")
    choices = CHOICES.get(item.name)
    switch = bool in (kind, *typing.get_args(kind))
    on = switch and item.default is not False
    words = [item.metadata["help"], ", ".join(choices or ())]
    help = ("do not " if on else "") + ": ".join(filter(None, words))
    common: dict[str, Any] = {
        "dest": item.name,
        "default": argparse.SUPPRESS,
        "help": help.replace("%", "%%"),
    }
    if switch:
        shown, other = (f"--no-{name}", f"--{name}") if on else (f"--{name}", f"--no-{name}")
        group.add_argument(shown, action="store_const", const=not on, **common)
        common["help"] = argparse.SUPPRESS
        group.add_argument(other, action="store_const", const=on, **common)
        return
    plain = next(k for k in (typing.get_args(kind) or (kind,)) if k is not type(None))
    metavar = plain.__name__.upper() if item.default is None else str(item.default)
    group.add_argument(f"--{name}", type=plain, metavar=metavar, **common)
