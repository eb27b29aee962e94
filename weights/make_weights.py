"""Makes weights/NAME.safetensors and its card of a run: `python -m weights.make_weights RUN`."""

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path

from config import Config, command_of
from files import write_whole
from run import test_images
from training.loops import test
from utils import History, get_device, name_of, pick_precision
from weights_file import SHIPPED, load_weights, save_weights

CARD = """# {model}

A network for images of 32 x 32 pixels, trained on all 50,000 training images of CIFAR-10. This page is
made by `python -m weights.make_weights RUN`.

| what | value |
|---|---|
| network | `{model}`, {options}, {parameters:,} parameters |
| trained by | `{command}` |
| on | {machine}; {versions} |
| time | {minutes:.0f} minutes of training, {epochs} epochs, seed {seed} |
| accuracy | {full}, on all 10,000 test images, at the last epoch; nothing was chosen on them |
| on the sample in the repository | {sample}, of its 1,000 test images |
| tested again by | `python main.py test --weights {name}` (`--precision fp32` for the second figure) |
| file | `{name}.safetensors`, {size:,} bytes, fp16 |
| SHA-256 | {sha256} |
| input | RGB, 32 x 32, in [0, 1], less the mean {mean}, divided by {std} |
| classes | {classes} |

**Limits.** It knows ten classes and always answers one of them. It has seen small, centred photographs
alone, gathered from the web in 2008; what that web showed more often it knows better. Its probabilities
are too sure for what it has not seen, and it is for study, not for decisions about people. CIFAR-10 is
Krizhevsky's (*Learning multiple layers of features from tiny images*, 2009).
"""


def accuracies(path: Path, dataset: str, config: Config) -> str:
    """Test accuracy of a weights file in this machine's precision and in fp32, in words."""
    model, card = load_weights(path)
    device, phrases = get_device(), []
    _, loader = test_images(replace(config, dataset=dataset), card, device)
    for precision in ("auto", "fp32"):
        name = name_of(pick_precision(precision, device))
        stats = test(model, device, loader, precision=precision, tta=config.tta)
        phrases.append(f"{stats.accuracy:.2%} in {name}")
    return ", ".join(phrases)


def main() -> None:
    """Write a run's weights as fp16, read them again, judge them, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    model, card = load_weights(run)
    config, history = Config(**card["config"]), History.load(run)
    if config.dataset != "cifar10" or config.val_split or config.max_train_batches:
        parser.error(f"{run} did not train on all of CIFAR-10's training images")
    path = SHIPPED / f"{config.model}.safetensors"
    save_weights(path, model.half(), card)
    facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    text = CARD.format(
        **facts,
        name=config.model,
        model=config.model,
        options=", ".join(f"{name} {value}" for name, value in card["options"].items()),
        parameters=sum(p.numel() for p in model.parameters()),
        command=command_of(config),
        minutes=sum(row.seconds for row in history.epochs) / 60,
        epochs=len(history.epochs),
        seed=config.seed,
        full=accuracies(path, config.dataset, config),
        sample=accuracies(path, "cifar10-sample", config),
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        mean=", ".join(f"{x:.4f}" for x in card["mean"]),
        std=", ".join(f"{x:.4f}" for x in card["std"]),
        classes=", ".join(card["classes"]),
    )
    write_whole(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
