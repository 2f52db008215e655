"""The photograph, and the convolutions of it that are compared."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from PIL import Image, ImageOps

NHWC = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution to compare.

    Attributes:
      name: for people.
      source: what it is applied to, a key of ``sources``.
      kernel: (kh, kw, c / groups, o), float32.
      pad: zeros on each of the four sides.
      stride, lhs_dilation: of both spatial axes; ``lhs_dilation`` 2 is a transposed 2× upsampling.
      groups: of channels; c for a depthwise convolution.
    """

    name: str
    source: str
    kernel: np.ndarray
    pad: int
    stride: int = 1
    lhs_dilation: int = 1
    groups: int = 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What follows lhs and rhs in ``lax.conv_general_dilated`` and in ``jaxconv.plan``."""
        pads = ((self.pad, self.pad),) * 2
        return (self.stride,) * 2, pads, (self.lhs_dilation,) * 2, None, NHWC, self.groups


def load(path: Path | None, size: int) -> tuple[np.ndarray, str]:
    """A photograph, and what it is in words.

    Args:
      path: any file that Pillow reads; None for the portrait that scikit-image brings along.
      size: pixels of the long side above which it is scaled down.

    Returns:
      (h, w, 3) float32 in 0…1, and a caption.

    Raises:
      OSError: there is no such file, it can't be read, or it is no image.
    """
    if path is None:
        from skimage.data import astronaut

        photograph, name = Image.fromarray(astronaut()), "astronaut (from scikit-image)"
    else:
        photograph, name = _open(path), path.name
    width, height = photograph.size
    photograph.thumbnail((size, size), Image.Resampling.LANCZOS)  # shrinks only, keeps the aspect
    caption = f"{name}, {width}×{height}"
    if photograph.size != (width, height):
        caption += " scaled to {}×{}".format(*photograph.size)
    return np.asarray(photograph, np.float32) / np.float32(255), caption


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as photograph:
            photograph = ImageOps.exif_transpose(photograph)
            if photograph.mode.startswith(("I", "F")):  # more than 8 bits, which "RGB" would clip
                grey = np.asarray(photograph, np.float32)
                grey = 255 * (grey - grey.min()) / max(float(np.ptp(grey)), 1e-9)
                photograph = Image.fromarray(np.rint(grey).astype(np.uint8))
            return photograph.convert("RGB")
    except OSError:
        raise
    except Exception as error:  # a damaged file raises whatever its format's decoder stumbles over
        raise OSError(f"not a readable image: {error}") from error


def sources(photograph: np.ndarray) -> dict[str, Array]:
    """What the convolutions are applied to, by name, each (1, h, w, c) float32.

    "features" are what a ResNet makes of the photograph (h, w) up to its first block: the stem,
    ReLU, and a 3×3 max-pooling with stride 2, so 64 channels of (h / 4, w / 4).
    """
    rgb = jnp.asarray(photograph[None], jnp.float32)
    grey = rgb @ jnp.asarray([[0.299], [0.587], [0.114]], jnp.float32)
    features = lax.conv_general_dilated(rgb, jnp.asarray(STEM.kernel), *STEM.arguments)
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    # Pooling from zero is ReLU too.
    features = lax.reduce_window(features, np.float32(0), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    return {"photograph": rgb, "grey": grey, "features": features}


def _blur() -> np.ndarray:
    """An 11×11 Gaussian, σ = 2 pixels, the same for three channels: (11, 11, 1, 3)."""
    line = np.exp(-(np.arange(-5.0, 6.0) ** 2) / 8)
    kernel = np.outer(line, line) / line.sum() ** 2
    return np.repeat(kernel[:, :, None, None], 3, axis=-1).astype(np.float32)


def _sobel() -> np.ndarray:
    """The derivatives along x and along y: (3, 3, 1, 2)."""
    along_x = np.outer([1, 2, 1], [-1, 0, 1]) / 4
    return np.stack([along_x, along_x.T], axis=-1)[:, :, None].astype(np.float32)


def _random(*shape: int) -> np.ndarray:
    """He et al.'s initial weights (2015), the same in each run: (kh, kw, c, o)."""
    kernel = np.random.default_rng(0).standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
    # Without a mean, a filter answers to structure and not to brightness, as trained ones do.
    return (kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)).astype(np.float32)


def _bilinear(channels: int) -> np.ndarray:
    """Interpolation to twice the size, each channel from itself: (4, 4, channels, channels)."""
    line = np.array([1, 3, 3, 1]) / 4
    kernel = np.outer(line, line)[:, :, None, None] * np.eye(channels)
    return kernel.astype(np.float32)


STEM = Convolution("7×7 stem, stride 2, 3 → 64", "photograph", _random(7, 7, 3, 64), 3, stride=2)
CONVOLUTIONS = (
    Convolution("Depthwise 11×11 blur", "photograph", _blur(), 5, groups=3),
    Convolution("Sobel pair, 3×3, 1 → 2", "grey", _sobel(), 1),
    STEM,
    Convolution("3×3, 64 → 64", "features", _random(3, 3, 64, 64), 1),
    Convolution("1×1, 64 → 256", "features", _random(1, 1, 64, 256), 0),
    # The same convolution as lax.conv_transpose(x, kernel, (2, 2), "SAME").
    Convolution("Transposed 4×4, 2× up, 64 → 64", "features", _bilinear(64), 2, lhs_dilation=2),
)
