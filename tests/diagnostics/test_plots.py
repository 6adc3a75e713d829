import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fgd_hooks.diagnostics.plots import draw_sheet, save_sheets, sheet_pixels
from fgd_hooks.diagnostics.tensorboard import write_sheets
from tests.diagnostics.test_attention import hand_made

pytest.importorskip("matplotlib")


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def test_what_each_panel_shows():
    sheet = hand_made()
    drawn = panels(draw_sheet(sheet, top=2))
    assert list(drawn) == [
        "Image",
        "Foreground weights",
        "Background weights",
        "Teacher's attention",
        "Student's attention",
        "Difference: 0.50 on average",
        "Top 2 of 4 channels",
    ]
    shown = {title: axes.images[0].get_array() for title, axes in drawn.items() if axes.images}
    for title, tensor in (
        ("Foreground weights", sheet.foreground),
        ("Background weights", sheet.background),
        ("Teacher's attention", sheet.teacher_spatial),
        ("Student's attention", sheet.student_spatial),
        ("Difference: 0.50 on average", sheet.student_spatial - sheet.teacher_spatial),
    ):
        np.testing.assert_array_equal(shown[title], tensor.numpy())
        assert len(drawn[title].patches) == 2, "the true boxes are drawn on every map"
        assert drawn[title].images[0].colorbar.ax.get_ylabel()
    np.testing.assert_allclose(shown["Image"], sheet.image.permute(1, 2, 0).numpy())
    assert all(len(axes.texts) == 1 and axes.texts[0].get_text() for axes in drawn.values()), "a sentence for each"


def test_one_scale_for_both_and_zero_in_the_middle():
    drawn = panels(draw_sheet(hand_made(shift=0.9)))
    limits = [drawn[f"{who}'s attention"].images[0].get_clim() for who in ("Teacher", "Student")]
    assert limits[0] == limits[1]
    assert limits[0][1] >= 1.9
    low, high = drawn["Difference: 0.90 on average"].images[0].get_clim()
    assert high == -low == pytest.approx(0.9)


def test_colours_get_steadily_brighter_so_that_hue_is_not_needed():
    from matplotlib import colormaps

    from fgd_hooks.diagnostics.plots import ATTENTION_COLOURS, DIFFERENCE_COLOURS

    def brightness(name):
        return colormaps[name](np.linspace(0, 1, 64))[:, :3] @ [0.2126, 0.7152, 0.0722]

    assert (np.diff(brightness(ATTENTION_COLOURS)) > 0).all()
    middle = brightness(DIFFERENCE_COLOURS)
    assert (np.diff(middle[:30]) > 0).all()
    assert (np.diff(middle[34:]) < 0).all()
    low, high = (np.array(colormaps[DIFFERENCE_COLOURS](end)) for end in (0.1, 0.9))
    assert high[0] - low[0] > 0.2, "orange for more"
    assert low[2] - high[2] > 0.2, "purple for less"


def test_bars_are_the_teachers_strongest_channels_in_order():
    axes = panels(draw_sheet(hand_made(), top=3))["Top 3 of 4 channels"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3", "0"]
    teacher, student = ([bar.get_width() for bar in container] for container in axes.containers)
    assert teacher == [2.0, 1.25, 0.5]
    assert student == [1.5, 1.0, 1.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["teacher", "student"]


def test_without_an_adapter_no_difference_and_no_bars_of_the_student():
    sheet = dataclasses.replace(hand_made(shift=3.0), adapted=False, student_channels=None)
    drawn = panels(draw_sheet(sheet))
    assert not drawn["No difference"].images
    assert "no trained adapter" in drawn["Student's own attention"].texts[0].get_text()
    assert len(drawn["Top 4 of 4 channels"].containers) == 1


@pytest.mark.parametrize(
    "image",
    [torch.randn(3, 16, 40) * 2, torch.rand(1, 64, 16) * 255, torch.rand(5, 16, 16)],
    ids=["normalised", "one channel, tall", "five channels"],
)
def test_any_image_can_be_drawn(image):
    drawn = panels(draw_sheet(dataclasses.replace(hand_made(), image=image, boxes=torch.zeros(0, 4))))
    shown = drawn["Image"].images[0].get_array()
    assert shown.shape == (*image.shape[1:], 3)
    assert 0 <= shown.min() <= shown.max() <= 1


def test_an_image_without_background_is_drawn():
    drawn = panels(draw_sheet(dataclasses.replace(hand_made(), background=torch.zeros(2, 2))))
    assert drawn["Background weights"].texts[0].get_text().startswith("none")
    assert drawn["Background weights"].images[0].get_clim() == (0, 1)


def test_files_are_named_after_image_and_level(tmp_path):
    files = save_sheets([hand_made("P3"), hand_made("P4"), hand_made("P3")], tmp_path / "new", dpi=30)
    assert [file.name for file in files] == ["a_cell_b_P3.png", "a_cell_b_P4.png", "a_cell_b_P3_2.png"]
    with Image.open(files[0]) as image:
        assert image.format == "PNG"


def test_tensorboard_gets_the_drawn_pixels(tmp_path):
    seen = []

    class Writer:
        def add_image(self, tag, pixels, step, dataformats):
            seen.append((tag, pixels.shape, step, dataformats))

    sheet = hand_made()
    pixels = sheet_pixels(sheet)
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    write_sheets(Writer(), [sheet], 7)
    assert seen == [("fgd/attention/a cell / b/P3", pixels.shape, 7, "HWC")]
