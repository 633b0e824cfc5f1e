import numpy as np
import pytest
from PIL import Image, ImageDraw

from cbpt_runtime.demo import motifs as pens
from cbpt_runtime.demo.motifs import MOTIFS
from cbpt_runtime.demo.pictures import contact_sheet, draw_picture, draw_set, write_folders


@pytest.mark.parametrize("name", MOTIFS)
def test_every_motif_fills_a_good_part_of_its_canvas_and_stays_on_it(name):
    canvas = Image.new("RGB", (128, 128), (1, 2, 3))
    pen = pens.Pen(draw=ImageDraw.Draw(canvas), center=(64, 64), radius=40)
    MOTIFS[name](pen, (200, 60, 90), np.random.default_rng(0))
    drawn = (np.asarray(canvas) != (1, 2, 3)).any(axis=-1)
    assert drawn.mean() > 0.06
    assert not drawn[[0, -1]].any()
    assert not drawn[:, [0, -1]].any()


def test_there_are_at_least_twelve_things_to_draw():
    assert len(MOTIFS) >= 12


def test_the_same_seed_draws_the_same_picture_and_another_one_does_not():
    first, again, other = (draw_picture("owl", 32, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.size == (32, 32)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_set_holds_its_classes_in_order():
    images = draw_set(("owl", "fish"), 3, 24, np.random.default_rng(0))
    assert images.shape == (6, 24, 24, 3)
    assert images.dtype == np.uint8


def test_folders_are_written_losslessly_with_the_class_as_name(tmp_path):
    names = ("ice cream", "owl")
    images = draw_set(names, 2, 16, np.random.default_rng(0))
    write_folders(tmp_path, names, images, np.array([0, 0, 1, 1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ice_cream", "owl"]
    with Image.open(tmp_path / "owl" / "001.png") as image:
        assert np.array_equal(np.asarray(image), images[3])


def test_a_contact_sheet_shows_every_picture_in_its_place():
    images = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(contact_sheet(images, columns=2, gap=1))
    assert sheet.shape == (11, 11, 3)
    assert [int(sheet[row, column, 0]) for row, column in ((1, 1), (1, 6), (6, 1), (6, 6))] == [
        10,
        20,
        30,
        255,
    ]


def test_a_mirrored_pen_draws_the_mirror_image():
    pictures = []
    for mirrored in (False, True):
        canvas = Image.new("L", (65, 65))
        pen = pens.Pen(draw=ImageDraw.Draw(canvas), center=(32, 32), radius=30, mirrored=mirrored)
        pen.box(0.2, -0.5, 0.8, 0.5, 255)
        pictures.append(np.asarray(canvas))
    assert np.array_equal(pictures[0], pictures[1][:, ::-1])


def test_shades_darken_below_one_and_lighten_above():
    assert pens.shade((100, 50, 200), 0.5) == (50, 25, 100)
    assert pens.shade((155, 55, 255), 2.0) == (205, 155, 255)


def test_a_gradient_runs_from_the_first_colour_to_the_second():
    image = np.asarray(pens.gradient(64, (255, 0, 0), (0, 0, 255)))
    assert image[0, 0, 0] > 245
    assert image[-1, 0, 2] > 245
