"""`cmtool edit` as it is typed, on pictures as people have them."""

import numpy as np
import pytest
from PIL import Image

from cmtool.data.images import read_png_text
from tests.cli.tiny import Shell, write_model


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save("img.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:7] = 255
    Image.fromarray(mask).save("m.png")
    return Shell(tmp_path, capfd)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def large(path, height=60, width=80, seed=1):
    """A smooth colored picture."""
    small = np.random.default_rng(seed).integers(40, 216, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return pixels(path)


def test_inpainting_keeps_every_other_byte(shell):
    assert shell.out("edit", "inpaint", "--mask", "m.png", "img.png", "--out", "out.png") == "out.png"
    before, after = pixels("img.png"), pixels("out.png")
    known = np.asarray(Image.open("m.png")) == 0
    assert np.array_equal(before[known], after[known])
    assert not np.array_equal(before[~known], after[~known])
    assert read_png_text("out.png")["task"] == "inpaint"


def test_inverting_the_mask_swaps_the_two_parts(shell):
    shell.out("edit", "inpaint", "--mask", "m.png", "--invert-mask", "img.png", "--out", "out.png")
    known = np.asarray(Image.open("m.png")) == 255
    assert np.array_equal(pixels("img.png")[known], pixels("out.png")[known])
    assert not np.array_equal(pixels("img.png")[~known], pixels("out.png")[~known])


def test_what_is_under_the_mask_cannot_be_seen(shell):
    other = pixels("img.png").copy()
    other[2:5, 3:7] = 7
    Image.fromarray(other).save("other.png")
    shell.out("edit", "inpaint", "--mask", "m.png", "img.png", "--out", "a.png")
    shell.out("edit", "inpaint", "--mask", "m.png", "other.png", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_several_variations_make_a_grid_and_a_folder_takes_them_apart(shell, tmp_path):
    shell.out("edit", "inpaint", "--mask", "m.png", "img.png", "--num", 3, "--out", "grid.png")
    # What was given and three variations, each of 8 pixels enlarged 8 times.
    assert Image.open("grid.png").size == (4 * 66 + 2, 66 + 2)
    document = shell.json("edit", "inpaint", "--mask", "m.png", "img.png", "--num", 3, "--out", "folder")
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [file.name for file in files] == [f"img-inpaint-{i}.png" for i in range(3)]
    assert document["edits"][0]["seeds"] == [0, 1, 2]
    assert len({file.read_bytes() for file in files}) == 3


def test_a_variation_is_what_its_seed_makes_alone_and_in_any_batch(shell):
    shell.out("edit", "superres", "s.png", "--num", 3, "--batch-size", 2, "--out", "f") if _small() else None
    shell.out("edit", "superres", "s.png", "--num", 3, "--batch-size", 3, "--out", "g")
    for index in range(3):
        a, b = pixels(f"f/s-superres-{index}.png"), pixels(f"g/s-superres-{index}.png")
        assert np.abs(a.astype(int) - b).max() <= 1


def _small(name="s.png", shape=(4, 4, 3)):
    Image.fromarray(np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)).save(name)
    return True


def test_several_pictures_at_once_are_the_pictures_one_by_one(shell):
    for index in range(3):
        large(f"p{index}.png", 8, 8, seed=index)
    shell.out("edit", "colorize", "p0.png", "p1.png", "p2.png", "--out", "all")
    for index in range(3):
        shell.out("edit", "colorize", f"p{index}.png", "--out", "one.png")
        assert np.array_equal(pixels("one.png"), pixels(f"all/p{index}-colorize.png"))


def luma(array):
    return array.astype(float) @ np.array([0.2989, 0.5870, 0.1140]) / 0.9999


def test_colorizing_keeps_the_luma_of_every_pixel(shell):
    shell.out("edit", "colorize", "img.png", "--out", "c.png")
    # Each channel is rounded to a byte, so its luma may move by half a level.
    assert np.abs(luma(pixels("c.png")) - luma(pixels("img.png"))).max() <= 0.51
    assert np.abs(np.diff(pixels("c.png").astype(int), axis=2)).max() > 3


def test_superresolution_keeps_the_mean_of_every_patch(shell):
    _small()
    shell.out("edit", "superres", "s.png", "--out", "big.png")
    means = pixels("big.png").astype(float).reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(means - pixels("s.png")).max() <= 0.51


def test_the_factor_may_be_given_and_then_the_picture_is_fitted(shell):
    large("photo.png")
    code, _, err = shell("edit", "superres", "photo.png", "--factor", 4, "--out", "big.png")
    assert code == 0
    assert "reduced to 2 x 2" in err
    assert pixels("big.png").shape == (8, 8, 3)


def test_stroke_takes_the_papers_two_levels_or_ones_own(shell):
    document = shell.json("edit", "stroke", "img.png")
    assert (document["nfe"], document["times"]) == (2, [5.38, 2.24])
    assert document["edits"][0]["out"] == ["edits/img-stroke.png"]
    assert shell.json("edit", "stroke", "img.png", "--t", "3,1,0.5")["times"] == [3.0, 1.0, 0.5]


def test_denoising_is_one_evaluation_at_the_noise_given(shell):
    document = shell.json("edit", "denoise", "img.png", "--sigma", 0.3)
    assert (document["nfe"], document["times"]) == (1, [0.3])


def test_paper_times_are_the_published_grid(shell):
    document = shell.json("edit", "inpaint", "--mask", "m.png", "img.png", "--times", "paper")
    assert (document["nfe"], document["guidance"]) == (39, 0.0)
    by_index = shell.json("edit", "inpaint", "--mask", "m.png", "img.png", "--indices", "0-39", "--of", 40)
    assert by_index["times"] == document["times"]


def test_paste_inpaints_a_photo_at_its_own_size(shell):
    photo = large("photo.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[10:22, 50:70] = 255
    Image.fromarray(mask).save("big.png")
    shell.out("edit", "inpaint", "--mask", "big.png", "photo.png", "--paste", "--out", "done.png")
    done = pixels("done.png")
    assert done.shape == photo.shape
    assert np.array_equal(done[mask == 0], photo[mask == 0])
    assert not np.array_equal(done[mask > 0], photo[mask > 0])


def test_paste_colorizes_at_full_size_with_the_luma_kept(shell):
    photo = large("photo.png")
    shell.out("edit", "colorize", "photo.png", "--paste", "--out", "c.png")
    done = pixels("c.png")
    assert done.shape == photo.shape
    assert np.abs(luma(done) - luma(photo)).max() <= 0.51


def test_deblurring_keeps_what_the_blur_left(shell):
    """The edit, blurred again, is the picture within its bytes; a resized picture's blur is resized with it."""
    from PIL import ImageFilter

    large("photo.png", 8, 8)
    soft = Image.open("photo.png").filter(ImageFilter.GaussianBlur(1.0))
    soft.save("soft.png")
    document = shell.json("edit", "deblur", "soft.png", "--sigma", 1.0, "--out", "sharp.png")
    assert (document["task"], document["nfe"]) == ("deblur", 4)
    again = Image.open("sharp.png").filter(ImageFilter.GaussianBlur(1.0))
    off = np.abs(np.asarray(again, dtype=float) - np.asarray(soft, dtype=float)).mean()
    assert off < 12
    Image.open("soft.png").resize((16, 16)).save("twice.png")
    _, _, err = shell("edit", "deblur", "twice.png", "--sigma", 2.0, "--out", "small.png")
    assert "the blur is 1 pixels" in err
    large("photo.png", 20, 30)
    shell.out("edit", "deblur", "photo.png", "--sigma", 1.0, "--paste", "--out", "whole.png")
    assert Image.open("whole.png").size == (30, 20)


def test_a_bicubic_reduction_is_kept(shell):
    large("photo.png", 8, 8)
    Image.open("photo.png").resize((4, 4), Image.Resampling.BICUBIC).save("s.png")
    shell.out("edit", "superres", "s.png", "--kernel", "bicubic", "--out", "big.png")
    back = Image.open("big.png").resize((4, 4), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(back, dtype=float) - np.asarray(Image.open("s.png"), dtype=float)).mean() < 12


def test_paste_enlarges_and_denoises_whole_pictures_in_windows(shell):
    photo = large("photo.png", 14, 22)
    shell.out("edit", "superres", "photo.png", "--factor", 2, "--paste", "--out", "s.png")
    big = pixels("s.png")
    assert big.shape == (28, 44, 3)
    assert np.abs(big.astype(float).reshape(14, 2, 22, 2, 3).mean((1, 3)) - photo).max() <= 0.51
    shell.out("edit", "denoise", "photo.png", "--sigma", 0.2, "--paste", "--out", "d.png")
    assert pixels("d.png").shape == photo.shape


def test_windows_take_the_null_class_where_the_model_knows_it(shell, tmp_path):
    write_model(tmp_path, "classes", num_classes=3, label_dropout=0.1)
    large("photo.png", 14, 22)
    for size, said in ((("photo.png", "--paste"), "overlapping windows of 8"), (("img.png",), "fits it best")):
        code, _, err = shell("edit", "denoise", *size, "--sigma", 0.2, "--model", "runs/classes", "--out", "d.png")
        assert code == 0
        assert said in err
        assert ("fits" in err) == (size == ("img.png",))


def test_paste_stroke_keeps_the_size(shell):
    large("photo.png")
    shell.out("edit", "stroke", "photo.png", "--paste", "--out", "s.png")
    assert pixels("s.png").shape == (60, 80, 3)


def test_fits_are_said_and_differ(shell):
    large("photo.png")
    made = []
    for fit in ("crop", "pad", "stretch"):
        code, _, err = shell("edit", "colorize", "photo.png", "--fit", fit, "--out", f"{fit}.png")
        assert code == 0
        assert "80 x 60" in err
        made.append(pixels(f"{fit}.png").tobytes())
    assert len(set(made)) == 3


def test_best_of_keeps_the_most_consistent(shell):
    every = shell.json("edit", "inpaint", "--mask", "m.png", "img.png", "--num", 6, "--out", "all")["edits"][0]
    best = shell.json("edit", "inpaint", "--mask", "m.png", "img.png", "--best-of", 6, "--out", "best.png")["edits"][0]
    assert best["residuals"] == [min(every["residuals"])]
    assert best["seeds"] == [every["seeds"][every["residuals"].index(min(every["residuals"]))]]


def test_best_of_by_lpips_says_what_it_needs_before_any_work(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    before = sorted(tmp_path.rglob("*"))
    said = shell.fails("edit", "colorize", "img.png", "--best-of", 2, "--metric", "lpips", "--out", "best.png")
    assert "vgg16" in said
    assert "--metric l2" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_candidates_of_the_header_are_made_and_told(shell, tmp_path):
    levels = {"colorize": {"steps": 3, "first": 9.0, "last": 0.5, "candidates": 3}}
    write_model(tmp_path, "choosy", edit=levels)
    made = shell.json("edit", "colorize", "img.png", "--model", "runs/choosy", "--out", "c.png")
    assert (made["nfe"], made["candidates"]) == (9, 3)
    plain = shell.json("edit", "colorize", "img.png", "--model", "runs/choosy", "--best-of", 2, "--out", "d.png")
    assert plain["candidates"] == 1
    first = shell.json(
        "edit", "colorize", "img.png", "--model", "runs/choosy", "--times", "9,2.1,0.5", "--out", "e.png"
    )
    assert (first["nfe"], first["candidates"]) == (3, 1)
    assert made["edits"][0]["residuals"][0] <= first["edits"][0]["residuals"][0]


def test_uncertainty_is_zero_where_pixels_are_known(shell):
    document = shell.json(
        "edit", "inpaint", "--mask", "m.png", "img.png", "--uncertainty", "--num", 4, "--out", "u.png"
    )
    spread = np.asarray(Image.open(document["edits"][0]["uncertainty"]))
    known = np.asarray(Image.open("m.png")) == 0
    assert spread[known].max() == 0
    assert spread[~known].max() > 0


def test_a_class_is_found_for_a_conditional_model_or_taken_as_named(shell, tmp_path):
    write_model(tmp_path, "classes", num_classes=3, names=["ant", "bee", "cat"])
    code, _, err = shell("edit", "inpaint", "--mask", "m.png", "img.png", "--model", "runs/classes", "--out", "a.png")
    assert code == 0
    assert "fits it best" in err
    code, _, err = shell(
        "edit", "inpaint", "--mask", "m.png", "img.png", "--model", "runs/classes", "--label", "bee", "--out", "a.png"
    )
    assert code == 0
    assert "fits" not in err


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK", "1"])
def test_any_picture_a_person_has(shell, mode):
    if mode == "I;16":
        Image.fromarray((np.arange(480, dtype=np.uint16) * 130).reshape(20, 24)).save("x.tif")
    else:
        Image.fromarray(large("photo.png")).convert(mode).save("x.tif" if mode == "CMYK" else "x.png")
    path = "x.tif" if mode in ("I;16", "CMYK") else "x.png"
    shell.out("edit", "colorize", path, "--out", "y.png")
    assert pixels("y.png").shape == (8, 8, 3)


def test_a_mask_of_another_size_is_resized_with_a_notice(shell):
    Image.open("m.png").resize((32, 32), Image.Resampling.NEAREST).save("m32.png")
    code, _, err = shell("edit", "inpaint", "--mask", "m32.png", "img.png", "--out", "a.png")
    assert code == 0
    assert "resized from 32 x 32 to 8 x 8" in err
    shell.out("edit", "inpaint", "--mask", "m.png", "img.png", "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_a_mask_painted_on_a_transparent_layer_is_the_mask(shell):
    # What a paint program saves of a layer of white strokes: white everywhere, opaque where it was painted.
    alpha = Image.open("m.png").convert("L")
    layer = Image.new("RGBA", alpha.size, (255, 255, 255, 0))
    layer.putalpha(alpha)
    layer.save("layer.png")
    for name in ("m", "layer"):
        shell.out("edit", "inpaint", "--mask", f"{name}.png", "img.png", "--out", f"by-{name}.png")
    assert np.array_equal(pixels("by-m.png"), pixels("by-layer.png"))


def test_a_long_strip_is_padded_without_its_square_being_held(shell):
    # 60,000 x 60,000 pixels would be 10 GiB.
    Image.new("RGB", (60_000, 4), (90, 80, 70)).save("strip.png")
    shell.out("edit", "stroke", "strip.png", "--paste", "--out", "y.png")
    assert pixels("y.png").shape == (4, 60_000, 3)


def test_a_gray_model_says_that_colors_are_dropped(shell, tmp_path):
    write_model(tmp_path, "gray", channels=1)
    code, _, err = shell("edit", "inpaint", "--mask", "m.png", "img.png", "--model", "runs/gray", "--out", "a.png")
    assert code == 0
    assert "colors are dropped" in err


def test_without_a_model_in_color_the_way_to_one_is_shown(shell, tmp_path):
    (tmp_path / "runs" / "tiny" / "model.safetensors").unlink()
    assert "train-ct --preset shapes" in shell.fails("edit", "colorize", "img.png")
    assert "train-ct --preset digits" in shell.fails("edit", "stroke", "img.png")


def test_a_missing_picture_names_the_one_that_may_be_meant(shell):
    assert "did you mean img.png?" in shell.fails("edit", "colorize", "imgs.png")


BAD = [
    (["inpaint", "img.png"], "--mask"),
    (["inpaint", "--mask", "wide.png", "img.png"], "another shape"),
    (["inpaint", "--mask", "black.png", "img.png"], "empty"),
    (["inpaint", "--mask", "white.png", "img.png"], "full"),
    (["inpaint", "--mask", "img.png", "img.png"], "as its mask"),
    (["inpaint", "--mask", "img.png", "other.png"], "not like a mask"),
    (["inpaint", "--mask", "m.png", "gone.png"], "no such file"),
    (["inpaint", "--mask", "gone.png", "img.png"], "no such file"),
    (["inpaint", "--mask", "m.png", "text.png"], "not an image"),
    (["inpaint", "--mask", "m.png", "moving.gif"], "animation"),
    (["inpaint", "--mask", "m.png", "cut.png"], "damaged"),
    (["colorize", "bomb.png"], "megapixels"),
    (["colorize", "img.png", "--model", "runs/gray"], "colors need three"),
    (["colorize", "img.png", "--model", "runs/points"], "points"),
    (["colorize", "img.png", "--model", "runs/teacher"], "consistency model is needed"),
    (["colorize", "folder"], "is a folder"),
    (["superres", "img.png", "--factor", "3"], "choose from 2, 4, 8"),
    (["superres", "img.png"], "--factor"),
    (["superres", "wide-strip.png", "--factor", "8", "--paste"], "100 megapixels"),
    (["denoise", "img.png", "--sigma", "99"], "outside the model's range"),
    (["denoise", "img.png", "--sigma", "0.001"], "outside the model's range"),
    (["denoise", "img.png"], "--sigma"),
    (["deblur", "img.png", "--sigma", "0"], "is no blur"),
    (["deblur", "img.png", "--sigma", "nan"], "is no blur"),
    (["deblur", "img.png", "--sigma", "1", "--noise", "nan"], "must be at least 0"),
    (["deblur", "img.png"], "--sigma"),
    (["stroke", "img.png", "--t", "2.24,5.38"], "strictly decrease"),
    (["stroke", "img.png", "--times", "papers"], "no number"),
    (["stroke", "img.png", "--steps", "2", "--t", "5,2"], "give one of them"),
    (["colorize", "img.png", "--out", "text.png/x"], "text.png"),
    (["colorize", "img.png", "--out", "file"], "not a folder"),
    (["colorize", "img.png", "--out", "a.jpg"], "written as .png"),
    (["colorize", "img.png", "--uncertainty", "--num", "1"], "at least two"),
    (["colorize", "img.png", "--best-of", "2", "--num", "3"], "cannot be kept"),
    (["colorize", "img.png", "--fit", "squash"], "squash"),
    (["colorize", "img.png", "--label", "1"], "not conditioned"),
    (["colourize", "img.png"], "colourize"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(shell, tmp_path, arguments, says):
    _odd_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = shell.fails("edit", *arguments)
    assert says in said
    assert "Hint:" in said or "choose from" in said
    assert sorted(tmp_path.rglob("*")) == before


def _odd_files(folder):
    write_model(folder, "gray", channels=1)
    write_model(folder, "points", source="toy2d")
    write_model(folder, "teacher", kind="diffusion")
    (folder / "folder").mkdir()
    (folder / "other.png").write_bytes((folder / "m.png").read_bytes())
    (folder / "file").write_text("x")
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "img.png").read_bytes()[:100])
    Image.new("L", (16, 8), 255).save(folder / "wide.png")
    Image.new("L", (2000, 1000), 255).save(folder / "wide-strip.png")
    Image.new("L", (8, 8), 0).save(folder / "black.png")
    Image.new("L", (8, 8), 255).save(folder / "white.png")
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    _bomb(folder / "bomb.png")


def _bomb(path):
    """A PNG whose header says 20,000 x 20,000 pixels; nothing of that size is ever allocated."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )
