"""The models of the zoo: how each is made, with random weights, and which inputs it is run on.

torchvision: every classification, segmentation and detection model it lists (of detectors also the backbone, alone), the video
ResNets, RAFT, and the float form of some quantizable models, where additions are modules. timm: of every family that has a
convolution the smallest model, and further ones where their blocks or layers are of other kinds; the largest of a family are left
out. diffusers: the networks of its pipelines that have convolutions, narrow, built from their classes; the DDPM of CIFAR-10 as
published. segmentation_models_pytorch: every decoder. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

#: From a batch and an image size to the positional arguments of a model.
Inputs: TypeAlias = Callable[[int, tuple[int, int]], tuple[Any, ...]]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Args:
        zoo: the library, or the part of it.
        name: of the model, there.
        make: builds it.
        inputs: its arguments for a batch and an image size.
        sizes: image sizes in the order in which they are tried; the first that the model accepts is taken.
    """

    zoo: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    sizes: Sequence[int]

    @property
    def id(self) -> str:
        return f"{self.zoo}:{self.name}"


#: Small ones first; 224 and more for models with a table of positions.
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 512)


def entries() -> tuple[Entry, ...]:
    """Every model of the zoo, each once."""
    return (*_torchvision(), *_timm(), *_diffusers(), *_segmentation())


def images(batch: int, size: tuple[int, int], channels: int = 3) -> tuple[torch.Tensor, ...]:
    """Noise of shape (batch, channels, *size)."""
    return (torch.randn(batch, channels, *size),)


def _torchvision() -> Iterator[Entry]:
    from torchvision import models

    for part in (models, models.segmentation):
        zoo = "torchvision" if part is models else "torchvision segmentation"
        for name in models.list_models(part):
            without = {"weights_backbone": None} if part is models.segmentation else {}
            if name.startswith("vit_"):  # these are made for one size; four patches by four are enough
                side = 4 * int(name[-2:])
                yield Entry(zoo, name, _call(models.get_model, name, weights=None, image_size=side), images, (side,))
            else:
                yield Entry(zoo, name, _call(models.get_model, name, weights=None, **without), images, SIZES)
    yield from _detectors()
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        yield Entry("torchvision video", name, _call(models.get_model, name, weights=None), _clips, (32, 64))
    yield Entry("torchvision video", "raft_small", _call(models.get_model, "raft_small", weights=None), _pairs, (128,))
    for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "googlenet", "inception_v3", "shufflenet_v2_x0_5"):
        make = _call(models.get_model, f"quantized_{name}", weights=None, quantize=False)
        yield Entry("torchvision quantizable", name, make, images, SIZES)


def _detectors() -> Iterator[Entry]:
    """Every detector's backbone, and the whole; small images stay small where the detector does not insist on a size."""
    from torchvision import models

    for name in models.list_models(models.detection):
        make = _call(models.get_model, name, weights=None, weights_backbone=None, **_few_boxes(name))
        yield Entry("torchvision detection, backbone", name, _call(_attribute, make, "backbone"), images, (*SIZES[1:], 64))
        yield Entry("torchvision detection, whole", name, make, _list_of_images, SIZES[1:])


def _few_boxes(name: str) -> dict[str, Any]:
    """Options of a detector that keep its images small, and its boxes few: with random weights everything is an object."""
    size = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
    if "rcnn" in name:
        return {**size, "box_detections_per_img": 4, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 10}
    return {**size, "detections_per_img": 4, "topk_candidates": 20}


def _clips(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, 16, *size),)


