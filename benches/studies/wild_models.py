"""Models of packages that the zoo does not have: how each is built, and what it is called on.

A row names the package as ``pip install`` knows it, the class or function as ``module:name``, its arguments, and its inputs,
one text an argument: ``image 3 64 64``, ``tokens 100 16`` (values below 100, 16 of them), ``vector 12``, ``sequence 16 12``.
A number with ``*`` may be larger: the other sizes that a row is checked at.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One model: where it comes from, how it is built, what it takes."""

    package: str
    factory: str
    inputs: tuple[str, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # keywords of the inputs, if they have to be given by name
    label: str = ""

    @property
    def name(self) -> str:
        """Package and model, such as ``vit-pytorch/vit.ViT``."""
        module, _, what = self.factory.partition(":")
        return f"{self.package}/{self.label or module.rpartition('.')[2] + '.' + what}"

    def build(self) -> nn.Module:
        """The model with fresh weights, in eval mode."""
        module, _, what = self.factory.partition(":")
        factory = importlib.import_module(module)
        for part in what.split("."):
            factory = getattr(factory, part)
        torch.manual_seed(0)
        model = factory(*self.args, **self.kwargs)  # type: ignore[operator]
        return model.eval()  # type: ignore[no-any-return]

    def example(self, batch: int, more: bool = False, seed: int = 0) -> Any:
        """Arguments for a batch; ``more`` takes larger sizes where the row allows it."""
        generator = torch.Generator().manual_seed(seed)
        tensors = [_tensor(text.split(), batch, more, generator) for text in self.inputs]
        return dict(zip(self.names, tensors, strict=True)) if self.names else tuple(tensors)

    @property
    def grows(self) -> bool:
        """Whether any size may be larger."""
        return any("*" in text for text in self.inputs)


def _tensor(words: list[str], batch: int, more: bool, generator: torch.Generator) -> Tensor:
    kind, *rest = words
    sizes = [_size(word, more) for word in (rest[1:] if kind == "tokens" else rest)]
    if kind == "tokens":
        return torch.randint(1, int(rest[0]), (batch, *sizes), generator=generator)
    if kind == "times":
        return torch.randint(1, 20, (batch,), generator=generator)
    if kind == "ones":
        return torch.ones(batch, *sizes, dtype=torch.bool)
    return torch.randn(batch, *sizes, generator=generator)


def _size(word: str, more: bool) -> int:
    """``32*`` is 32, or half as much again in steps of 32 where larger sizes are asked for."""
    size = int(word.rstrip("*"))
    if not (more and word.endswith("*")):
        return size
    return size * 2 if size >= 32 else size + 3


def _vit(what: str, *inputs: str, package: str = "vit-pytorch", **kwargs: Any) -> Row:
    return Row(package, f"vit_pytorch.{what}", inputs or ("image 3 64 64",), kwargs=kwargs)


_V = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 96}
_L = {"num_tokens": 100, "max_seq_len": 64}
_D = {"dim": 64, "depth": 2, "heads": 4}


def _x(label: str, *inputs: str, decoder: bool = True, **attention: Any) -> Row:
    return Row("x-transformers", "wild_models:x_transformer", inputs or ("tokens 100 24*",), (decoder,), attention, label=label)


def x_transformer(decoder: bool, **attention: Any) -> nn.Module:
    """A language model or an encoder of x-transformers."""
    from x_transformers import Decoder, Encoder, TransformerWrapper

    layers = (Decoder if decoder else Encoder)(**{**_D, **attention})
    return TransformerWrapper(**_L, attn_layers=layers)


