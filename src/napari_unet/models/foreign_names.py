"""How other people's U-Nets name their layers: one entry a family, data only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from napari_unet.models.normalize import Normalization

if TYPE_CHECKING:
    from napari_unet.network.config import NormPlace, Padding, Skips, Upsampling

Role = Literal["encoder", "bridge", "bottleneck", "up", "decoder", "head"]

_EIGHT_BIT = Normalization(method="fixed", lower=0, upper=255)
_STANDARD = Normalization(method="mean_std")
_LEAST_TO_GREATEST = Normalization(lower=0, upper=100)
_JOINT_STANDARD = Normalization(method="mean_std", joint_channels=True)


@dataclass(frozen=True)
class Family:
    """Networks that one published definition builds.

    What the shapes of the tensors tell is not repeated here.

    Parameters
    ----------
    title : str
    layers : tuple of (role, pattern)
        The full names of its layers. The group ``l`` is the number of a level or
        step, ``i`` the place of a layer in its block; both are optional.
    normalization : Normalization
        As its own training script has it, else our default.
    known, unknown : str
        What else its definition says, and what neither it nor the file says, each as
        the end of a sentence.
    up_first : bool
        Whether the upsampled map comes before the skip connection when they are joined.
    padding : "same" or "valid"
    skips : "concat" or "add"
    bare_upsampling : str or None
        How it upsamples where no weights are stored for it; None if never.
    align_corners : bool
    norm_place : str
        Where names do not tell by their numbers.
    plain_norm : "instance" or None
        What a norm without running statistics is; None if the file cannot tell.
    silent_norm : bool
        Whether an unnamed layer before the first convolution is an instance norm
        without weights.
    negative_slope : float
    decodes_before_up : bool
        Whether each decoder block runs before its upsampling.
    """

    title: str
    layers: tuple[tuple[Role, re.Pattern[str]], ...]
    normalization: Normalization = field(default_factory=Normalization)
    known: str = ""
    unknown: str = ""
    up_first: bool = False
    padding: Padding = "same"
    skips: Skips = "concat"
    bare_upsampling: Upsampling | None = None
    align_corners: bool = False
    norm_place: NormPlace = "before_activation"
    plain_norm: Literal["instance"] | None = None
    silent_norm: bool = False
    negative_slope: float = 0.0
    decodes_before_up: bool = False


def _layers(text: str) -> tuple[tuple[Role, re.Pattern[str]], ...]:
    """Compile lines of "role pattern"; L and I stand for the two numbers."""
    found: list[tuple[Role, re.Pattern[str]]] = []
    words = text.split()
    for role, pattern in zip(words[::2], words[1::2], strict=True):
        pattern = pattern.replace(".", r"\.")
        pattern = pattern.replace("<L>", r"(?P<l>\d+)").replace("<I>", r"(?P<i>\d+)")
        found.append((role, re.compile(pattern)))  # type: ignore[arg-type]
    return tuple(found)


_ONE_CONVOLUTION = """
    encoder encoder.<L>.(?:conv|bn|norm)
    bottleneck fc
    head logits
