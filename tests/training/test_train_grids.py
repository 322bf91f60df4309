import numpy as np
import pytest
import torch

from genkernels.training import draw, save_png, scatter, tile

Image = pytest.importorskip("PIL.Image")
LINE = 96


def test_tiny_pictures_are_enlarged_by_a_whole_factor_with_sharp_squares():
    images = torch.rand(5, 1, 8, 8)
    sheet = tile(images)
    factor, line = 8, 2  # 8 pixels to 64; lines a quarter of a pixel
    assert sheet.shape == (2 * (64 + line) + line, 3 * (64 + line) + line) and sheet.dtype == np.uint8
    for i in range(5):
        top, left = line + i // 3 * (64 + line), line + i % 3 * (64 + line)
        got = sheet[top : top + 64, left : left + 64]
        assert (got == np.kron((images[i, 0] * 255).round().numpy(), np.ones((factor, factor)))).all()
    assert (
        (sheet[:line] == LINE).all()
        and (sheet[:, :line] == LINE).all()
        and (sheet[line + 64 : 2 * line + 64] == LINE).all()
    )
    assert (sheet[-64:, -64:] == LINE).all(), "the place of a missing picture"


def test_colours_bytes_and_wild_values():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[0, 1], images[0, 2] = 2.0, float("nan"), -1.0
    images[1] = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    sheet = tile(images, columns=1)
    assert sheet.shape == (2 * 68 + 4, 72, 3)
    assert sheet[10, 10].tolist() == [255, 0, 0] and sheet[-10, 10].tolist() == [0, 128, 255]
    as_bytes = torch.full((1, 1, 2, 2), 7, dtype=torch.uint8)
    assert tile(as_bytes)[20, 20] == 7


def test_large_pictures_stay_as_they_are_and_bad_shapes_are_refused():
    assert tile(torch.rand(4, 3, 100, 120)).shape[0] == 2 * 101 + 1
    for shape in ((3, 8, 8), (2, 2, 8, 8), (0, 1, 8, 8)):
        with pytest.raises(ValueError, match="tile: images must be"):
            tile(torch.zeros(shape))


def test_points_are_drawn_where_they_are():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(500, 2, generator=generator) * 0.1 - 1
    right = torch.cat([left, torch.full((1, 2), float("nan")), torch.full((1, 2), 1e9)])
    picture = scatter(right, torch.cat([left, -left]))
    assert picture.ndim == 3 and picture.dtype == np.uint8
    half = picture.shape[1] // 2
    dark = (picture < 200).any(2)[60:-60, 60 : half - 30]  # inside the first panel's frame
    rows, columns = np.nonzero(dark[5:-5, 5:-5])
    assert len(rows) > 50
    assert rows.mean() > dark.shape[0] / 2 and columns.mean() < dark.shape[1] / 2, "low and to the left"
    assert scatter(torch.randn(100, 1)).ndim == 3


def test_draw_takes_what_models_give(tmp_path):
    assert draw(torch.rand(3, 1, 4, 4)).ndim == 2 and draw(torch.rand(3, 3, 4, 4)).ndim == 3
    assert draw(torch.rand(3, 2, 4, 4)).ndim == 2, "other channel counts: one grey tile a channel"
    assert draw(torch.rand(3, 2)).ndim == 3
    pixels = draw(torch.rand(3, 3, 4, 4))
    save_png(tmp_path / "deep" / "a.png", pixels)
    assert (np.asarray(Image.open(tmp_path / "deep" / "a.png")) == pixels).all()
