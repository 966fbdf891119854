"""Images of every mode become float32 (N, 3, 224, 224); unreadable files are reported."""

from __future__ import annotations

import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
np = pytest.importorskip("numpy")

from fused_resnet.parity.images import load_images  # noqa: E402


def picture(mode: str, size=(40, 30)):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(array)
    if mode == "I;16":
        return Image.fromarray((array[..., 0].astype(np.uint16) << 8) + 7)
    return image.convert(mode)


KINDS = {
    "rgb.png": "RGB", "grey.png": "L", "rgba.png": "RGBA", "cmyk.jpg": "CMYK", "16.png": "I;16",
    "palette.png": "P", "one_bit.png": "1", "grey_alpha.png": "LA", "rgb.webp": "RGB",
    "rgb.bmp": "RGB",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_mode_is_converted(tmp_path, name):
    picture(KINDS[name]).save(tmp_path / name)
    batch = load_images(tmp_path)
    assert batch.images.shape == (1, 3, 224, 224) and batch.images.dtype == torch.float32
    assert batch.images.isfinite().all() and batch.images.std() > 0.1, "the picture is blank"
    assert not batch.errors


def test_16_bit_images_keep_their_brightness(tmp_path):
    grey = np.full((20, 20), 128 << 8, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "16.png")
    Image.fromarray(np.full((20, 20), 128, dtype=np.uint8)).save(tmp_path / "8.png")
    batch = load_images(tmp_path)
    torch.testing.assert_close(batch.images[0], batch.images[1], rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2000, 3), (224, 224)], ids=str)
def test_any_size(tmp_path, size):
    picture("RGB", size).save(tmp_path / "a.png")
    assert load_images(tmp_path).images.shape == (1, 3, 224, 224)


def test_unreadable_files_are_reported_and_skipped(tmp_path):
    picture("RGB").save(tmp_path / "good.png")
    picture("RGB", (300, 300)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    batch = load_images(tmp_path)
    assert len(batch.images) == 1
    text = " ".join(map(str, batch.errors))
    assert all(name in text for name in ("cut.png", "text.jpg", "empty.png")) and "good" not in text


def test_a_folder_without_images_raises(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=tmp_path.name):
        load_images(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.jpg"):
        load_images(tmp_path)