"""

FAMILIES = (
    Family(
        "milesial/Pytorch-UNet",
        _layers("""
            encoder inc.(?:double_conv|conv.conv).<I>
            encoder down<L>.(?:maxpool_conv.1.double_conv|mpconv.1.conv).<I>
            up up<L>.up
            decoder up<L>.conv.(?:double_conv|conv).<I>
            head outc.conv
        """),
        _EIGHT_BIT,
        known="its training script divides grey values by 255",
        bare_upsampling="bilinear",
        align_corners=True,
    ),
    Family(
        "mateuszbuda/brain-segmentation-pytorch",
        _layers("""
            encoder encoder<L>.enc[0-9]+(?:conv|norm)<I>
            bottleneck bottleneck.bottleneck(?:conv|norm)<I>
            up upconv<L>
            decoder decoder<L>.dec[0-9]+(?:conv|norm)<I>
            head conv
        """),
        _STANDARD,
        known="its images have zero mean and unit standard deviation by channel",
        up_first=True,
    ),
    Family(
        "segmentify",
        _layers("""
            encoder encode_<L>.conv.conv_block.<I>
            bridge bridge
            up decode_<L>.conv_t
            decoder decode_<L>.conv.conv_block.<I>
            head segment
        """),
        _LEAST_TO_GREATEST,
        known="skip connections are added and the norm follows the activation",
        unknown="how its training images were normalised; the least and greatest grey "
        "values as 0 and 1 suit its model of nuclei best",
        skips="add",
        decodes_before_up=True,
    ),
    Family(
        "torch-em (bioimage.io)",
        _layers("""
            encoder encoder.blocks.<L>.block.<I>
            bottleneck base.block.<I>
            up decoder.samplers.<L>.conv
            decoder decoder.blocks.<L>.block.<I>
            head out_conv
        """),
        _JOINT_STANDARD,
        known="its images have zero mean and unit standard deviation",
        unknown="whether a final activation other than sigmoid or softmax was used",
        up_first=True,
        silent_norm=True,
    ),
    Family(
        "MONAI BasicUNet",
        _layers("""
            encoder conv_0.conv_<I>.(?:conv|adn.N)
            encoder down_<L>.convs.conv_<I>.(?:conv|adn.N)
            up upcat_<L>.upsample.deconv
            decoder upcat_<L>.convs.conv_<I>.(?:conv|adn.N)
            head final_conv
        """),
        known="its activation is the default one, a LeakyReLU of slope 0.1",
        unknown="whether another activation, or group norms instead of instance norms, "
        "were chosen when it was trained",
        plain_norm="instance",
        negative_slope=0.1,
    ),
    Family(
        "jvanvugt/pytorch-unet",
        _layers("""
            encoder down_path.<L>.block.<I>
            up up_path.<L>.up(?:.1)?
            decoder up_path.<L>.conv_block.block.<I>
            head last
        """),
        unknown="whether its convolutions were padded (it is taken for granted)",
        up_first=True,
    ),
    Family(
        "U-Net of down_convolution_1 … up_convolution_4",
        _layers("""
            encoder down_convolution_<L>.conv.conv_op.<I>
            bottleneck bottle_neck.conv_op.<I>
            up up_convolution_<L>.up
            decoder up_convolution_<L>.conv.conv_op.<I>
            head out
        """),
        up_first=True,
    ),
    Family(
        "U-Net of downsample_0 … upsample_3",
        _layers("""
            encoder downsample_<L>.double_conv.(?:conv|bn|norm|batch_norm)_<I>
            bottleneck [a-z]+.double_conv.(?:conv|bn|norm|batch_norm)_<I>
            up upsample_<L>.(?!double_conv)[a-z_0-9]+
            decoder upsample_<L>.double_conv.(?:conv|bn|norm|batch_norm)_<I>
            head output
        """),
        padding="valid",
        known="its convolutions are not padded",
        unknown="in which order it joins maps; the skip connection is taken first",
    ),
    Family(
        "U-Net of down_conv_1 … up_conv_1",
        _layers("""
            encoder down_conv_<L>.<I>
            up up_trans_<L>
            decoder up_conv_<L>.<I>
            head (?:final_layer|out)
        """),
        up_first=True,
        padding="valid",
        known="its convolutions are not padded",
    ),
    Family(
        "U-Net of one convolution a level",
        _layers(
            _ONE_CONVOLUTION
            + """
            up decoder.<L>.conv1
            decoder decoder.<L>.conv<I>
            decoder decoder.<L>.(?:bn|norm)<I>
        """
        ),
        unknown="in which order it joins maps; the skip connection is taken first",
    ),
    Family(
        "U-Net of one convolution a level",
        _layers(
            _ONE_CONVOLUTION
            + """
            decoder decoder.<L>.conv<I>
            decoder decoder.<L>.(?:bn|norm)<I>
        """
        ),
        bare_upsampling="nearest",
        unknown="in which order it joins maps (the skip connection is taken first) "
        "and how it upsamples (by repetition, it is taken)",
    ),
    Family(
        "napari-unet without its passport",
        _layers("""
            encoder encoder.<L>.<I>
            bottleneck bottleneck.<I>
            up up.<L>.conv
            decoder decoder.<L>.<I>
            head head
        """),
        unknown="whether its convolutions were padded (it is taken for granted) and "
        "whether 1x1 upsamplings unpool (they are taken to interpolate)",
    ),
)

# Parts of names by which networks of another kind are told.
OTHERS = {
    "segmentation_head.0": "segmentation_models_pytorch",
    "decoder.seg_layers.": "nnU-Net",
    "downsample.down.res_down_": "Cellpose",
    "image_encoder.": "Segment Anything",
}
