"""Tables: puts the results into the README and docs, between markers, so that no number is typed.

python -m benchmarks.tables

`<!-- bench:NAME -->` and `<!-- end -->` enclose what benchmarks/results/NAME.json holds; between
`<!-- bench:accuracy -->` and its end are all files of benchmarks/results/accuracy, between
`<!-- bench:battery -->` and its end what `make battery` wrote, but for the faults over several
processes, which are between `<!-- bench:processes -->` and its end.
"""

import re
from pathlib import Path

from benchmarks import common, time_to_accuracy
from files import write_whole
from utils import markdown_table

PAGES = tuple(
    common.ROOT / name
    for name in ("README.md", "docs/benchmarks.md", "docs/reliability.md", "docs/distributed.md")
)
BATTERY = common.ROOT / "tests" / "battery" / "results.json"
MARKERS = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_of(name: str, folder: Path) -> str:
    """A marker's table, or a line that says that there is none yet.

    Raises:
        ValueError: the result is of tiny settings.
    """
    if name == "accuracy":
        paths = sorted((folder / name).glob("*.json"))
        records = [record for record in map(common.read_json, paths) if record["mean"] is not None]
        records.sort(key=lambda record: (record["parameters"], record["command"], record["machine"]))
        return time_to_accuracy.render(records) if records else "Not measured yet."
    if name == "battery":
        return render_battery(common.read_json(BATTERY)) if BATTERY.exists() else "`make battery`."
    if name == "processes":
        return render_processes(common.read_json(BATTERY)) if BATTERY.exists() else "`make battery`."
    path = folder / f"{name}.json"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks.{name}`."
    result = common.read_json(path)
    if result["smoke"]:
        raise ValueError(f"{path} was measured with tiny settings")
    return common.render(result)


def render_battery(results: dict) -> str:
    """What `make battery` wrote, as Markdown."""
    rows = []
    for row in results["rows"]:
        if row["stage"] == "processes":
            continue
        fault = row["fault"] + f" ({row['note']})" * bool(row["note"])
        rows.append([fault, f"{row['tried']:,}", f"{row['landed']:,}", row["losses"], row["control"]])
    heads = ["fault", "tried", "landed", "losses", "the same without the guard"]
    versions = ", ".join(results["versions"].split(", ")[:2])
    facts = f"{results['machine']}; {versions}; {results['minutes']:.0f} minutes; `make battery`"
    return f"{markdown_table(heads, rows, left=(0, 4))}\n\n{facts}"


def render_processes(results: dict) -> str:
    """What `make battery` wrote of faults over several processes."""
    rows = [
        [row["fault"], row["tried"], row["landed"], row["losses"], row["note"], row["control"]]
        for row in results["rows"]
        if row["stage"] == "processes"
    ]
    if not rows:
        return "Not tried yet: `python -m tests.battery processes`."
    heads = ["fault", "tried", "landed", "losses", "all were gone after", "what was said"]
    return markdown_table(heads, rows, left=(0, 4, 5)) + "\n\n`python -m tests.battery processes`"


def fill(text: str, folder: Path = common.RESULTS) -> str:
    """A text with every marker's table made anew."""
    return MARKERS.sub(lambda match: f"{match[1]}{table_of(match[2], folder)}\n{match[3]}", text)


def main() -> None:
    """Write the pages with their tables."""
    for page in PAGES:
        write_whole(page, fill(page.read_text(encoding="utf-8")))
    pages = ", ".join(str(page.relative_to(common.ROOT)) for page in PAGES)
    print(f"the tables in {pages} are those of {common.RESULTS.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
