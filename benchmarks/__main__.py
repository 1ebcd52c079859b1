"""All benchmarks, one after the other, and one table at the end.

    python -m benchmarks [--quick] [--only NAME,NAME] [--out FOLDER] [--markdown FILE]

Each runs in a process of its own, so that none warms another up or leaves memory behind. Ratios are
formed within a round, medians and ranges taken over rounds. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.table import load, markdown, save, show

ROOT = pathlib.Path(__file__).parents[1]

# Name → (module, arguments, arguments of a quick look)
ALL = {
    "loop-micro": ("loops", "--model micro --steps 50 --rounds 7", "--steps 20 --rounds 3"),
    "loop-70m": ("loops", "--model 70m --steps 10 --rounds 5", "--model 70m --steps 10 --rounds 1"),
    "spectra-70m": ("spectra", "--model 70m --rounds 7", "--model 70m --rounds 1"),
    "spectra-micro": ("spectra", "--model micro --rounds 15", "--model micro --rounds 3"),
    "memory": ("memory", "", "--models 70m --predicted 1b --ways full"),
    "logging": ("overhead", "--rounds 5", "--rounds 1"),
    "hvp": ("hvp", "--rounds 9", "--rounds 3"),
    "summarize": ("summarize", "--ways bulk --rounds 5", "--ways bulk --rounds 1 --runs 100"),
}


def main() -> None:
    """Run, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that all runs")
    parser.add_argument(
        "--only", default=",".join(ALL), help="names of benchmarks, comma-separated"
    )
    parser.add_argument("--out", default="", help="folder that keeps the numbers as JSON")
    parser.add_argument("--markdown", default="", help="file for the table in Markdown")
    options = parser.parse_args()
    unknown = [name for name in options.only.split(",") if name not in ALL]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(ALL)}")
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.out or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only.split(","):
            module, full, quick = ALL[name]
            path, begin = folder / f"{name}.json", time.perf_counter()
            arguments = (quick if options.quick else full).split()
            command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
            done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=False)
            print(f"[{name}: {time.perf_counter() - begin:.0f} s]", flush=True)
            if done.returncode:
                failed.append(name)
            else:
                rows += load(path)
        if options.out:
            save(str(folder / "all.json"), rows)
    if options.markdown:
        pathlib.Path(options.markdown).write_text(markdown(rows))
    show("All benchmarks", rows)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
