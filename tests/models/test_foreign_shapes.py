"""Networks whose names say nothing, recognised by the order and shapes of layers."""

from itertools import pairwise

import pytest
import torch
from test_foreign import randomise
from torch import nn
from torch.nn import functional

from napari_unet.errors import BadModel
from napari_unet.models.foreign import recognise


class Nameless(nn.Module):
    """A plain encoder-decoder of parts a, b, c, … in one of the usual orders."""

    def __init__(
        self,
        order="bottom in the middle",
        convs=2,
        depth=2,
        norm=True,
        norm_first=False,
        norm_last=False,
        bare=False,
        ndim=2,
        inputs=1,
        outputs=3,
        width=4,
    ):
        super().__init__()
        self.depth, self.bare, self.ndim = depth, bare, ndim
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        batch = nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d
        transposed = nn.ConvTranspose2d if ndim == 2 else nn.ConvTranspose3d

        def block(start, end):
            layers = []
            for first in (start, *(end,) * (convs - 1)):
                norms = [batch(first if norm_first else end)] if norm else []
                one = [conv(first, end, 3, padding=1)]
                layers += [*norms, *one] if norm_first else one
                layers += (
                    [nn.ReLU()] if norm_first or norm_last else [*norms, nn.ReLU()]
                )
                layers += norms if norm_last else []
            return nn.Sequential(*layers)

        widths = [inputs, *(width << level for level in range(depth + 1))]
        pairs = list(pairwise(widths))
        down = [block(*pair) for pair in pairs[:-1]]
        bottom = block(*pairs[-1])
        ups = [None if bare else transposed(b, a, 2, 2) for a, b in pairs[:0:-1]]
        up = [block(a + (b if bare else a), a) for a, b in pairs[:0:-1]]
        self.parts = [down, bottom, ups, up, conv(width, outputs, 1)]
        steps = [part for pair in zip(ups, up, strict=True) for part in pair]
        stored = {
            "bottom in the middle": [*down, bottom, *steps],
            "bottom at the end": [*down, *steps, bottom],
            "upsamplings apart": [*down, bottom, *ups, *up],
            "from the finest": [*down, bottom, *ups[::-1], *up[::-1]],
        }[order]
        kept = [part for part in stored if part is not None]
        self.q = nn.ModuleList([*kept, self.parts[-1]])

    def forward(self, x):
        down, bottom, ups, up, head = self.parts
        maps = []
        for block in down:
            maps.append(block(x))
            pool = functional.max_pool2d if self.ndim == 2 else functional.max_pool3d
            x = pool(maps[-1], 2)
        x = bottom(x)
        mode = "bilinear" if self.ndim == 2 else "trilinear"
        for grow, block in zip(ups, up, strict=True):
            larger = (
                functional.interpolate(x, scale_factor=2, mode=mode)
                if self.bare
                else grow(x)
            )
            x = block(torch.cat([maps.pop(), larger], dim=1))
        return head(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "bottom at the end"},
        {"order": "upsamplings apart"},
        {"order": "from the finest"},
        {"convs": 1, "norm": False, "depth": 3},
        {"convs": 3, "inputs": 3, "outputs": 1},
        {"norm_first": True},
        {"norm_last": True, "depth": 3},
        {"bare": True},
        {"bare": True, "convs": 1, "depth": 4, "width": 2},
        {"ndim": 3, "depth": 1, "norm": False},
    ],
    ids=str,
)
def test_plain_networks(options):
    network = randomise(Nameless(**options))
    model = recognise(network.state_dict())
    assert "by the order and shapes of its layers alone" in model.passport.description
    assert "Compare the result" in model.passport.description
    channels = options.get("inputs", 1)
    image = torch.randn(1, channels, *[32] * options.get("ndim", 2))
    with torch.inference_mode():
        assert torch.allclose(model.network(image), network(image), atol=1e-5)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda s: s.pop("q.0.3.weight"),
        lambda s: s.update({"q.1.0.weight": torch.zeros(8, 5, 3, 3)}),
        lambda s: s.update({"r.weight": torch.zeros(1, 4, 5, 5)}),
        lambda s: s.update({"r.weight": torch.zeros(4)}),
        lambda s: s.update({"r.weight": torch.zeros(4, 4, 3, 3)}),
    ],
    ids=range(5),
)
def test_what_is_not_plain_is_refused(break_it):
    state = dict(Nameless().state_dict())
    break_it(state)
    with pytest.raises(BadModel, match="docs/checkpoints"):
        recognise(state)
