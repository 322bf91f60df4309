import numpy as np
import pytest
import torch

from genkernels import pictures
from genkernels._words import UsageError
from genkernels.pictures import curves, draw, save, scatter, sheet

Image = pytest.importorskip("PIL.Image")
LINE = 96


def test_tiny_pictures_are_enlarged_by_a_whole_factor_with_sharp_squares():
    images = torch.rand(5, 1, 8, 8)
    grid = sheet(images)
    factor, line = 26, 4  # 640 pixels in all are three times 8, and a rest
    assert grid.shape == (2 * (208 + line) + line, 3 * (208 + line) + line) and grid.dtype == np.uint8
    for i in range(5):
        top, left = line + i // 3 * (208 + line), line + i % 3 * (208 + line)
        got = grid[top : top + 208, left : left + 208]
        assert (got == np.kron((images[i, 0] * 255).round().numpy(), np.ones((factor, factor)))).all()
    assert (
        (grid[:line] == LINE).all()
        and (grid[:, :line] == LINE).all()
        and (grid[line + 208 : 2 * line + 208] == LINE).all()
    )
    assert (grid[-208:, -208:] == LINE).all(), "the place of a missing picture"


def test_colours_bytes_and_wild_values():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[0, 1], images[0, 2] = 2.0, float("nan"), -1.0
    images[1] = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)
    grid = sheet(images, columns=1)
    assert grid.shape == (2 * 644 + 4, 648, 3)
    assert grid[10, 10].tolist() == [255, 0, 0] and grid[-10, 10].tolist() == [0, 128, 255]
    as_bytes = torch.full((1, 1, 2, 2), 7, dtype=torch.uint8)
    assert sheet(as_bytes)[20, 20] == 7


def test_large_pictures_stay_as_they_are_and_bad_shapes_are_refused():
    assert sheet(torch.rand(4, 3, 400, 420)).shape[0] == 2 * 401 + 1
    for shape in ((3, 8, 8), (2, 2, 8, 8), (0, 1, 8, 8)):
        with pytest.raises(ValueError, match="sheet: images must be"):
            sheet(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"samples: drawn must hold at least 1 image, got \[0, 1, 8, 8\]"):
        pictures.samples(torch.zeros(0, 1, 8, 8))


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
    assert draw(torch.rand(3, 2)).ndim == 3 and draw(torch.rand(3, 2), torch.rand(9, 2)).ndim == 3
    pixels = draw(torch.rand(3, 3, 4, 4))
    save(tmp_path / "deep" / "a.png", pixels)
    assert (np.asarray(Image.open(tmp_path / "deep" / "a.png")) == pixels).all()


def test_a_picture_is_whole_or_absent_and_named_as_what_it_is(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2])
    save(tmp_path / "curve.pdf", figure)
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")
    pixels = np.zeros((2, 2), np.uint8)
    for name, picture in (("a.jpg", pixels), ("a.pdf", pixels), ("a.txt", figure)):
        with pytest.raises(UsageError, match=r"a picture's name must end in \.png"):
            save(tmp_path / name, picture)
    save(tmp_path / "a.png", pixels)
    before = (tmp_path / "a.png").read_bytes()

    def fails(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="full"):
        save(tmp_path / "a.png", pixels + 1)
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "curve.pdf"]


def test_labels_surround_the_same_tiles():
    images = torch.rand(6, 1, 8, 8)
    bare = sheet(images, 3)
    page = sheet(
        images, 3, title="a title " * 9, note="a note", rows=("one", "a longer label"), headings=("a", "b", "c")
    )
    assert page.ndim == 3
    height, width = bare.shape
    bottom, right = (edge - 7 for edge in page.shape[:2])  # half a letter of white
    assert (page[bottom - height : bottom, right - width : right] == bare[..., None]).all()
    above, beside = page[: bottom - height], page[bottom - height : bottom, : right - width]
    assert above.min() < 80 and beside.min() < 80, "something is written there"
    assert (page[:, -1] == 255).all() and (page[:, 0] == 255).all(), "a long title is broken, not cut"
    colours = sheet(torch.rand(2, 3, 4, 4), 2, title="x")
    assert colours.shape[2] == 3
    for wrong in ({"rows": ("one",)}, {"headings": ("a", "b")}):
        with pytest.raises(ValueError, match="sheet: (rows|headings) must be [23] labels, got [12]"):
            sheet(images, 3, **wrong)


def test_groups_of_columns_have_gaps_between():
    images = torch.rand(8, 1, 8, 8)
    whole, apart = sheet(images, 4), sheet(images, 4, group=2)
    gap = apart.shape[1] - whole.shape[1]
    width = (apart.shape[1] - gap + 1) // 2
    white = apart == 255
    edges = [x for x in range(apart.shape[1]) if white[:, x].all()]
    assert len(edges) >= 12 and edges == list(range(edges[0], edges[0] + len(edges))), "one gap, in the middle"
    assert edges[0] + edges[-1] == apart.shape[1] - 1 and width > len(edges)
    assert (apart[:, : edges[0]] == whole[:, : edges[0]]).all()
    assert (apart[:, edges[-1] + 1 :] == whole[:, -edges[0] :]).all()
    page = sheet(images, 4, group=2, headings=("a", "b", "a", "b"))
    assert page.shape[1] - sheet(images, 4, headings=("a", "b", "a", "b")).shape[1] == gap
    for group in (0, 3):
        with pytest.raises(ValueError, match=f"sheet: group must divide the 4 columns, got {group}"):
            sheet(images, 4, group=group)


