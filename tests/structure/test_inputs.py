"""Example inputs and calibration batches."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit.errors import ExampleInputsError, ForwardError
from prunekit.model import Inputs, as_inputs, calibration_batches, default_inputs, output_tensors

Pair = namedtuple("Pair", "left right")


@dataclass
class Boxes:
    corners: Tensor
    label: str
    scores: Tensor


@contextmanager
def no_global_randomness() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# --- as_inputs -------------------------------------------------------------------------------------------------------


def test_a_tensor_and_a_list_are_one_argument_a_tuple_several_a_mapping_keywords():
    x, y = zeros(1), zeros(2)
    assert as_inputs(x).args == (x,)
    assert as_inputs([x, y]).args == ([x, y],)
    assert as_inputs((x, y)).args == (x, y)
    assert as_inputs({"x": x, "flag": True}).kwargs == {"x": x, "flag": True}
    assert as_inputs(UserDict(x=x)).kwargs == {"x": x}  # what transformers' tokenizers return


def test_inputs_pass_through_as_they_are():
    inputs = as_inputs(zeros(1))
    assert as_inputs(inputs) is inputs


@pytest.mark.parametrize("wrong", [None, 3, "x", (), [], {}, (1, 2), {1: torch.zeros(1)}])
def test_what_holds_no_tensors_is_refused_with_what_to_pass(wrong: Any):
    with pytest.raises(ExampleInputsError, match="pass a tensor, a list"):
        as_inputs(wrong)


def test_the_text_of_inputs_shows_types_and_shapes():
    inputs = Inputs((zeros(2, 3), [zeros(1, dtype=torch.int64)]), {"flag": True})
    assert str(inputs) == "float32 [2, 3], list of (int64 [1]), flag=bool"


# --- calls and errors ------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def forward(self, x: Tensor, *, by: float = 2.0) -> Tensor:
        if by == 0:
            raise ValueError("by is zero\nand a long story")
        return x * by


def test_call_passes_positions_and_keywords():
    assert Inputs((torch.ones(1),), {"by": 3.0}).call(Scale()).item() == 3.0


def test_arguments_that_the_signature_does_not_know_are_bad_inputs():
    with pytest.raises(ExampleInputsError, match=r"Scale\.forward\(x, by\) cannot be called with \(y=float32 \[1\]\)"):
        as_inputs({"y": zeros(1)}).try_on(Scale())


def test_tensors_that_torch_refuses_are_bad_inputs():
    with pytest.raises(ExampleInputsError, match=r"float32 \[1, 5\].*pass example_inputs that fit") as caught:
        as_inputs(zeros(1, 5)).try_on(nn.Sequential(nn.Linear(4, 2)))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_the_forward_itself_raises_is_a_short_forward_error_with_its_cause():
    with pytest.raises(ForwardError, match=r"^Scale\.forward raised ValueError: by is zero; it was given") as caught:
        Inputs((zeros(1),), {"by": 0}).try_on(Scale())
    assert isinstance(caught.value.__cause__, ValueError)


# --- tensors, map ----------------------------------------------------------------------------------------------------


def test_output_tensors_come_in_a_fixed_order_from_any_nesting():
    a, b, c, d, e, f = (torch.full((1,), float(i)) for i in range(6))
    output = OrderedDict(z=a, y=[b, (c, None, 7)], x=Pair(d, Boxes(e, "cat", f)))
    assert [t.item() for t in output_tensors(output)] == [0, 1, 2, 3, 4, 5]


def test_outputs_of_transformers_count_each_tensor_once():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    hidden, pooled = zeros(1), zeros(2)
    found = output_tensors(outputs.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled))
    assert [id(t) for t in found] == [id(hidden), id(pooled)]


def test_map_keeps_the_structure():
    mapped = Inputs((Pair(zeros(1), [zeros(2)]),), {"boxes": Boxes(zeros(3), "cat", zeros(4)), "d": {"k": zeros(5)}}).map(
        lambda t: t + 1
    )
    pair, boxes = mapped.args[0], mapped.kwargs["boxes"]
    assert isinstance(pair, Pair)
    assert isinstance(boxes, Boxes)
    assert boxes.label == "cat"
    assert [len(t) for t in mapped.tensors()] == [1, 2, 3, 4, 5]
    assert all((t == 1).all() for t in mapped.tensors())


def test_map_keeps_outputs_of_transformers_that_are_given_as_inputs():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    given = as_inputs({"encoder_outputs": outputs.BaseModelOutput(last_hidden_state=zeros(2, 3))})
    mapped = given.map(lambda t: t + 1).kwargs["encoder_outputs"]
    assert isinstance(mapped, outputs.BaseModelOutput)
    assert (mapped.last_hidden_state == 1).all()


# --- batches of another size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (torch.zeros(2, 3), 2),
        ((torch.zeros(2, 3), torch.zeros(2), torch.tensor(7)), 2),
        ((torch.zeros(2, 3), torch.zeros(3)), None),
        (torch.tensor(1.0), None),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], 2),  # images, as detection models take them
        ([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)], 1),  # levels of a pyramid
    ],
)
def test_batch_size_is_what_all_tensors_share(inputs: Any, size: int | None):
    assert as_inputs(inputs).batch_size == size


def test_floats_are_redrawn_with_the_same_mean_and_deviation_from_the_seed_alone():
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5 + 2
    with no_global_randomness():
        first, again, other = (as_inputs(x).resized(7, seed=seed).args[0] for seed in (0, 0, 1))
    assert first.shape == (7, 3, 32, 32)
    assert first.dtype == x.dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.mean().item() == pytest.approx(2, abs=0.2)
    assert first.std().item() == pytest.approx(5, rel=0.03)


def test_a_constant_float_stays_constant_and_infinite_ones_are_not_made_nan():
    ones, mask = torch.ones(1, 4), torch.tensor([[0.0, -torch.inf]])
    resized = as_inputs((ones, mask)).resized(3, seed=0)
    assert torch.equal(resized.args[0], torch.ones(3, 4))
    assert set(resized.args[1].flatten().tolist()) == {0.0, -torch.inf}


def test_tokens_stay_in_range_and_roll_together_with_their_mask():
    tokens, mask = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    ids, valid = as_inputs({"ids": tokens, "mask": mask}).resized(5, seed=3).tensors()
    assert ids.shape == valid.shape == (5, 4)
    assert torch.equal(ids > 0, valid)
    assert [sorted(row.tolist()) for row in ids[:2]] == [sorted(row.tolist()) for row in tokens]
    assert not torch.equal(ids[0], ids[2])


def test_images_in_a_list_keep_their_channels():
    images = as_inputs([zeros(3, 8, 8), zeros(3, 9, 9)]).resized(3, seed=0).args[0]
    assert [tuple(image.shape) for image in images] == [(3, 8, 8), (3, 9, 9), (3, 8, 8)]


def test_without_a_common_batch_dimension_there_is_no_other_batch():
    assert as_inputs((zeros(2), zeros(3))).resized(4, seed=0) is None
    assert as_inputs(zeros(0, 3)).resized(4, seed=0) is None


# --- default inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "shape"),
    [
        (nn.Conv1d(2, 4, 3), (1, 2, 224)),
        (nn.Conv2d(3, 4, 3), (1, 3, 224, 224)),
        (nn.Conv3d(3, 4, 3), (1, 3, 16, 112, 112)),
        (nn.Linear(12, 4), (1, 12)),
    ],
)
def test_the_first_layer_tells_the_default(first: nn.Module, shape: tuple[int, ...]):
    model = nn.Sequential(nn.Identity(), first, nn.ReLU(), nn.Linear(5, 6)).double()
    with no_global_randomness():
        [x] = default_inputs(model).args
    assert x.shape == shape
    assert x.dtype == torch.float64
    assert x.std() > 0.1
    assert torch.equal(x, default_inputs(model).args[0])


def test_an_embedding_gets_tokens_that_differ_and_fit():
    [tokens] = default_inputs(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))).args
    assert tokens.shape == (1, 16)
    assert tokens.dtype == torch.int64
    assert set(tokens.flatten().tolist()) == set(range(5))


@pytest.mark.parametrize("model", [nn.ReLU(), nn.LSTM(3, 4), nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Linear(3, 4))])
def test_where_nothing_can_be_guessed_the_error_says_what_to_pass(model: nn.Module):
    with pytest.raises(ExampleInputsError, match=r"cannot guess example inputs for .*pass a tensor"):
        default_inputs(model)


@pytest.mark.parametrize(
    ("options", "shape"), [({}, (1, 3, 224, 224)), ({"img_size": 64}, (1, 3, 64, 64)), ({"in_chans": 1}, (1, 1, 224, 224))]
)
def test_timm_tells_its_size(options: dict[str, int], shape: tuple[int, ...]):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, **options)
    assert default_inputs(model).args[0].shape == shape


def test_timm_tells_sizes_other_than_224():
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_b1")
    assert default_inputs(model).args[0].shape == (1, 3, *model.pretrained_cfg["input_size"][1:])


def test_transformers_tell_their_tokens_or_their_image_size():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(**small)).eval()
    vit = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, num_channels=1)).eval()
    audio = transformers.ASTModel(transformers.ASTConfig(**small))
    assert default_inputs(bert).kwargs["input_ids"].dtype == torch.int64
    assert default_inputs(vit).kwargs["pixel_values"].shape == (1, 1, 32, 32)
    for model in (bert, vit):
        default_inputs(model).try_on(model)
    with pytest.raises(ExampleInputsError, match="input_values"):
        default_inputs(audio)


# --- calibration batches ---------------------------------------------------------------------------------------------


def test_batches_may_be_tensors_pairs_and_dicts():
    x, y = zeros(2, 3), zeros(2)
    (a, none), (b, targets), (c, nothing), (d, empty) = calibration_batches([x, (x, y), {"x": x}, [x]])
    assert a.args == b.args == d.args == (x,)
    assert c.kwargs == {"x": x}
    assert targets is y
    assert none is nothing is empty is None


def test_a_data_loader_yields_its_batches():
    loader = torch.utils.data.DataLoader([(zeros(3), i) for i in range(6)], batch_size=4, generator=torch.Generator())
    assert [(inputs.batch_size, len(targets)) for inputs, targets in calibration_batches(loader)] == [(4, 4), (2, 2)]


def test_a_tensor_in_place_of_the_iterable_is_one_batch():
    x = zeros(4, 3)
    [(inputs, targets)] = calibration_batches(x)
    assert inputs.args == (x,)
    assert targets is None


@pytest.mark.parametrize(
    ("data", "message"), [(3, "no iterable of batches"), ([(1, 2, 3)], "a batch of 3"), (["x"], "of type str")]
)
def test_unclear_data_is_refused(data: Any, message: str):
    with pytest.raises(ExampleInputsError, match=message):
        list(calibration_batches(data))


def test_equal_sizes_at_a_dimension_vary_together_and_square_masks_with_them() -> None:
    ids, square = torch.arange(10).view(2, 5), torch.ones(2, 5, 5, dtype=torch.bool)
    found = as_inputs({"ids": ids, "mask": square}).variables()
    assert [(v.size, len(v.places)) for v in found] == [(5, 2), (5, 1), (5, 3)]
    longer = as_inputs({"ids": ids, "mask": square}).varied({found[-1]: 7})
    assert [tuple(t.shape) for t in longer.tensors()] == [(2, 7), (2, 7, 7)]
    assert set(longer.tensors()[0].flatten().tolist()) <= set(range(10))
    assert longer.tensors()[1].all()
    assert "7 in place of 5" in longer.what


def test_images_vary_in_height_and_width_and_keep_their_distribution() -> None:
    image = torch.randn(2, 3, 80, 64, generator=torch.Generator().manual_seed(0)) * 3 + 5
    inputs = as_inputs(image)
    by_name = {v.name: v for v in inputs.variables()}
    assert set(by_name) == {"channels", "height", "width"}
    (larger,) = inputs.varied({by_name["height"]: 112}).tensors()
    assert larger.shape == (2, 3, 112, 64)
    assert torch.equal(larger[:, :, :80], image)
    assert abs(float(larger[:, :, 80:].mean()) - 5) < 0.3
    (smaller,) = inputs.varied({by_name["width"]: 32}).tensors()
    assert torch.equal(smaller, image[..., :32])