def _pairs(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return *images(batch, size), *images(batch, size)


def _list_of_images(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return ([torch.rand(3, *size) for _ in range(batch)],)


#: One model for every kind of block and of layer that timm's convolutional families hold.
TIMM = """
bat_resnext26ts botnet26t_256 caformer_s18 coat_tiny coatnet_bn_0_rw_224 coatnet_nano_cc_224 coatnet_pico_rw_224
coatnext_nano_rw_224 convformer_s18 convmixer_1024_20_ks9_p14 convmixer_768_32 convnext_atto convnext_atto_rms convnext_tiny
convnext_tiny_hnf convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_9_dagger_240 cs3darknet_focus_s cs3edgenet_x
cs3sedarknet_l csatv2 cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53 davit_tiny densenet121
densenetblur121d dla34 dla46x_c dla60_res2next dm_nfnet_f0 dpn48b dpn68 eca_botnext26ts_256 eca_nfnet_l0 eca_resnext26ts
eca_vovnet39b ecaresnetlight ecaresnext26t_32x4d edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
efficientnet_b0_gn efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 efficientnet_x_b3
efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0 ese_vovnet19b_slim ese_vovnet19b_slim_dw ese_vovnet39b_evos
fasternet_t0 fastvit_mci0 fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnet50t gcresnext26ts
gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050 halonet26t hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_035 lcnetv2_small legacy_seresnet18
legacy_seresnet50 legacy_seresnext26_32x4d legacy_xception levit_128s levit_conv_128s lowformer_b0 lowformer_e1 mambaout_femto
maxvit_pico_rw_256 maxvit_tiny_tf_224 maxxvit_rmlp_nano_rw_256 mixnet_s mnasnet_050 mnasnet_small mobilenet_edgetpu_100
mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium
mobilenetv4_conv_medium mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilenetv5_base mobileone_s1 mobilevit_xxs
mobilevitv2_050 mvitv2_tiny nasnetalarge nest_tiny nextvit_small nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26 nfnet_f0
pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetv_040 regnetx_002 regnety_002
regnety_040_sgn regnetz_005 regnetz_b16 regnetz_b16_evos regnetz_d8 repghostnet_050 repvgg_a0 repvit_m1 res2net50_14w_8s
res2next50 resnest14d resnet10t resnet14t resnet18 resnet26d resnet50 resnet50_clip_gap resnet50_gn resnet50d resnet51q
resnet61q resnetaa34d resnetblur18 resnetblur50d resnetrs50 resnetv2_18 resnetv2_18d resnetv2_50 resnetv2_50d_evos
resnetv2_50d_frn resnetv2_50d_gn resnetv2_50t resnetv2_50x1_bit resnext50_32x4d rexnet_100 sedarknet21 selecsls42 sequencer2d_s
seresnet18 seresnetaa50d seresnext26t_32x4d shvit_s1 skresnet18 starnet_s050 swiftformer_xs tf_efficientnet_b0
tf_efficientnet_cc_b0_4e tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s tf_mobilenetv3_small_075 tiny_vit_5m_224
tresnet_m tresnet_v2_l twins_pcpvt_small twins_svt_small vgg11_bn visformer_tiny vit_small_r26_s32_224 vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 vovnet39a xception41 xception41p xcit_nano_12_p8_224
"""

#: Transformers and mixers whose only convolution cuts the image into patches, one a family. (DeepSeek's begin at 412 M weights.)
TIMM_PATCHES = """
beit_base_patch16_224 cait_xxs24_224 convit_tiny deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 eva02_tiny_patch14_224
gmlp_ti16_224 hiera_tiny_224 mixer_s32_224 qwen3_vit_88m sam2_hiera_tiny samvit_base_patch16_224 swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 swinv2_tiny_window8_256 tnt_s_patch16_224 vit_srelpos_small_patch16_224
"""


def _timm() -> Iterator[Entry]:
    for zoo, names in (("timm", TIMM), ("timm, patches only", TIMM_PATCHES)):
        for name in names.split():
            yield Entry(zoo, name, _call(_timm_model, name), images, SIZES)


def _timm_model(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


_DOWN2 = ("DownBlock2D", "AttnDownBlock2D")
_UP2 = ("AttnUpBlock2D", "UpBlock2D")
_CROSS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
_NARROW: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_AUTO = {**_NARROW, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_UNET = {**_NARROW, "sample_size": 32, "down_block_types": _DOWN2, "up_block_types": _UP2}
_DDPM = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
_RESNETS = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
_PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
_DC = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (16, 32),
    "decoder_block_out_channels": (16, 32),
    "encoder_layers_per_block": (2, 2),
    "decoder_layers_per_block": (2, 2),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}
_OOBLECK = {
    "encoder_hidden_size": 16,
    "downsampling_ratios": [2, 4],
    "channel_multiples": [1, 2],
    "decoder_channels": 16,
    "decoder_input_channels": 8,
}


def _diffusers() -> Iterator[Entry]:
    cross_up = {**_CROSS, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    yield _diffusion("UNet2D of DDPM, CIFAR-10", "UNet2DModel", _DDPM, _noisy)
    yield _diffusion("UNet2D", "UNet2DModel", _UNET, _noisy)
    yield _diffusion("UNet2D, no attention", "UNet2DModel", {**_UNET, **_PLAIN}, _noisy)
    yield _diffusion("UNet2D, class-conditional", "UNet2DModel", {**_UNET, "num_class_embeds": 10}, _noisy_classes)
    scale_shift = {**_UNET, **_RESNETS, "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"}
    yield _diffusion("UNet2D, scale and shift", "UNet2DModel", scale_shift, _noisy)
    yield _diffusion("UNet2DCondition", "UNet2DConditionModel", {**cross_up, "sample_size": 32}, _noisy_text)
    yield _diffusion("ControlNet", "ControlNetModel", {**_CROSS, "conditioning_embedding_out_channels": (8, 16)}, _controlled)
    yield _diffusion("UNet1D", "UNet1DModel", {"extra_in_channels": 64, "sample_size": 256}, _sound)
    yield from _autoencoder("AutoencoderKL", _AUTO, channels=4)
    yield from _autoencoder("AutoencoderTiny", {}, channels=4)
    yield from _autoencoder("VQModel", _AUTO, channels=3)
    yield from _autoencoder("AutoencoderDC", _DC, channels=8)
    yield from _autoencoder("AutoencoderOobleck", _OOBLECK, channels=8, inputs=_waves)
    asymmetric = {f"{way}_block_types": _AUTO[f"{way}_block_types"] for way in ("down", "up")}
    asymmetric |= {"down_block_out_channels": (32, 64), "up_block_out_channels": (48, 96), "norm_num_groups": 8}
    yield from _autoencoder("AsymmetricAutoencoderKL", asymmetric, channels=4)
    vectors = {**_AUTO, "latent_channels": 4}
    yield _diffusion("VQModel, whole", "VQModel", vectors, images)


def _diffusion(name: str, kind: str, options: dict[str, Any], inputs: Inputs) -> Entry:
    wrapper = (_OfOne, _OfTwo, _OfThree, _OfFour)[len(inputs(1, (8, 8))) - 1]
    return Entry("diffusers", name, lambda: wrapper(_diffuser(kind, options)), inputs, (32, 64))


def _autoencoder(kind: str, options: dict[str, Any], *, channels: int, inputs: Inputs = images) -> Iterator[Entry]:
    """The encoder and the decoder of an autoencoder, as two networks."""
    whole = _call(_diffuser, kind, options)
    yield Entry("diffusers", f"{kind}, encoder", _call(_attribute, whole, "encoder"), inputs, (32, 64))

    def latents(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
        picture = images(batch, size, channels)
        return picture if inputs is images else (torch.randn(batch, channels, size[0]),)

    yield Entry("diffusers", f"{kind}, decoder", _call(_attribute, whole, "decoder"), latents, (8, 16, 32))


def _diffuser(kind: str, options: dict[str, Any]) -> nn.Module:
    import diffusers

    model: nn.Module = getattr(diffusers, kind)(**options)
    return model


class _OfOne(nn.Module):
    """A model of diffusers that returns a tensor, not an object of its own; this and the next for one to four arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Any) -> Any:
        return self.model(sample, return_dict=False)[0]


class _OfTwo(_OfOne):
    def forward(self, sample: Any, timestep: Any) -> Any:  # type: ignore[override]  # that is the point
        return self.model(sample, timestep, return_dict=False)[0]


class _OfThree(_OfOne):
    def forward(self, sample: Any, timestep: Any, condition: Any) -> Any:  # type: ignore[override]
        return self.model(sample, timestep, condition, return_dict=False)[0]


class _OfFour(_OfOne):
    def forward(self, sample: Any, timestep: Any, text: Any, picture: Any) -> Any:  # type: ignore[override]
        return self.model(sample, timestep, text, picture, return_dict=False)


def _noisy(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return *images(batch, size), torch.full((batch,), 7)


def _noisy_classes(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return *_noisy(batch, size), torch.arange(batch)


def _noisy_text(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return *images(batch, size, 4), torch.full((batch,), 7), torch.randn(batch, 5, 16)


def _controlled(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    side = (2 * size[0], 2 * size[1])
    return *_noisy_text(batch, size), *images(batch, side)


def _sound(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return torch.randn(batch, 2, 8 * size[0]), torch.full((batch,), 7)


def _waves(batch: int, size: tuple[int, int]) -> tuple[Any, ...]:
    return (torch.randn(batch, 2, 8 * size[0]),)


def _segmentation() -> Iterator[Entry]:
    kinds = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet")
    pairs = [(kind, "resnet18") for kind in kinds] + [("Segformer", "mit_b0"), ("Unet", "mobilenet_v2"), ("FPN", "resnet50")]
    pairs += [("Unet", "efficientnet-b0"), ("DeepLabV3Plus", "mobilenet_v2"), ("Unet", "vgg11_bn"), ("Linknet", "densenet121")]
    pairs += [("Unet", "timm-skresnet18"), ("UPerNet", "tu-convnext_atto"), ("Unet", "mobileone_s1"), ("Segformer", "resnet18")]
    for kind, encoder in pairs:
        yield Entry("segmentation_models_pytorch", f"{kind} on {encoder}", _call(_smp_model, kind, encoder), images, SIZES)


def _smp_model(kind: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp  # type: ignore[import-untyped]  # ships no types

    model: nn.Module = getattr(smp, kind)(encoder_name=encoder, encoder_weights=None)
    return model


def _attribute(make: Callable[[], nn.Module], name: str) -> nn.Module:
    part = getattr(make(), name)
    assert isinstance(part, nn.Module)
    return part


def _call(function: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: function(*args, **options)