def test_classes_are_rows_and_real_pictures_stand_beside():
    rows = pictures.class_rows(10, 64)
    assert rows == [row for row in range(10) for _ in range(6)] and pictures.class_rows(None, 64) == []
    assert pictures.class_rows(1000, 64)[::4] == [row * 1000 // 16 for row in range(16)] and len(rows) == 60
    assert pictures.class_rows(7, 3) == [0, 2, 4]
    drawn = torch.tensor(rows).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 20
    y = torch.tensor([3, 3, 3, 3, 9])
    page = pictures.samples(drawn, (10 + y.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)) / 20, labels=rows, real_labels=y)
    lines = [line for line in page[..., 0] if (line == round(255 * 3 / 20)).sum() > 50]
    shown, factor = [round(255 * value / 20) for value in (3, 13)], 640 // (9 * 4)
    assert all(24 * factor <= (line == shown[0]).sum() < 25 * factor for line in lines), "and a letter's edge"
    assert all((line == shown[1]).sum() == 12 * factor for line in lines)
    assert len(lines) == 4 * factor, "a row of class 3, its four held-out pictures cut to three"
    assert (pictures.samples(drawn, labels=rows, classes=[f"class {i}" for i in range(10)]) != 255).any()


def test_points_of_unequal_scale_have_axes_of_their_own():
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    for scale, offset in ((1e4, 0.0), (1.0, 1e5)):
        page = scatter(z * torch.tensor([1.0, scale]) + torch.tensor([offset, 0.0]))
        blue = (page[..., 2].astype(int) - page[..., 0] > 60).nonzero()
        assert all(np.ptp(axis) > 150 for axis in blue), "a cloud, and not a line or nothing"
    assert len(scatter(torch.cat([z, z], 1))) == len(scatter(z)) + 25, "a line tells that there are more features"


def test_a_picture_tells_what_it_shows(tmp_path):
    save(tmp_path / "a.png", np.zeros((2, 2), np.uint8), {"model": "Glow", "data": "folder:Bücher", "step": 7})
    assert Image.open(tmp_path / "a.png").text == {"model": "Glow", "data": "folder:Bücher", "step": "7"}


def test_several_clouds_of_points_share_the_frame_of_the_data():
    cloud = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    picture = scatter({"T = 0": cloud * 0, "T = 1": cloud}, cloud, title="a model", note="what T does")
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 60).nonzero()
    width = picture.shape[1] / 3
    columns = [[x for x in blue[1].tolist() if i * width <= x < (i + 1) * width] for i in range(3)]
    assert max(columns[0]) - min(columns[0]) < 12, "all points at one place"
    assert min(max(c) - min(c) for c in columns[1:]) > width / 2


def test_curves_show_what_is_reached_and_what_was_asked_for():
    steps = np.arange(500)
    values = 2 + 100 * np.exp(-steps / 3) + 0.1 * np.random.default_rng(0).standard_normal(500)
    values[17] = np.nan
    held_out = ([100, 499], [2.5, 2.4])
    picture = curves({"a: training": values, "a: held out": held_out, "b": values + 1}, smooth=20, title="losses")
    assert picture.dtype == np.uint8 and picture.shape == (480, 800, 3)
    inside = picture[60:400, 90:780].astype(int)
    blue, orange = (inside[..., 2] - inside[..., 0] > 90), (inside[..., 0] - inside[..., 2] > 90)
    assert blue[200:].any() and orange[:200].any(), "the second curve lies a unit above the first"
    assert np.nonzero(blue)[0].max() - np.nonzero(blue)[0].min() > 100, "the first steps do not flatten the rest"
    assert (curves({"a": values}, log=True) != curves({"a": values})).any()
    for series, log, words in (
        ({}, False, "finite"),
        ({"a": [np.nan]}, False, "finite"),
        ({"a": [-1.0, -2.0]}, True, "positive"),
        ({"a": ([1, 2], [1.0])}, False, "a step for each value, got 2 for 1"),
    ):
        with pytest.raises(ValueError, match=words):
            curves(series, log=log)


def test_the_mean_of_a_curve_is_centred_and_skips_what_is_not_finite():
    from genkernels.pictures.plots import _running_mean

    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    assert _running_mean(values, 3).tolist() == [1.5, 1.5, 3.0, 4.5, 4.5]
    assert np.isnan(_running_mean(np.full(3, np.nan), 2)).all()


