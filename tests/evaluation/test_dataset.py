import numpy as np
import pytest
import torch
from PIL import Image

from fgd_hooks.errors import DataError
from fgd_hooks.evaluation.dataset import load_letterboxed, load_sample, true_image


@pytest.fixture
def file(tmp_path):
    """100 x 40 pixels, black, with a red rectangle at x 20..60, y 10..30."""
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[10:30, 20:60] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_the_longer_side_is_resized_and_both_are_padded_to_strides(file):
    pixels, scale, offset = load_letterboxed(file, 200, 32)
    assert pixels.shape == (3, 96, 224)
    assert scale == 2
    assert offset == (12, 8)
    assert pixels[:, 0, 0].tolist() == pytest.approx([114 / 255] * 3)
    assert pixels[:, 48, 20].tolist() == [0, 0, 0]


def test_boxes_stay_on_their_objects(file):
    boxes = np.array([[20.0, 10, 40, 20], [0, 0, 100, 40]])
    image = true_image(file, 100, 40, [0, 1], boxes, crowd=np.array([False, True]))
    pixels, corners = load_sample(image, 200, 32)
    assert corners.tolist() == [[52, 28, 132, 68]], "a crowd region is no object"
    red = (pixels[0] > 0.9) & (pixels[1] < 0.1)
    rows, columns = torch.where(red)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert [int(each) for each in found] == pytest.approx([52, 28, 132, 68], abs=1)


def test_an_image_without_boxes_and_a_turned_one(file, tmp_path):
    with Image.open(file) as image:
        exif = image.getexif()
        exif[274] = 6  # to be turned by 90 degrees
        image.convert("L").save(tmp_path / "turned.png", exif=exif)
    turned = true_image(tmp_path / "turned.png", 40, 100, [], np.zeros((0, 4)))
    pixels, corners = load_sample(turned, 96, 32)
    assert pixels.shape == (3, 96, 64)
    assert corners.shape == (0, 4)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "note.png").write_text("no image")
    with pytest.raises(DataError, match=r"note\.png"):
        load_letterboxed(tmp_path / "note.png", 64)


@pytest.mark.parametrize("channels", [3, 1])
def test_sixteen_bits_are_read_as_the_host_reads_them(tmp_path, channels):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    patches = pytest.importorskip("ultralytics.utils.patches")
    host = patches.imread(str(tmp_path / "deep.png"), 1 if channels == 3 else 0)
    pixels = load_letterboxed(tmp_path / "deep.png", 64, channels=channels)[0]
    assert pixels.shape == (channels, 64, 64)
    assert (255 * pixels[0, 0]).round().tolist() == pytest.approx(host[0, :, 0].tolist(), abs=1)


def test_an_image_of_four_channels_is_refused(file):
    with pytest.raises(DataError, match="images of 4 channels"):
        load_letterboxed(file, 64, channels=4)
