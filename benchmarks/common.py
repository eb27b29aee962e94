"""What the benchmarks share: rounds, medians, one form of result, its file and its table."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from files import write_whole
from utils import environment, get_device, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def make_parser(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The flags that benchmarks share; `rounds`, where there are any, is their number by default."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny settings: see that it works")
    parser.add_argument("--output", type=Path, help="folder for the JSON (default: benchmarks/results)")
    return parser


def measure(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each variant once a round, every other round backwards, so that noise hits all alike."""
    values: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            values[name].append(variants[name]())
            print(f"round {number + 1} of {rounds}, {name}: {values[name][-1]:.4g}", flush=True)
    return values


def spread(values: list[float]) -> dict:
    """Median, least and greatest of some measurements, and all of them."""
    middle = statistics.median(values)
    return {"median": middle, "low": min(values), "high": max(values), "values": values}


def ratios(above: list[float], below: list[float]) -> list[float]:
    """The quotient of two variants in each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def make_row(variant: str, values: list[float], **columns: Any) -> dict:
    """One variant of a result; `columns` are further cells of its table row."""
    return {"variant": variant, **spread(values), "columns": columns}


def make_claim(text: str, values: list[float], target: float | None = None, most: bool = False) -> dict:
    """A ratio, and what it should be at least, or with `most` at most; no target: it is only stated."""
    summary = spread(values)
    sign = -1 if most else 1
    met = None if target is None else sign * summary["median"] >= sign * target
    return {"claim": text, **summary, "target": target, "most": most, "met": met}


def make_result(
    name: str, unit: str, rows: list[dict], claims: list[dict], args: argparse.Namespace, **settings: Any
) -> dict:
    """One benchmark's result: what was measured, on what, when, and how it can be measured again."""
    return {
        "name": name,
        "unit": unit,
        "rows": rows,
        "claims": claims,
        "settings": settings | {"rounds": args.rounds},
        "smoke": args.smoke,
        **machine_facts(getattr(args, "device", "cpu")),
        "command": f"python -m benchmarks.{name}",
    }


def machine_facts(device: str) -> dict:
    """The machine, its versions and the date."""
    facts = environment(get_device(device))
    return {**facts, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "date": today()}


def today() -> str:
    """The date, such as 2026-01-31."""
    return time.strftime("%Y-%m-%d")


def result_folder(args: argparse.Namespace) -> Path:
    """Where a result goes; what tiny settings give never lies beside what was measured."""
    folder = args.output or (RESULTS / "smoke" if args.smoke else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def publish(result: dict, args: argparse.Namespace) -> None:
    """Write NAME.json and print the table."""
    path = result_folder(args) / f"{result['name']}.json"
    write_whole(path, json.dumps(result, indent=1) + "\n")
    print(f"\n{render(result)}\n\nwritten to {path}")


def render(result: dict) -> str:
    """A result as Markdown: its variants, its claims, and where the numbers are from."""
    heads = list(result["rows"][0]["columns"])
    rows = [
        [row["variant"], quantity(row["median"]), interval(row), *row["columns"].values()]
        for row in result["rows"]
    ]
    parts = [markdown_table([result["name"], result["unit"], "range", *heads], rows)]
    if result["claims"]:
        cells = [
            [claim["claim"], quantity(claim["median"]), interval(claim), aim(claim)]
            for claim in result["claims"]
        ]
        parts.append(markdown_table(["ratio", "median", "range", "claimed"], cells))
    parts += [result["note"]] if result.get("note") else []
    versions = ", ".join(result["versions"].split(", ")[:2])
    rounds = result["settings"]["rounds"]
    parts.append(
        f"{result['machine']}; {versions}; {result['date']}; medians of {rounds} rounds; "
        f"`{result['command']}`"
    )
    return "\n\n".join(parts)


def aim(claim: dict) -> str:
    """What was claimed, and whether it holds."""
    if claim["target"] is None:
        return ""
    sense = "at most" if claim["most"] else "at least"
    return f"{sense} {claim['target']:g}: {'met' if claim['met'] else '**not met**'}"


def interval(values: dict) -> str:
    """Least to greatest."""
    return f"{quantity(values['low'])} to {quantity(values['high'])}"


def quantity(value: float) -> str:
    """A number with four digits that count, and no exponent."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = next((n for limit, n in ((100, 1), (10, 2), (0.1, 3)) if abs(value) >= limit), 5)
    return f"{value:.{digits}f}"