def test_what_is_missing_is_named_early(monkeypatch):
    import importlib.util

    assert pictures.why_not(points=True) is None
    absent = {"matplotlib"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    assert pictures.why_not(points=False) is None
    assert pictures.why_not(points=True) == "matplotlib is not installed: pip install 'genkernels[train]'"
    absent.add("PIL")
    assert pictures.why_not(points=False) == "Pillow is not installed: pip install 'genkernels[train]'"


def test_a_table_has_a_place_for_every_cell():
    pytest.importorskip("matplotlib")
    blocks = {"one": [["a", "1", "2"], ["b", "3", "4"]], "two": [["c", "5", "6"]]}
    plain = pictures.table(["", "x", "y"], blocks)
    spanned = pictures.table(["", "x", "y"], blocks, spans=[("", 1), ("a span that is wider than its columns", 2)])
    assert plain.ndim == 3 and spanned.shape[0] == plain.shape[0] + 50 and spanned.shape[1] > 2 * plain.shape[1]
    assert (pictures.table(["", "x", "y"], {**blocks, "two": [["c", "5", "7"]]}) != plain).any()
    with pytest.raises(ValueError, match="a row must be of 3 columns, as the header, got 2"):
        pictures.table(["", "x", "y"], {"one": [["a", "1", "2"], ["b", "3"]]})
    with pytest.raises(ValueError, match="spans must be of 3 columns, as the header, got 2"):
        pictures.table(["", "x", "y"], blocks, spans=[("", 2)])


def test_words_above_rows_are_not_cut_off_at_the_edge():
    pytest.importorskip("matplotlib")
    rows = [["a", "1,234.56 ± 0.78", "9,876.54 ± 0.32"]]
    short, long = (pictures.table(["", "x", "y"], {words: rows}) for words in ("here", "here and there " * 12))
    assert long.shape[1] == short.shape[1] and long.shape[0] >= short.shape[0] + 2 * 34
    assert (long[:, -20:] == 255).all()  # the margin


def test_heatmaps_leave_exact_zeros_white():
    pytest.importorskip("matplotlib")
    matrix = torch.tensor([[1.0, 0.0], [1e-12, -1.0]])
    page = pictures.heatmaps({"J": matrix})
    box = np.argwhere((page == (0x0B, 0x2F, 0x57)).all(2))  # where |J| is largest
    (top, left), (bottom, _) = box.min(0), box.max(0)
    at = lambda row, column: tuple(page[top + (bottom - top) * (1 + 2 * row) // 4, left + 40 + 140 * column])  # noqa: E731
    assert at(0, 0) == at(1, 1) == (0x0B, 0x2F, 0x57) and at(0, 1) == (255, 255, 255) != at(1, 0)
    for wrong in ({}, {"J": torch.ones(3)}):
        with pytest.raises(ValueError, match="heatmaps: matrices must be"):
            pictures.heatmaps(wrong)


def test_densities_have_one_scale_a_row_and_y_upwards():
    pytest.importorskip("matplotlib")
    high, low = torch.zeros(8, 8), torch.zeros(8, 8)
    high[6:, :2], low[6:, :2] = 2.0, 1.0
    page = pictures.densities({"U": {"true": high, "fit": high}}, captions={("U", "fit"): "KL 0"}, title="t", note="n")
    other = pictures.densities({"U": {"true": high, "fit": low}}, captions={("U", "fit"): "KL 0"}, title="t", note="n")
    largest, least = (np.argwhere((page == colour).all(2)) for colour in ((251, 252, 191), (0, 0, 3)))
    middle = page.shape[1] // 2
    assert page.shape == other.shape and (page[:, :middle] == other[:, :middle]).all() and (page != other).any()
    assert len(largest) and largest[:, 0].max() < least[:, 0].mean() < least[:, 0].max(), "the first rows lie below"
    for wrong, words in (
        ({}, "rows must have the same columns"),
        ({"a": {"x": high}, "b": {"y": high}}, "rows must have the same columns"),
        ({"a": {"x": torch.ones(3)}}, r"a panel must be \[height, width\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=f"densities: {words}"):
            pictures.densities(wrong)


def test_panels_share_colours_by_name_and_draw_what_is_exact_in_grey():
    pytest.importorskip("matplotlib")
    curve = ([0.0, 1.0, 2.0], [1.0, float("inf"), 3.0])
    one = pictures.panels({"a": {"exact": curve, "fit": curve}}, title="Title", note="note", captions={"a": "b\nc"})
    two = pictures.panels({"a": {"fit": curve}, "b": {"other": curve, "fit": curve}}, x_label="x", log="xy")
    colours = [{tuple(p) for p in page.reshape(-1, 3).tolist()} for page in (one, two)]
    blue, orange, grey = (0x16, 0x67, 0xB7), (0xD1, 0x60, 0x2C), (0x5B, 0x66, 0x70)
    assert [(blue in c, orange in c, grey in c) for c in colours] == [(True, False, True), (True, True, False)]
    assert two.shape[1] == 2 * one.shape[1]
    wide = {"a": {"fit": ([0.0, 1.0, 2.0], [-500.0, 0.0, 2.0])}}
    assert (pictures.panels(wide, symlog=["a"]) != pictures.panels(wide)).any()
    for wrong in ({}, {"a": {}}, {"a": {"fit": ([0.0], [float("nan")])}}):
        with pytest.raises(ValueError, match="panels: each panel must have a finite value, got"):
            pictures.panels(wrong)
