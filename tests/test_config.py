import re
import shlex
from dataclasses import fields

import pytest

from config import CHOICES, RECIPES, Config, command_of, parse_config
from training.optim import OPTIMIZERS


def test_no_flags_are_the_defaults():
    assert parse_config([]) == Config()


def test_the_optimizers_to_choose_from_are_those_that_can_be_made():
    assert CHOICES["optimizer"] == OPTIMIZERS


def help_of(capsys, monkeypatch):
    """The lines of --help on a screen of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_every_field_is_a_flag_with_its_default_on_one_line(capsys, monkeypatch):
    lines = help_of(capsys, monkeypatch)
    for item in fields(Config):
        flag, value = f"--{item.name.replace('_', '-')}", f" {item.default}"
        if item.type in (bool, bool | None):  # shown is the one that changes it
            flag, value = flag if item.default is False else flag.replace("--", "--no-"), ""
        elif item.default is None:
            value = ""
        (index,) = [k for k, line in enumerate(lines) if line.startswith(f"  {flag}{value} ")]
        if item.name not in ("model", "dataset"):  # whose names may fill two lines
            assert index + 1 == len(lines) or not lines[index + 1].startswith(" " * 20)


def test_mirror_images_are_not_judged_where_none_were_trained_on():
    with pytest.raises(ValueError, match="tta averages with mirror images"):
        Config(dataset="svhn", tta=True)
    assert Config(tta=True).fit_options["tta"]


def test_the_help_fits_a_screen_and_has_its_groups(capsys, monkeypatch):
    lines = help_of(capsys, monkeypatch)
    groups = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[1:] == ["model", "data", "training", "augmentation", "where and how it runs"]
    assert len(lines) <= 60 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--epoch", "3"], "; did you mean --epochs?"),
        (["--batch_size=3"], "; did you mean --batch-size?"),
        (["--no-flp"], "; did you mean --no-flip?"),
        (["--recipe", "qick"], "; did you mean quick?"),
        (["--xyz"], "unrecognized arguments: --xyz"),
        (["--epochs", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_misspelt_flag_or_recipe_is_answered_with_the_nearest(flags, hint, capsys):
    with pytest.raises(SystemExit):
        parse_config(flags)
    assert capsys.readouterr().err.endswith(f"{hint}\n")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_diff_that_flags_override(recipe):
    config = parse_config(["--recipe", recipe])
    assert config == Config(**RECIPES[recipe])
    assert parse_config(["--recipe", recipe, "--epochs", "3"]).epochs == 3


def test_the_recipes_of_the_write_ups_are_the_exercise_as_they_word_it():
    def worded(recipe):
        config = Config(**RECIPES[recipe])
        assert (config.optimizer, config.scheduler, config.lr) == ("adam", "onecycle", None)
        return config.model, config.bias, config.epochs, config.flip, config.cutout, config.lr_rule

    assert worded("s10_custom_resnet") == ("custom_resnet", True, 24, True, 8, "minimum")
    assert worded("s11_resnet18") == ("resnet18", False, 20, False, 16, "minimum")
    assert worded("s11_resnet18_steepest") == ("resnet18", False, 20, False, 16, "steepest")
    assert worded("s12_custom_resnet") == ("custom_resnet", False, 24, True, 8, "minimum")
    assert worded("s12_custom_resnet_steepest") == ("custom_resnet", False, 24, True, 8, "steepest")


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--no-flip"], "flip", False),
        (["--bias"], "bias", True),
        (["--lr", "0.1"], "lr", 0.1),
        (["--val-split", "0.1"], "val_split", 0.1),
        (["--max-train-batches", "2"], "max_train_batches", 2),
        (["--output", "there"], "output", "there"),
    ],
)
def test_flags_have_the_types_of_their_fields(flags, field, value):
    assert getattr(parse_config(flags), field) == value


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 64.5, "batch_size must be int or none, not 64.5"),
        ("tta", "x", "tta must be bool, not 'x'"),
        ("seed", True, "seed must be int, not True"),
        ("lr", "0.1", "lr must be float or none, not '0.1'"),
        ("data", None, "data must be str, not None"),
    ],
)
def test_a_field_of_another_type_is_refused(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**{field: value})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vgg"], "unknown model 'vgg'; choose from custom_resnet, resnet18, resnet34"),
        (["--model", "resnet81"], "did you mean resnet18?"),
        (["--recipe", "fast"], "unknown recipe 'fast'; choose from custom_resnet"),
        (["--dataset", "mnist"], "unknown dataset 'mnist'; choose from cifar10"),
        (["--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["--lr-rule", "best"], "unknown lr_rule 'best'"),
        (["--precision", "int8"], "unknown precision 'int8'"),
        (["--epochs", "0"], "epochs must be at least 1, not 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--lr", "-0.1"], "lr must be positive and finite, not -0.1"),
        (["--lr", "nan"], "lr must be positive and finite, not nan"),
        (["--batch-size", "1"], "batch_size must be at least 2, not 1"),
        (["--val-split", "1"], "val_split must be at least 0 and at most 0.9, not 1.0"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0, not nan"),
        (["--cutout", "32"], "cutout must be under the image side, 32, not 32"),
        (["--padding", "32"], "padding must be under the image side, 32, not 32"),
        (["--grayscale", "1"], "grayscale must be at least 0 and at most 0.99, not 1.0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--model", "resnet18", "--dropout", "0.1"], "dropout and bias are custom_resnet's"),
        (["--dataset", "svhn", "--image-size", "64"], "the folder dataset's; svhn is 32 px"),
        (["--fit", "pad"], "fit is the folder dataset's; the images of cifar10 are square"),
        (["--dataset", "folder", "--fit", "stretch"], "unknown fit 'stretch'; choose from squeeze"),
        (["--image-size", "64"], "image_size is the folder dataset's"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(flags)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dataset", "svhn"],
        ["--dataset", "svhn", "--flip"],
        ["--recipe", "demo"],
        ["--no-flip", "--bias", "--lr", "0.1", "--data", "a b"],
    ],
)
def test_the_command_of_a_run_describes_the_same_run(flags):
    config = parse_config(flags)
    words = shlex.split(command_of(config))
    assert words[:2] == ["python", "main.py"] and parse_config(words[2:]) == config


def test_digits_are_not_mirrored_unless_asked_for():
    assert Config().flip and Config(dataset="cifar100").flip and not Config(dataset="svhn").flip
    assert Config(dataset="svhn", flip=True).flip and not Config(flip=False).flip
    assert "flip" not in command_of(Config(dataset="svhn")) and "flip" not in command_of(Config())


def test_a_batch_is_512_but_for_a_folder_whose_images_are_not_counted_yet():
    assert Config().batch_size == Config(dataset="svhn").batch_size == 512
    assert Config(dataset="folder").batch_size is None
    assert Config(dataset="folder", batch_size=512).batch_size == 512
    assert "--batch-size 512" in command_of(Config(dataset="folder", batch_size=512))
    assert "batch" not in command_of(Config(dataset="folder")) + command_of(Config())
