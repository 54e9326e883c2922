"""Exports: ONNX in onnxruntime, programs of torch.export and torch.compile compute what the cut model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import prunekit
from prunekit.errors import ExportError, InvalidArgumentError
from prunekit.export import to_onnx, to_pt2
from prunekit.testing import randomize


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1, groups=2)
        self.norm, self.outer, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.outer(self.norm(self.inner(x)).relu())).mean((2, 3)))


class HardCoded(nn.Module):
    """Its code cannot follow a cut of its heads; the graph backend can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj, self.head = nn.Linear(6, 24), nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.proj(out.transpose(1, 2).reshape(n, length, c))).mean(1)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Frozen(Plain):
    """The batch size is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, 4))


class Noisy(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.rand_like(out)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
    return transformers.BertModel(transformers.BertConfig(**sizes))


TOKENS = {
    "attention_mask": torch.ones(1, 7, dtype=torch.long),
    "input_ids": torch.arange(7)[None],
}  # not the order of forward
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "convolutions": (Residual, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {}),
    "graph": (HardCoded, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), {"backend": "graph", "axes": "all"}),
    "bert": (bert, TOKENS, {}),
}


def cut_model(name: str) -> tuple[nn.Module, Any]:
    make, x, options = CASES[name]
    torch.manual_seed(0)
    model = make()
    randomize(model, x if isinstance(x, dict) else (x,))
    small = prunekit.prune(model.eval(), "filter_norm", x, ratio=0.4, **options)
    assert prunekit.plan_of(small).keep
    return small, x


def batch_of(x: Any, size: int) -> dict[str, Tensor] | tuple[Tensor]:
    """Another batch, of other values."""
    if isinstance(x, dict):
        return {name: t.repeat(size, 1).roll(3, 1) for name, t in x.items()}
    return (torch.randn(size, *x.shape[1:], generator=torch.Generator().manual_seed(1)),)


def called(model: Callable[..., Any], batch: dict[str, Tensor] | tuple[Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(*batch)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", CASES)
def test_onnx_computes_the_same_on_batches_of_any_size(name: str, tmp_path: Path) -> None:
    small, x = cut_model(name)
    file = to_onnx(small, tmp_path / "model.onnx", x)
    assert list(tmp_path.iterdir()) == [file]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in (1, 2, 5):
        batch = batch_of(x, size)
        named = batch if isinstance(batch, dict) else {session.get_inputs()[0].name: batch[0]}
        out = torch.from_numpy(session.run(None, {n: t.numpy() for n, t in named.items()})[0])
        torch.testing.assert_close(out, called(small, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_program_of_torch_export_computes_the_same_on_batches_of_any_size(name: str, tmp_path: Path) -> None:
    small, x = cut_model(name)
    program = torch.export.load(to_pt2(small, tmp_path / "model.pt2", x)).module()
    for size in (2, 5):
        batch = batch_of(x, size)
        torch.testing.assert_close(called(program, batch), called(small, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_model_compiles_in_one_graph_and_trains(name: str) -> None:
    small, x = cut_model(name)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    batch = batch_of(x, 3)
    torch.testing.assert_close(called(compiled, batch), called(small, batch), rtol=0, atol=1e-5)
    out = compiled(**batch) if isinstance(batch, dict) else compiled(*batch)
    (out if isinstance(out, Tensor) else out[0]).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())


def test_inductor_compiles_a_cut_model() -> None:
    small = prunekit.prune(Plain().eval(), "filter_norm", torch.randn(2, 4))
    batch = (torch.randn(3, 4),)
    torch.testing.assert_close(called(torch.compile(small), batch), called(small, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("export", [to_onnx, to_pt2])
def test_a_batch_size_in_the_code_has_to_be_accepted(export: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export(Frozen().eval(), tmp_path / "m", x)
    assert list(tmp_path.iterdir()) == []
    assert export(Frozen().eval(), tmp_path / "m", x, dynamic_batch=False).is_file()


@pytest.mark.parametrize("export", [to_onnx, to_pt2])
def test_the_model_keeps_its_modes_and_is_exported_in_eval_mode(export: Any, tmp_path: Path) -> None:
    small, x = cut_model("convolutions")
    small.train()
    small.norm.eval()  # type: ignore[union-attr]
    before = {n: t.clone() for n, t in small.state_dict().items()}
    export(small, tmp_path / "m", x)
    assert small.training
    assert not small.norm.training  # type: ignore[union-attr]
    assert all(t.equal(before[n]) for n, t in small.state_dict().items())


@pytest.mark.parametrize("export", [to_onnx, to_pt2])
def test_what_differs_is_not_written(export: Any, tmp_path: Path) -> None:
    """Random numbers are not the same twice, so the check has to find them."""

    (tmp_path / "m").write_text("old")
    with pytest.raises(ExportError, match="differs from it by"):
        export(Noisy().eval(), tmp_path / "m", torch.randn(2, 4))
    assert (tmp_path / "m").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_weights_of_a_large_model_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.export.SEPARATE", 1)
    small, x = cut_model("convolutions")
    file = to_onnx(small, tmp_path / "model.onnx", x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(out, called(small, (x,)), rtol=0, atol=1e-4)


def test_bad_arguments_say_what_to_do(tmp_path: Path) -> None:
    model = Plain().eval()
    with pytest.raises(ExportError, match=r"there is no folder .*nowhere; create it first"):
        to_onnx(model, tmp_path / "nowhere" / "m.onnx", torch.randn(2, 4))
    with pytest.raises(ExportError, match="is a folder; name the file"):
        to_onnx(model, tmp_path, torch.randn(2, 4))
    with pytest.raises(InvalidArgumentError, match="hold no tensor; pass a tensor"):
        to_onnx(model, tmp_path / "m.onnx", None)
    with pytest.raises(InvalidArgumentError, match=r"sizes \[2, 3\] in dimension 0.*dynamic_batch=False"):
        to_pt2(model, tmp_path / "m.pt2", (torch.randn(2, 4), torch.randn(3, 4)))


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    own = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxscript":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return own(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ExportError, match=r"pip install 'prunekit-core\[onnx\]' \(there is no onnxscript\)"):
        to_onnx(Plain().eval(), tmp_path / "m.onnx", torch.randn(2, 4))
