"""The arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.budget import Scope

Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:factory.", metavar="MODEL")]
Shape = Annotated[str, typer.Option("--input", metavar="SHAPE", help="Such as 1,3,224,224; without, the model's own.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Ratio = Annotated[float | None, typer.Option(help="Share of each axis to remove, in [0, 1); 0.3 without a budget.")]
Macs = Annotated[str, typer.Option(help="MACs that may remain: a share up to 1, or a number such as 300M.")]
Params = Annotated[str, typer.Option(help="Parameters that may remain: a share up to 1, or a number such as 5M.")]
Memory = Annotated[str, typer.Option(help="Peak memory that may remain: a share up to 1, or such as 20MB.")]
Latency = Annotated[str, typer.Option(help="Latency that may remain: a share up to 1, or such as 12ms.")]
Where = Annotated[Scope, typer.Option(help="Rank within each axis, or across all of them.")]
WeightsFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A state_dict, .pth or .safetensors.")]
Chosen = Annotated[list[str] | None, typer.Option(help="Kinds or names of axes to prune, globs too, or all; may be repeated.")]
Ignored = Annotated[list[str] | None, typer.Option(help="Kinds or names of axes to leave; may be repeated.")]
RoundTo = Annotated[int, typer.Option(help="Keep multiples of this many.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the algorithm; may be repeated."),
]
Seed = Annotated[int, typer.Option(help="For random weights and random choices.")]
LossName = Annotated[
    str, typer.Option(metavar="MODULE:FUNCTION", help="Loss of (output, targets); without, cross entropy of classes.")
]
Compensate = Annotated[str, typer.Option(help="What makes up for what goes: auto, bias, least_squares, merge or none.")]
SearchName = Annotated[str, typer.Option(help="How ratios are found: uniform, sensitivity, evolution, or a plugin's.")]
