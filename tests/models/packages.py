"""bioimage.io packages written by hand, as others write them."""

import hashlib
import io
import zipfile

import numpy as np
import torch
import yaml
from originals import TorchEM

SIDE = 32


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def npy(array) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def make_image(channels=1, seed=0, side=SIDE, ndim=2):
    """Grey values of a 12-bit camera."""
    random = np.random.default_rng(seed)
    shape = (1, channels, *[side] * ndim)
    return random.gamma(2, 200, shape).astype(np.float32)


class Written:
    """A package: its description as a dict, and its files.

    The test output is computed with the original network and the functions given,
    not with napari-unet.
    """

    def __init__(self, channels=1, outputs=1, before=None, after=None, ndim=2):
        torch.manual_seed(0)
        self.network = TorchEM(
            ndim, None, in_channels=channels, outputs=outputs, depth=2
        ).eval()
        image = make_image(channels, ndim=ndim)
        pixels = image if before is None else before(image.astype(np.float64))
        tensor = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
        with torch.no_grad():
            # Probabilities of all sizes.
            head = self.network.out_conv
            found = self.network(tensor)
            axes = (0, *range(2, found.ndim))
            head.weight *= (2 / found.std(axes)).reshape(-1, *[1] * (ndim + 1))
            head.bias -= self.network(tensor).mean(axes)
            bare = self.network(tensor).numpy()
        weights = io.BytesIO()
        torch.save(self.network.state_dict(), weights)
        self.bare = bare
        self.image = image
        self.files = {
            "weights.pt": weights.getvalue(),
            "in.npy": npy(image),
            "out.npy": npy(bare if after is None else after(bare)),
            "net.py": b"raise SystemExit('code of the package was run')\n",
            "README.md": b"# Validation\n",
        }

    def file(self, name):
        sha256 = hashlib.sha256(self.files[name]).hexdigest()
        return {"source": name, "sha256": sha256}

    def content(self, preprocessing=(), postprocessing=(), **changes):
        """The description in format 0.5."""
        axes = "zyx"[-(self.image.ndim - 2) :]
        return {
            "format_version": "0.5.0",
            "type": "model",
            "name": "By hand",
            "description": "Finds what it finds",
            "version": "2.1",
            "authors": [{"name": "Ada"}, {"name": "Grace"}],
            "license": "MIT",
            "cite": [{"text": "Ours", "doi": "10.1000/182"}],
            "timestamp": "2024-01-02T03:04:05",
            "documentation": "README.md",
            "inputs": [
                {
                    "id": "raw",
                    "axes": [
                        {"type": "batch"},
                        {
                            "type": "channel",
                            "channel_names": [
                                f"dye {i}" for i in range(self.image.shape[1])
                            ],
                        },
                        *(
                            {"type": "space", "id": a, "size": {"min": 16, "step": 16}}
                            for a in axes
                        ),
                    ],
                    "test_tensor": self.file("in.npy"),
                    "preprocessing": list(preprocessing),
                }
            ],
            "outputs": [
                {
                    "id": "found",
                    "axes": [
                        {"type": "batch"},
                        {
                            "type": "channel",
                            "channel_names": [
                                f"channel{i}" for i in range(self.bare.shape[1])
                            ],
                        },
                        *(
                            {
                                "type": "space",
                                "id": a,
                                "size": {"tensor_id": "raw", "axis_id": a},
                            }
                            for a in axes
                        ),
                    ],
                    "test_tensor": self.file("out.npy"),
                    "postprocessing": list(postprocessing),
                }
            ],
            "weights": {
                "pytorch_state_dict": self.file("weights.pt")
                | {
                    "pytorch_version": "2.1",
                    "architecture": self.file("net.py") | {"callable": "Net"},
                }
            },
        } | changes

    def content_0_4(self, preprocessing=(), postprocessing=()):
        """The description in format 0.4."""
        axes = "bc" + "zyx"[-(self.image.ndim - 2) :]
        tensor = {"axes": axes, "data_type": "float32"}
        return {
            "format_version": "0.4.9",
            "type": "model",
            "name": "By hand",
            "description": "Finds what it finds.",
            "authors": [{"name": "Ada"}],
            "license": "MIT",
            "cite": [{"text": "Ours", "doi": "10.1000/182"}],
            "timestamp": "2024-01-02T03:04:05",
            "documentation": "README.md",
            "inputs": [
                tensor
                | {
                    "name": "raw",
                    "shape": list(self.image.shape),
                    "preprocessing": list(preprocessing),
                }
            ],
            "outputs": [
                tensor
                | {
                    "name": "found",
                    "shape": list(self.bare.shape),
                    "postprocessing": list(postprocessing),
                }
            ],
            "test_inputs": ["in.npy"],
            "test_outputs": ["out.npy"],
            "weights": {
                "pytorch_state_dict": self.file("weights.pt")
                | {
                    "architecture": "net.py:Net",
                    "architecture_sha256": self.file("net.py")["sha256"],
                    "pytorch_version": "1.6",
                }
            },
        }

    def zip(self, path, content, **others):
        """Write an archive; other files are added or replace these."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("rdf.yaml", yaml.safe_dump(content, sort_keys=False))
            for name, data in (self.files | others).items():
                archive.writestr(name, data)
        return path

    def folder(self, path, content):
        path.mkdir()
        (path / "rdf.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        for name, data in self.files.items():
            (path / name).write_bytes(data)
        return path