def graph(kind: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Two layers of a graph convolution on a fixed ring of nodes, read out by their mean."""
    return _Graph(kind, *args, **kwargs)


class _Graph(nn.Module):
    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        import torch_geometric.nn as gnn

        self.first = getattr(gnn, kind)(8, 32, *args, **kwargs)
        self.second = getattr(gnn, kind)(32, 32, *args, **kwargs)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0] * x.shape[1]
        here = torch.arange(n)
        edges = torch.stack([here, (here + 1) % n])
        x = self.first(x.flatten(0, 1), edges).relu()
        return self.head(self.second(x, edges).relu())


class _First(nn.Module):
    """A model that gives a tuple, of which the first is asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return self.model(*args)[0]


# fmt: off
ROWS = (
    # vit-pytorch
    _vit("vit:ViT", **_V),
    _vit("simple_vit:SimpleViT", **_V),
    _vit("deepvit:DeepViT", **_V),
    _vit("cait:CaiT", **{**_V, "cls_depth": 1}),
    _vit("t2t:T2TViT", image_size=64, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96, t2t_layers=((7, 4), (3, 2))),
    _vit("cct:CCT", img_size=64, embedding_dim=64, n_conv_layers=2, num_layers=2, num_heads=4, mlp_ratio=2.0, num_classes=10),
    _vit(
        "cross_vit:CrossViT", image_size=64, num_classes=10, depth=1, sm_dim=32, sm_patch_size=16, sm_enc_depth=1, sm_enc_heads=4,
        sm_enc_mlp_dim=64, lg_dim=64, lg_patch_size=32, lg_enc_depth=1, lg_enc_heads=4, lg_enc_mlp_dim=64, cross_attn_depth=1,
        cross_attn_heads=4,
    ),
    _vit("pit:PiT", image_size=64, patch_size=8, dim=64, num_classes=10, depth=(1, 1), heads=4, mlp_dim=96),
    _vit(
        "levit:LeViT", image_size=64, num_classes=10, stages=2, dim=(32, 64), depth=1, heads=(2, 4), mlp_mult=2,
    ),
    _vit("cvt:CvT", num_classes=10, s1_emb_dim=32, s1_depth=1, s2_emb_dim=64, s2_heads=2, s2_depth=1, s3_emb_dim=64, s3_heads=4, s3_depth=1),
    _vit("twins_svt:TwinsSVT", num_classes=10, s1_emb_dim=32, s1_local_patch_size=4, s1_global_k=4, s1_depth=1, s2_emb_dim=32, s2_local_patch_size=4, s2_global_k=4, s2_depth=1, s3_emb_dim=64, s3_local_patch_size=2, s3_global_k=2, s3_depth=1, s4_emb_dim=64, s4_local_patch_size=2, s4_global_k=2, s4_depth=1),
    _vit("crossformer:CrossFormer", "image 3 224 224", num_classes=10, dim=(32, 32, 64, 64), depth=(1, 1, 1, 1), global_window_size=(8, 4, 2, 1), local_window_size=7),
    _vit("regionvit:RegionViT", "image 3 224 224", dim=(16, 32, 32, 64), depth=(1, 1, 1, 1), window_size=7, num_classes=10),
    _vit("scalable_vit:ScalableViT", "image 3 256 256", num_classes=10, dim=16, heads=(1, 2, 2, 4), depth=(1, 1, 1, 1), ssa_dim_key=(8, 8, 8, 8), reduction_factor=(8, 4, 2, 1), window_size=(64, 32, None, None)),
    _vit("sep_vit:SepViT", "image 3 224 224", num_classes=10, dim=16, dim_head=8, heads=(1, 2, 2, 4), depth=(1, 1, 1, 1), window_size=7),
    _vit("max_vit:MaxViT", "image 3 224 224", num_classes=10, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=7),
    _vit("nest:NesT", image_size=64, patch_size=4, dim=16, heads=2, num_hierarchies=3, block_repeats=(1, 1, 1), num_classes=10),
    _vit("mobile_vit:MobileViT", "image 3 64 64", image_size=(64, 64), dims=[16, 20, 24], channels=[8, 8, 16, 16, 16, 16, 24, 24, 32, 32, 64], num_classes=10),
    _vit("xcit:XCiT", image_size=64, patch_size=16, num_classes=10, dim=64, depth=2, cls_depth=1, heads=4, mlp_dim=96),
    _vit("vit_for_small_dataset:ViT", **_V),
    _vit("parallel_vit:ViT", **_V),
    _vit("learnable_memory_vit:ViT", **_V),
    _vit("simple_vit_1d:SimpleViT", "image 3 64", seq_len=64, patch_size=16, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96),
    _vit("vit_1d:ViT", "image 3 64", seq_len=64, patch_size=16, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96),
    _vit("vit_3d:ViT", "image 3 4 32 32", image_size=32, image_patch_size=16, frames=4, frame_patch_size=2, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96),
    _vit("vivit:ViViT", "image 3 4 32 32", image_size=32, image_patch_size=16, frames=4, frame_patch_size=2, num_classes=10, dim=64, spatial_depth=1, temporal_depth=1, heads=4, mlp_dim=96),
    _vit("simple_vit_with_register_tokens:SimpleViT", **_V),
    _vit("simple_vit_with_qk_norm:SimpleViT", **_V),
    _vit("simple_vit_with_patch_dropout:SimpleViT", **_V),
    _vit("simple_vit_with_value_residual:SimpleViT", **_V),
    _vit("simple_vit_with_fft:SimpleViT", **{**_V, "freq_patch_size": 16}),
    _vit("vit_with_patch_merger:ViT", **_V),
    _vit("normalized_vit:nViT", image_size=64, patch_size=16, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96),
    _vit("rvt:RvT", **_V),
    _vit("simple_uvit:SimpleUViT", **{**_V, "depth": 3}),
    _vit("jumbo_vit:JumboViT", **_V),
    _vit("vit_nd:ViTND", ndim=2, input_shape=64, patch_size=16, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96),
    # x-transformers
    _x("gpt"),
    _x("bert", decoder=False),
    _x("rotary", rotary_pos_emb=True),
    _x("alibi", alibi_pos_bias=True),
    _x("t5-bias", rel_pos_bias=True),
    _x("kv-heads", attn_kv_heads=2),
    _x("glu", ff_glu=True),
    _x("swish-glu", ff_glu=True, ff_swish=True, ff_no_bias=True),
    _x("rmsnorm", use_rmsnorm=True),
    _x("simple-rmsnorm", use_simple_rmsnorm=True),
    _x("qk-norm", attn_qk_norm=True),
    _x("talking-heads", attn_pre_talking_heads=True),
    _x("gate-values", attn_gate_values=True),
    _x("sandwich", sandwich_norm=True),
    _x("memory-kv", attn_num_mem_kv=4),
    _x("flash", attn_flash=True),
    _x("shift-tokens", shift_tokens=1),
    _x("macaron", macaron=True),
    _x("gate-residual", gate_residual=True),
    # other small packages of transformers
    Row("perceiver-pytorch", "perceiver_pytorch:Perceiver", ("sequence 64* 3",), (), dict(num_freq_bands=4, depth=2, max_freq=8.0, input_axis=1, num_latents=16, latent_dim=64, cross_heads=1, latent_heads=4, cross_dim_head=16, latent_dim_head=16, num_classes=10)),
    Row("perceiver-pytorch", "perceiver_pytorch:PerceiverIO", ("sequence 24* 32", ), (), dict(dim=32, queries_dim=32, depth=2, num_latents=16, latent_dim=64, cross_heads=1, latent_heads=4, cross_dim_head=16, latent_dim_head=16)),
    Row("mlp-mixer-pytorch", "mlp_mixer_pytorch:MLPMixer", ("image 3 64 64",), (), dict(image_size=64, channels=3, patch_size=16, dim=64, depth=2, num_classes=10)),
    Row("g-mlp-pytorch", "g_mlp_pytorch:gMLPVision", ("image 3 64 64",), (), dict(image_size=64, patch_size=16, num_classes=10, dim=64, depth=2)),
    Row("g-mlp-pytorch", "g_mlp_pytorch:gMLP", ("tokens 100 32",), (), dict(num_tokens=100, dim=64, depth=2, seq_len=32)),
    Row("conformer", "conformer:ConformerBlock", ("sequence 24* 64",), (), dict(dim=64, dim_head=16, heads=4, ff_mult=2, conv_expansion_factor=2, conv_kernel_size=7)),
    Row("performer-pytorch", "performer_pytorch:PerformerLM", ("tokens 100 32*",), (), dict(num_tokens=100, max_seq_len=64, dim=64, depth=2, heads=4, nb_features=16)),
    Row("linformer", "linformer:LinformerLM", ("tokens 100 32",), (), dict(num_tokens=100, dim=64, seq_len=32, depth=2, heads=4, k=16)),
    Row("reformer-pytorch", "reformer_pytorch:ReformerLM", ("tokens 100 32",), (), dict(num_tokens=100, dim=64, depth=1, max_seq_len=64, heads=4, bucket_size=8, lsh_dropout=0.0)),
    Row("local-attention", "local_attention:LocalTransformer", ("tokens 100 32*",), (), dict(num_tokens=100, dim=64, depth=2, max_seq_len=64, local_attn_window_size=16, heads=4, dim_head=16)),
    Row("linear-attention-transformer", "linear_attention_transformer:LinearAttentionTransformerLM", ("tokens 100 32*",), (), dict(num_tokens=100, dim=64, heads=4, depth=2, max_seq_len=64, causal=False)),
    Row("axial-attention", "axial_attention:AxialAttention", ("image 32 8 8",), (), dict(dim=32, dim_index=1, heads=4, num_dimensions=2)),
    Row("denoising-diffusion-pytorch", "denoising_diffusion_pytorch:Unet", ("image 3 32* 32*", "times"), (), dict(dim=16, dim_mults=(1, 2, 4), flash_attn=False)),
    Row("denoising-diffusion-pytorch", "denoising_diffusion_pytorch:Unet1D", ("image 3 32*", "times"), (), dict(dim=16, dim_mults=(1, 2, 4), channels=3)),
    Row("iTransformer", "iTransformer:iTransformer", ("sequence 24 6",), (), dict(num_variates=6, lookback_len=24, dim=64, depth=2, heads=4, dim_head=16, pred_length=(12,))),
    Row("tab-transformer-pytorch", "tab_transformer_pytorch:FTTransformer", ("tokens 5 4", "vector 6"), (), dict(categories=(5, 5, 5, 5), num_continuous=6, dim=32, dim_out=2, depth=2, heads=4)),
    Row("soft-moe-pytorch", "soft_moe_pytorch:SoftMoE", ("sequence 16* 32",), (), dict(dim=32, seq_len=16, num_experts=4)),
    Row("vector-quantize-pytorch", "vector_quantize_pytorch:FSQ", ("sequence 16* 4",), (), dict(levels=[8, 5, 5, 5])),
    # convolutional zoos
    *(Row("pytorchcv", "pytorchcv.model_provider:get_model", ("image 3 224 224",), (n,), label=n) for n in (
        "preresnet18", "seresnet18", "resnext26_32x4d", "bninception", "diapreresnet18", "peleenet", "vovnet27s", "dla34", "hrnet_w18_small_v1", "sqnxt23_w1", "shufflenet_g3_wd4", "shufflenetv2b_wd2", "menet108_8x1_g3", "mobilenet_wd4", "fdmobilenet_wd4", "mobilenetv3_small_w7d20", "igcv3_wd4", "mnasnet_a1", "darknet_tiny", "efficientnet_b0", "mixnet_s", "condensenet74_c4_g4", "dpn68", "ibn_resnet50", "airnet50_1x64d_r2", "bam_resnet18", "cbam_resnet18", "resattnet56", "sknet50", "ghostnet", "espnetv2_wd2", "selecsls42", "regnetx002", "nasnet_4a1056", "spnasnet", "octresnet10_ad2")),
    *(Row("segmentation-models-pytorch", f"segmentation_models_pytorch:{n}", ("image 3 64* 64*",), (), dict(encoder_name=e, encoder_weights=None, classes=2), label=f"{n}-{e}") for n, e in (
        ("Unet", "resnet18"), ("UnetPlusPlus", "mobilenet_v2"), ("MAnet", "resnet18"), ("Linknet", "resnet18"), ("FPN", "efficientnet-b0"), ("PSPNet", "resnet18"), ("DeepLabV3", "resnet18"), ("DeepLabV3Plus", "resnet18"), ("UPerNet", "resnet18"), ("Segformer", "mit_b0"))),
    *(Row("monai", f"monai.networks.nets:{n}", (i,), (), k, label=n) for n, i, k in (
        ("UNet", "image 1 32* 32*", dict(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)),
        ("BasicUNet", "image 1 32* 32*", dict(spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 32, 64, 8))),
        ("AttentionUnet", "image 1 32* 32*", dict(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))),
        ("SegResNet", "image 1 32* 32*", dict(spatial_dims=2, in_channels=1, out_channels=2, init_filters=8)),
        ("UNETR", "image 1 32 32", dict(spatial_dims=2, in_channels=1, out_channels=2, img_size=(32, 32), feature_size=8, hidden_size=64, mlp_dim=96, num_heads=4)),
        ("SwinUNETR", "image 1 64 64", dict(spatial_dims=2, in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4))),
        ("ViT", "image 1 32 32", dict(spatial_dims=2, in_channels=1, img_size=(32, 32), patch_size=(8, 8), hidden_size=64, mlp_dim=96, num_layers=2, num_heads=4, classification=True, num_classes=4)),
        ("HighResNet", "image 1 16* 16*", dict(spatial_dims=2, in_channels=1, out_channels=2)),
        ("VNet", "image 1 32 32", dict(spatial_dims=2, in_channels=1, out_channels=2)),
        ("DynUNet", "image 1 32* 32*", dict(spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 32])),
        ("DenseNet121", "image 1 64* 64*", dict(spatial_dims=2, in_channels=1, out_channels=2)),
        ("MedNeXtSmall", "image 1 64 64", dict(spatial_dims=2, in_channels=1, out_channels=2)),
        ("AutoEncoder", "image 1 32 32", dict(spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), strides=(2, 2))),
        ("FlexibleUNet", "image 3 64* 64*", dict(in_channels=3, out_channels=2, backbone="efficientnet-b0")),
    )),
    *(Row("spandrel", f"spandrel.architectures.{m}:{n}", (i,), (), k, label=n) for m, n, i, k in (
        ("SwinIR", "SwinIR", "image 3 16 16", dict(img_size=16, window_size=4, embed_dim=32, depths=(2,), num_heads=(4,), mlp_ratio=2, upscale=2, upsampler="pixelshuffledirect")),
        ("Swin2SR", "Swin2SR", "image 3 16 16", dict(img_size=16, window_size=4, embed_dim=32, depths=(2,), num_heads=(4,), mlp_ratio=2, upscale=2, upsampler="pixelshuffledirect")),
        ("HAT", "HAT", "image 3 16 16", dict(img_size=16, window_size=4, embed_dim=32, depths=(1,), num_heads=(4,), compress_ratio=4, squeeze_factor=8, mlp_ratio=2, upscale=2, upsampler="pixelshuffle")),
        ("DAT", "DAT", "image 3 16 16", dict(img_size=16, split_size=[4, 4], embed_dim=32, depth=[1], num_heads=[4], expansion_factor=2, upscale=2)),
        ("NAFNet", "NAFNet", "image 3 16* 16*", dict(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])),
        ("SPAN", "SPAN", "image 3 16* 16*", dict(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2)),
        ("Compact.__arch.SRVGG", "SRVGGNetCompact", "image 3 16* 16*", dict(num_feat=16, num_conv=3, upscale=2)),
        ("ESRGAN.__arch.RRDB", "RRDBNet", "image 3 16* 16*", dict(num_filters=16, num_blocks=1, scale=2)),
        ("RCAN", "RCAN", "image 3 16* 16*", dict(n_resgroups=1, n_resblocks=2, n_feats=16, reduction=4, scale=2)),
        ("PLKSR", "PLKSR", "image 3 16* 16*", dict(dim=16, n_blocks=2, kernel_size=9)),
        ("OmniSR", "OmniSR", "image 3 16 16", dict(num_feat=16, res_num=1, window_size=8, up_scale=2)),
        ("SAFMN", "SAFMN", "image 3 16* 16*", dict(dim=16, n_blocks=2, upscaling_factor=2)),
        ("DITN", "DITN", "image 3 16 16", dict(dim=16, ITL_blocks=1, SAL_blocks=1, UFONE_blocks=1, patch_size=8)),
        ("Uformer", "Uformer", "image 3 128 128", dict(img_size=128, embed_dim=8, depths=[1] * 9, win_size=8)),
        ("DRCT", "DRCT", "image 3 16 16", dict(img_size=16, window_size=4, embed_dim=32, depths=(1,), num_heads=(4,), gc=8, upscale=2)),
        ("GRL", "GRL", "image 3 32 32", dict(img_size=32, embed_dim=32, depths=[1], num_heads_window=[2], num_heads_stripe=[2], window_size=8, stripe_size=[8, 8], upscale=2)),
        ("RGT", "RGT", "image 3 16 16", dict(img_size=16, embed_dim=32, depth=[2], num_heads=[4], split_size=[4, 4], mlp_ratio=2, c_ratio=0.5, upscale=2)),
    )),
    # graphs
    *(Row("torch_geometric", "wild_models:graph", ("sequence 6* 8",), (n, *a), k, label=n) for n, a, k in (
        ("GCNConv", (), {}), ("SAGEConv", (), {}), ("GATConv", (), dict(heads=2, concat=False)), ("GATv2Conv", (), dict(heads=2, concat=False)), ("GraphConv", (), {}), ("TransformerConv", (), dict(heads=2, concat=False)), ("TAGConv", (), {}), ("SGConv", (), {}), ("ChebConv", (3,), {}), ("ResGatedGraphConv", (), {}), ("GENConv", (), {}), ("ARMAConv", (), {}))),
    # vision, others
    Row("efficientnet_pytorch", "efficientnet_pytorch:EfficientNet.from_name", ("image 3 64* 64*",), ("efficientnet-b0",)),
    Row("resnest", "resnest.torch:resnest50", ("image 3 64* 64*",), (), dict(pretrained=False)),
    Row("geffnet", "geffnet:create_model", ("image 3 64* 64*",), ("mobilenetv3_large_100",)),
    Row("geffnet", "geffnet:create_model", ("image 3 64* 64*",), ("mixnet_s",), label="mixnet_s"),
    Row("facenet-pytorch", "facenet_pytorch:InceptionResnetV1", ("image 3 96* 96*",), (), dict(classify=True, num_classes=10)),
    *(Row("pretrainedmodels", f"pretrainedmodels:{n}", (i,), (), dict(pretrained=None, num_classes=10), label=n) for n, i in (
        ("se_resnet50", "image 3 224 224"), ("xception", "image 3 96* 96*"), ("dpn68", "image 3 224 224"), ("bninception", "image 3 224 224"), ("cafferesnet101", "image 3 224 224"))),
    Row("kornia", "kornia.feature:HardNet", ("image 1 32 32",), (), dict(pretrained=False)),
    Row("kornia", "kornia.feature:SOSNet", ("image 1 32 32",), (), dict(pretrained=False)),
    Row("kornia", "kornia.feature:HyNet", ("image 1 32 32",), (), dict(pretrained=False)),
    Row("kornia", "kornia.feature:TFeat", ("image 1 32 32",), (), dict(pretrained=False)),
    Row("open_clip_torch", "open_clip.model:CLIP", ("image 3 32 32", "tokens 99 16"), (), dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=16, width=64, layers=2, head_width=16), text_cfg=dict(context_length=16, vocab_size=100, width=64, heads=4, layers=2)), label="CLIP"),
    Row("ultralytics", "ultralytics.nn.tasks:DetectionModel", ("image 3 64* 64*",), ("yolov8n.yaml",), dict(verbose=False), label="yolov8n"),
    Row("ultralytics", "ultralytics.nn.tasks:DetectionModel", ("image 3 64* 64*",), ("yolo11n.yaml",), dict(verbose=False), label="yolo11n"),
    Row("ultralytics", "ultralytics.nn.tasks:DetectionModel", ("image 3 64* 64*",), ("yolo12n.yaml",), dict(verbose=False), label="yolo12n"),
    Row("ultralytics", "ultralytics.nn.tasks:SegmentationModel", ("image 3 64* 64*",), ("yolov8n-seg.yaml",), dict(verbose=False), label="yolov8n-seg"),
    Row("ultralytics", "ultralytics.nn.tasks:ClassificationModel", ("image 3 64* 64*",), ("yolov8n-cls.yaml",), dict(verbose=False), label="yolov8n-cls"),
    Row("dynamic-network-architectures", "dynamic_network_architectures.architectures.unet:PlainConvUNet", ("image 1 32* 32*",), (), dict(input_channels=1, n_stages=3, features_per_stage=(8, 16, 32), conv_op=nn.Conv2d, kernel_sizes=3, strides=(1, 2, 2), n_conv_per_stage=1, num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=nn.InstanceNorm2d, norm_op_kwargs=dict(affine=True), nonlin=nn.ReLU)),
    # tables, time series, audio, fields
    Row("pytorch-tabnet", "pytorch_tabnet.tab_network:TabNet", ("vector 10",), (10, 3), dict(group_attention_matrix=torch.eye(10))),
    Row("rtdl_revisiting_models", "rtdl_revisiting_models:MLP", ("vector 10",), (), dict(d_in=10, d_out=3, n_blocks=2, d_block=32, dropout=0.1)),
    Row("rtdl_revisiting_models", "rtdl_revisiting_models:ResNet", ("vector 10",), (), dict(d_in=10, d_out=3, n_blocks=2, d_block=32, d_hidden=48, d_hidden_multiplier=None, dropout1=0.1, dropout2=0.0)),
    Row("rtdl_revisiting_models", "rtdl_revisiting_models:FTTransformer", ("vector 6", "tokens 4 3"), (), dict(n_cont_features=6, cat_cardinalities=[4, 4, 4], d_out=2, n_blocks=2, d_block=32, attention_n_heads=4, attention_dropout=0.1, ffn_d_hidden=48, ffn_d_hidden_multiplier=None, ffn_dropout=0.1, residual_dropout=0.0)),
    Row("nbeats-pytorch", "nbeats_pytorch.model:NBeatsNet", ("vector 12",), (), dict(backcast_length=12, forecast_length=4, hidden_layer_units=32)),
    Row("ncps", "ncps.torch:CfC", ("sequence 6* 8",), (8, 24)),
    Row("ncps", "ncps.torch:LTC", ("sequence 6* 8",), (8, 24)),
    Row("pytorch-tcn", "pytorch_tcn:TCN", ("image 6 32*",), (), dict(num_inputs=6, num_channels=[16, 16, 24])),
    Row("neuraloperator", "neuralop.models:FNO", ("image 1 16* 16*",), (), dict(n_modes=(4, 4), hidden_channels=16, in_channels=1, out_channels=1)),
    Row("litgpt", "wild_models:litgpt", ("tokens 90 16*",), ("pythia-14m",), label="pythia-14m"),
    Row("litgpt", "wild_models:litgpt", ("tokens 90 16*",), ("Gemma-2b",), label="Gemma"),
    Row("litgpt", "wild_models:litgpt", ("tokens 90 16*",), ("Llama-3-8B",), dict(n_query_groups=2), label="Llama-3"),
    # diffusers
    *(Row("diffusers", f"diffusers:{n}", i, (), k, names, label=n) for n, i, names, k in (
        ("UNet2DModel", ("image 3 32* 32*", "times"), ("sample", "timestep"), dict(sample_size=32, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))),
        ("UNet2DConditionModel", ("image 4 16* 16*", "times", "sequence 5* 16"), ("sample", "timestep", "encoder_hidden_states"), dict(sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8, cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))),
        ("AutoencoderKL", ("image 3 32* 32*",), ("sample",), dict(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8)),
        ("AutoencoderTiny", ("image 3 32* 32*",), ("sample",), dict(encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))),
        ("VQModel", ("image 3 32* 32*",), ("sample",), dict(block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8)),
        ("DiTTransformer2DModel", ("image 4 16 16", "times", "times"), ("hidden_states", "timestep", "class_labels"), dict(sample_size=16, num_layers=2, num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)),
        ("SD3Transformer2DModel", ("image 4 16* 16*", "sequence 5* 32", "vector 32", "times"), ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"), dict(sample_size=16, num_layers=2, num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=32)),
    )),
)
# fmt: on


def litgpt(name: str, **sizes: Any) -> nn.Module:
    """A small model of litgpt's."""
    from litgpt import GPT, Config

    small = Config.from_name(name, n_layer=2, n_embd=64, n_head=4, padded_vocab_size=100, block_size=64, **sizes)
    return GPT(small)
