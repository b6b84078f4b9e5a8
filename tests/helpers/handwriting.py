"""Handwriting in files, as users and EMNIST have it."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.customization.characters import folder_name
from tasks.customization.data import Samples


def write_class_folders(folder: Path, samples: Samples) -> None:
    """Write samples as `<class folder>/<number>.png`, the layout that `read_class_folders` reads."""
    for number, (image, label) in enumerate(zip(samples.images, samples.labels.tolist(), strict=True)):
        path = folder / folder_name(label) / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)


def write_emnist(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write both parts of an EMNIST split, the same, as torchvision downloads them; images are upright."""
    for part in ("train", "test"):
        base = root / "EMNIST" / "raw" / f"emnist-{split}-{part}"
        write_idx(Path(f"{base}-images-idx3-ubyte"), np.ascontiguousarray(images.transpose(0, 2, 1)))
        write_idx(Path(f"{base}-labels-idx1-ubyte"), labels)


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.tobytes())
