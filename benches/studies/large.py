"""Reading language models that are larger than memory: their analysis on the meta device, time and resident memory.

    python benches/studies/large.py

Each row is a process of its own: transformers' LlamaForCausalLM of that size, without weights. Writes docs/large.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent.parent / "docs" / "large.md"
B8 = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
B405 = {**B8, "hidden_size": 16384, "num_attention_heads": 128, "intermediate_size": 53248}
ROWS: dict[str, tuple[dict[str, int], float | None, float | None]] = {  # config, limits in seconds and in GB
    "8B": ({**B8, "num_hidden_layers": 32}, 1.5, 1.2),
    "405B": ({**B405, "num_hidden_layers": 126}, 6.0, 1.5),
    **{f"8B's width, {n} layers": ({**B8, "num_hidden_layers": n}, None, None) for n in (8, 16, 32, 64, 128)},
}


def measure(config: dict[str, int]) -> dict[str, Any]:
    """Seconds of one analysis, the process' peak of resident bytes, and what was found."""
    import torch
    import transformers

    import prunekit

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    start = time.perf_counter()
    structure = prunekit.analyze(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
        "axes": len(structure.axes),
        "prunable": len(structure.prunable),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(json.loads(given.measure))))
        return 0
    lines = ["| model | parameters | axes | prunable | seconds | limit | resident | limit |", "|---|" + "---:|" * 7]
    late = 0
    for name, (config, seconds, gigabytes) in ROWS.items():
        command = [sys.executable, __file__, "--measure", json.dumps(config)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        found = json.loads(run.stdout.splitlines()[-1])
        late += seconds is not None and found["seconds"] > seconds
        late += gigabytes is not None and found["resident"] > gigabytes * 1e9
        limits = [f"{limit:.1f} {unit}" if limit else "" for limit, unit in ((seconds, "s"), (gigabytes, "GB"))]
        size, resident = f"{found['parameters'] / 1e9:.1f} G", f"{found['resident'] / 1e9:.2f} GB"
        cells = [name, size, found["axes"], found["prunable"], f"{found['seconds']:.2f} s", limits[0], resident, limits[1]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
    versions = ", ".join(f"{p} {version(p)}" for p in ("prunekit-core", "torch", "transformers"))
    head = [
        "# Models larger than memory",
        "",
        f"Written by `make large` on {date.today()}: {versions}, Python {platform.python_version()}, {os.cpu_count()} cores. "
        "`analyze` of transformers' `LlamaForCausalLM` on the meta device, without weights; one process a row. Resident memory "
        "is the peak of the whole process, of which torch and transformers take most.",
        "",
    ]
    PAGE.write_text("\n".join([*head, *lines]) + "\n")
    return int(late > 0)


if __name__ == "__main__":
    raise SystemExit(main())
