"""Photographs for parity checks and the demo: those of scikit-image, or a folder of the user.

Nothing is downloaded: only files inside the installed scikit-image package are used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESIZE, CROP = 256, 224  # pixels, as in ImageNet's standard evaluation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The photographs in scikit-image's wheel (its other pictures are drawings and textures).
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
    "camera.png",
    "coins.png",
    "moon.png",
    "page.png",
    "grass.png",
    "gravel.png",
    "brick.png",
    "motorcycle_right.png",
)


@dataclass
class ImageBatch:
    """images: (N, 3, 224, 224) float32, normalised; errors: one line per skipped file."""

    images: Tensor
    names: list[str]
    errors: list[str] = field(default_factory=list)


def photographs() -> list[Path]:
    """The photographs inside the installed scikit-image; empty if it is not installed.

    The package is located but not imported, so its downloader cannot run.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "data"
    return [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]


def load_images(source: str | Path | Iterable[Path], limit: int | None = None) -> ImageBatch:
    """Load every image of a folder (with its subfolders), one file, or a list of files.

    A file that cannot be read as an image is skipped and adds a line to `errors`.
    Raises FileNotFoundError if the folder is missing, ValueError if no file could be read.
    """
    from PIL import UnidentifiedImageError

    paths = _paths(source)
    batch = ImageBatch(torch.empty(0, 3, CROP, CROP), [])
    tensors: list[Tensor] = []
    for path in paths:
        if limit is not None and len(tensors) >= limit:
            break
        try:
            tensors.append(preprocess(open_rgb(path)))
            batch.names.append(path.name)
        except UnidentifiedImageError:
            batch.errors.append(f"{path}: not an image that Pillow can read")
        except Exception as error:  # decoders may raise anything
            batch.errors.append(f"{path}: {str(error).strip() or type(error).__name__}")
    if not tensors:
        first = f"; {batch.errors[0]}" if batch.errors else ""
        raise ValueError(f"images: no readable image among {len(paths)} files of {source}{first}")
    batch.images = torch.stack(tensors)
    return batch


def _paths(source: str | Path | Iterable[Path]) -> list[Path]:
    if not isinstance(source, (str, Path)):
        return list(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"images: {path} does not exist")
    if path.is_file():
        return [path]
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return sorted(files)


def open_rgb(path: Path) -> Any:
    """The first frame as 8-bit RGB, upright; alpha is dropped, 16-bit and float are scaled."""
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            image = _to_8_bit(image)
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return _shorten(image.convert("RGB"))


def _to_8_bit(image: Any) -> Any:
    """Scales 0..65535 of integers to 0..255; other value ranges are stretched to 0..255."""
    import numpy
    from PIL import Image

    values = numpy.nan_to_num(numpy.asarray(image).astype(numpy.float64))
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(scaled.round().astype(numpy.uint8))


def _shorten(image: Any) -> Any:
    """Crop the long side, around its middle, to at most 4 times the short side.

    The centre crop uses no pixels beyond that, and resizing a 1 x 5000 strip would take gigabytes.
    """
    width, height = image.size
    longest = 4 * min(width, height)
    if max(width, height) <= longest:
        return image
    new_width, new_height = min(width, longest), min(height, longest)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def preprocess(image: Any) -> Tensor:
    """ImageNet's evaluation transform, PIL image -> (3, 224, 224) float32.

    Resizes the shorter side to 256 (bilinear, antialiased), crops the central 224 x 224 pixels and
    normalises: torchvision's result but for the rounding of float32.
    """
    import numpy
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    size = (int(RESIZE * width / short), int(RESIZE * height / short))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - CROP) / 2), round((size[1] - CROP) / 2)
    image = image.crop((left, top, left + CROP, top + CROP))
    pixels = torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
