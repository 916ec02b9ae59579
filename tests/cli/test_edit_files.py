"""Edits that go through files: known bytes are kept, masks of every kind, erased pictures, color profiles."""

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from cmtool.editing.photos import photo_of
from tests.cli.tiny import Shell, write_model
from tests.data.wide import LINEAR_GRAY, WIDE


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    return Shell(tmp_path, capfd)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def smooth(side=8, width=None, seed=1):
    small = np.random.default_rng(seed).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width or side, side), Image.Resampling.BICUBIC)


def box(side=8, width=None):
    mask = np.zeros((side, width or side), np.uint8)
    mask[side // 4 : side // 2, side // 3 : side - 1] = 255
    return mask


# --- one picture is that picture ---


def test_one_sample_as_a_file_is_the_one_in_a_folder(shell):
    shell.out("sample", "--num", 1, "--out", "one.png")
    shell.out("sample", "--num", 1, "--out", "folder")
    assert Image.open("one.png").size == (8, 8)
    one, same = (Image.open(name) for name in ("one.png", "folder/000000.png"))
    assert one.tobytes() == same.tobytes() and one.mode == same.mode
    one.load(), same.load()
    assert one.text == same.text


def test_the_default_name_and_a_label_hold_one_sample_too(shell, tmp_path):
    write_model(tmp_path, "classes", num_classes=3)
    path = shell.out("sample", "--seeds", 5, "--label", 2, "--model", "runs/classes")
    image = Image.open(path)
    image.load()
    assert image.size == (8, 8)
    assert (image.text["seed"], image.text["label"]) == ("5", "2")


def test_a_grid_of_one_is_asked_for(shell):
    shell.out("sample", "--num", 1, "--grid", "--out", "grid.png")
    assert Image.open("grid.png").size == (68, 68)
    shell.out("sample", "--num", 2, "--out", "two.png")
    assert Image.open("two.png").size == (2 * 66 + 2, 68)
    for out in ("folder", "a.npz"):
        assert "--grid is for pictures" in shell.fails("sample", "--num", 1, "--grid", "--out", out)


@pytest.mark.parametrize("seed", range(5))
def test_sample_then_inpaint_keeps_every_known_byte(shell, seed):
    shell.out("sample", "--num", 1, "--seed", seed, "--out", "photo.png")
    mask = np.random.default_rng(seed).random((8, 8)) < 0.4
    Image.fromarray(mask).save("mask.png")
    shell.out("edit", "inpaint", "--mask", "mask.png", "photo.png", "--out", "two.png")
    assert np.array_equal(pixels("two.png")[~mask], pixels("photo.png")[~mask])
    assert (pixels("two.png")[mask] != pixels("photo.png")[mask]).any()


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_known_bytes_are_kept_in_every_precision(shell, precision):
    smooth().save("p.png")
    Image.fromarray(box()).save("m.png")
    shell.out("edit", "inpaint", "--mask", "m.png", "p.png", "--precision", precision, "--out", "o.png")
    assert np.array_equal(pixels("o.png")[box() == 0], pixels("p.png")[box() == 0])


# --- masks of every kind ---


def forms(levels):
    """A mask as people have it: (name, image, options of the writer)."""
    noise = np.random.default_rng(0).integers(-3, 4, levels.shape)
    gray = Image.fromarray(levels)
    layer = Image.new("RGBA", gray.size, (255, 255, 255, 0))
    layer.putalpha(gray)
    yield "m.png", gray, {}
    for quality in (50, 75, 95):
        yield f"m{quality}.jpg", gray.convert("RGB"), {"quality": quality}
    yield "m.webp", gray.convert("RGB"), {"quality": 60}
    yield "noisy.png", Image.fromarray((levels + noise).clip(0, 255).astype(np.uint8)), {}
    yield "layer.png", layer, {}
    yield "rgba.png", gray.convert("RGBA"), {}
    yield "palette.png", gray.convert("P"), {}
    yield "bits.png", gray.convert("1"), {}
    yield "deep.png", Image.fromarray(levels.astype(np.uint16) * 257), {}
    yield "float.tif", Image.fromarray((levels / 255).astype(np.float32)), {}
    yield "ones.png", Image.fromarray(levels // 255), {}
    yield "pair.tif", Image.fromarray((levels // 255 + 7).astype(np.float32)), {}
    yield "turned.jpg", gray.transpose(Image.Transpose.ROTATE_90), {"exif": orientation(6), "quality": 95}


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("options", [(), ("--paste",)])
def test_every_form_of_a_mask_is_the_mask(shell, options):
    smooth(48, 64).save("p.png")
    levels = box(48, 64)
    wanted = None
    for name, image, how in forms(levels):
        image.save(name, **how)
        shell.out("edit", "inpaint", "--mask", name, "p.png", *options, "--out", "o.png")
        wanted = pixels("o.png") if wanted is None else wanted
        if options:
            assert np.array_equal(pixels("o.png")[levels == 0], pixels("p.png")[levels == 0]), name
        assert np.array_equal(pixels("o.png"), wanted), name


def test_the_other_way_round_a_mask_of_ones_keeps_the_ones(shell):
    smooth().save("p.png")
    Image.fromarray(1 - box() // 255).save("keep.png")
    code, _, err = shell("edit", "inpaint", "--mask", "keep.png", "--invert-mask", "p.png", "--out", "o.png")
    assert code == 0 and "two levels: 1 is kept, 0 is generated" in err
    assert np.array_equal(pixels("o.png")[box() == 0], pixels("p.png")[box() == 0])
    assert (pixels("o.png")[box() > 0] != pixels("p.png")[box() > 0]).any()


def test_nothing_under_a_mask_reaches_the_result_however_it_is_resized(shell):
    """One gray pixel, or a soft seam, must not let a rim of what is to vanish into what the model sees."""
    mask = np.asarray(Image.fromarray(box(51, 77)).resize((77, 51), Image.Resampling.BILINEAR)).copy()
    soft = np.asarray(Image.fromarray(box(102, 154)).resize((77, 51), Image.Resampling.BOX)).copy()
    mask[0, 0] = 60
    for levels in (mask, soft):
        Image.fromarray(levels).save("m.png")
        made = []
        for seed in (1, 2):
            Image.fromarray(
                np.where(levels[..., None] > 24, np.asarray(smooth(51, 77, seed)), 90).astype(np.uint8)
            ).save("p.png")
            shell.out("edit", "inpaint", "--mask", "m.png", "p.png", "--fit", "stretch", "--out", "o.png")
            made.append(pixels("o.png"))
        assert np.array_equal(*made)


def test_colors_in_a_mask_are_refused(shell):
    smooth().save("p.png")
    colored = np.dstack([box()] * 3)
    colored[0, 0] = (255, 0, 0)
    Image.fromarray(colored).save("m.png")
    assert "1 colored pixel, e.g. (255, 0, 0)" in shell.fails("edit", "inpaint", "--mask", "m.png", "p.png")


def test_an_edit_without_effect_says_so(shell, monkeypatch):
    from cmtool.editing.editor import Editor

    smooth().save("p.png")
    Image.fromarray(box()).save("m.png")
    code, _, err = shell("edit", "inpaint", "--mask", "m.png", "p.png", "--out", "o.png")
    assert code == 0 and "changes nothing" not in err
    monkeypatch.setattr(
        Editor, "run", lambda self, seeds, label: (self._y.repeat(len(seeds), 1, 1, 1), self._y[:, 0, 0, 0])
    )
    for task, said in (("inpaint", "changes nothing in the hole (seed 0)"), ("stroke", "changes nothing (seed 0)")):
        mask = ("--mask", "m.png") if task == "inpaint" else ()
        for paste in ((), ("--paste",)):
            code, _, err = shell("edit", task, *mask, "p.png", *paste, "--out", "o.png")
            assert code == 0 and said in err
    assert "p.png: the edit changes nothing" in shell("edit", "stroke", "p.png", "--out", "o.png", "--quiet")[2]


# --- what is transparent is the mask ---


def erased(hidden, alpha, side=8):
    rgb = np.where(alpha[..., None] == 0, hidden, np.asarray(smooth(*alpha.shape)))
    return Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8))


@pytest.mark.parametrize("options", [(), ("--paste",), ("--fit", "stretch")])
@pytest.mark.parametrize("shape", [(8, 8), (48, 60)])
def test_what_is_transparent_is_generated_and_never_seen(shell, options, shape):
    alpha = 255 - box(*shape)
    rim = np.asarray(Image.fromarray(alpha).resize(shape[::-1], Image.Resampling.BOX)).copy()
    rim[shape[0] // 4, :] = np.minimum(rim[shape[0] // 4, :], 128)  # an edge of an eraser
    made = []
    for hidden in (0, 255, np.random.default_rng(1).integers(0, 256, (*shape, 3))):
        erased(hidden, rim).save("p.png")
        shell.out("edit", "inpaint", "p.png", *options, "--seed", 3, "--out", "o.png")
        made.append(pixels("o.png"))
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])
    if options == ("--paste",) or shape == (8, 8):
        shown = np.asarray(Image.open("p.png"))
        assert np.array_equal(made[0][rim == 255], shown[rim == 255][:, :3])
        seam = (rim > 24) & (rim < 231)
        assert seam.any() and (made[0][seam] != shown[seam][:, :3]).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_every_form_of_transparency_is_a_mask(shell, mode):
    alpha = np.where(box() > 0, 0, 255).astype(np.uint8)
    picture = np.asarray(smooth())
    if mode == "RGBA":
        Image.fromarray(np.dstack([picture, alpha])).save("p.png")
    elif mode == "LA":
        Image.fromarray(np.dstack([picture[..., 0], alpha])).save("p.png")
    else:
        gray = (picture[..., 0] // 2 * 2).astype(np.uint8)
        gray[alpha == 0] = 1
        image = Image.fromarray(gray)
        image = image if mode == "L" else image.convert("P")
        image.save("p.png", transparency=1)
    shell.out("edit", "inpaint", "p.png", "--out", "o.png")
    before = np.asarray(Image.open("p.png").convert("RGBA"))
    assert np.array_equal(pixels("o.png")[alpha == 255], before[alpha == 255][:, :3])
    assert (pixels("o.png")[alpha == 0] != before[alpha == 0][:, :3]).any()


def test_a_mask_wins_over_transparency(shell):
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[6:] = 0
    made = []
    for hidden in (0, 200):
        erased(hidden, alpha).save("p.png")
        Image.fromarray(box()).save("m.png")
        shell.out("edit", "inpaint", "--mask", "m.png", "p.png", "--out", "o.png")
        made.append(pixels("o.png"))
    assert np.array_equal(*made)
    assert (made[0][6:] == 255).all()  # shown on white, as viewers show it
    assert np.array_equal(made[0][(box() == 0) & (alpha == 255)], pixels("p.png")[(box() == 0) & (alpha == 255)])


def test_without_mask_and_without_a_hole_the_way_is_shown(shell):
    smooth().save("p.png")
    smooth().convert("RGBA").save("opaque.png")
    erased(0, np.zeros((8, 8), np.uint8)).save("all.png")
    for name in ("p.png", "opaque.png"):
        assert f"{name} has nothing transparent, and there is no --mask" in shell.fails("edit", "inpaint", name)
    assert "full" in shell.fails("edit", "inpaint", "all.png")
    assert "--invert-mask" in shell.fails("edit", "inpaint", "all.png", "--invert-mask")


def test_python_reads_masks_and_transparency_as_the_command_does(shell, tmp_path):
    import cmtool

    model = cmtool.load(tmp_path / "runs/tiny/model.safetensors", "cpu")
    picture = smooth(24)
    picture.save("p.png")
    for name, image, how in forms(box(24)):
        image.save(name, **how)
        shell.out("edit", "inpaint", "--mask", name, "p.png", "--out", "o.png")
        with pytest.warns(UserWarning) if name in ("ones.png", "pair.tif") else _nothing():
            made = [
                cmtool.edit.inpaint(model, "p.png", name)[0],
                cmtool.edit.inpaint(model, picture, Image.open(name))[0],
            ]
        assert all(np.array_equal(one, pixels("o.png")) for one in made), name
    arrays = [box(24) > 0, box(24), (box(24) / 255.0)]
    made = [cmtool.edit.inpaint(model, picture, array)[0] for array in arrays]
    with pytest.warns(UserWarning, match="0 is kept, 1 is generated"):
        made.append(cmtool.edit.inpaint(model, picture, (box(24) > 0).astype(np.int64))[0])
    assert all(np.array_equal(one, pixels("o.png")) for one in made)
    erased(77, 255 - box(24)).save("hole.png")
    shell.out("edit", "inpaint", "hole.png", "--out", "o.png")
    for given in ("hole.png", Image.open("hole.png"), np.asarray(Image.open("hole.png"))):
        assert np.array_equal(cmtool.edit.inpaint(model, given)[0], pixels("o.png"))


class _nothing:
    def __enter__(self):
        import warnings

        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("error", UserWarning)

    def __exit__(self, *what):
        self._caught.__exit__(*what)


# --- color profiles, orientation, resolution ---


def shown(path):
    """What a viewer that knows profiles shows, in sRGB."""
    image = ImageOps.exif_transpose(Image.open(path))
    profile = image.info.get("icc_profile")
    if profile is None:
        return np.asarray(image.convert("RGB")).astype(int)
    import io

    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image.convert("RGB"), own, srgb, ImageCms.Intent.RELATIVE_COLORIMETRIC)
    return np.asarray(converted).astype(int)


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "tif"])
def test_a_pasted_edit_keeps_bytes_profile_and_resolution(shell, form):
    smooth(48, 64).save(f"p.{form}", icc_profile=WIDE, **({} if form == "webp" else {"dpi": (300, 300)}))
    Image.fromarray(box(48, 64)).save("m.png")
    known = box(48, 64) == 0
    code, _, err = shell("edit", "inpaint", "--mask", "m.png", f"p.{form}", "--paste", "--out", "o.png")
    assert code == 0 and "(wide test) are converted to sRGB for the model, and back" in err
    done = Image.open("o.png")
    assert done.info["icc_profile"] == WIDE
    assert np.array_equal(pixels("o.png")[known], pixels(f"p.{form}")[known])
    assert np.array_equal(shown("o.png")[known], shown(f"p.{form}")[known])
    if form != "webp":
        assert done.info["dpi"] == pytest.approx((300, 300), abs=0.01)


@pytest.mark.parametrize("task", ["inpaint", "stroke", "colorize", "denoise"])
def test_edits_of_the_models_size_keep_them_too(shell, task):
    smooth().save("p.png", icc_profile=WIDE, dpi=(72, 72))
    Image.fromarray(box()).save("m.png")
    options = {"inpaint": ("--mask", "m.png"), "denoise": ("--sigma", 0.05)}.get(task, ())
    shell.out("edit", task, *options, "p.png", "--out", "o.png")
    done = Image.open("o.png")
    assert done.info["icc_profile"] == WIDE and done.info["dpi"] == pytest.approx((72, 72), abs=0.01)
    if task == "inpaint":
        assert np.array_equal(pixels("o.png")[box() == 0], pixels("p.png")[box() == 0])


def test_a_picture_of_another_profile_is_edited_as_its_colors_in_srgb(shell):
    """Same colors, stored in two ways: the model sees the same, and what it makes looks the same."""
    smooth().save("wide.png", icc_profile=WIDE)
    plain = shown("wide.png").astype(np.uint8)
    Image.fromarray(plain).save("plain.png")
    for name in ("wide", "plain"):
        shell.out("edit", "stroke", f"{name}.png", "--times", "0.5", "--out", f"{name}-o.png")
    # Bytes of wide colors are coarser where colors are strong.
    away = np.abs(shown("wide-o.png") - shown("plain-o.png"))
    assert away.mean() < 1 and away.max() <= 8
    import cmtool

    made = cmtool.edit.stroke("runs/tiny/model.safetensors", "wide.png", times=[0.5])[0]
    assert np.abs(made.astype(int) - shown("wide-o.png")).max() <= 1


def test_grids_are_in_srgb(shell):
    smooth().save("p.png", icc_profile=WIDE)
    shell.out("edit", "stroke", "p.png", "--grid", "--out", "g.png")
    grid = Image.open("g.png")
    assert "icc_profile" not in grid.info
    first = np.asarray(grid)[2:66:8, 2:66:8].astype(int)
    assert np.abs(first - shown("p.png")).max() <= 1


def test_a_turned_photo_is_pasted_as_it_is_shown(shell):
    photo = smooth(48, 64)
    photo.transpose(Image.Transpose.ROTATE_90).save("p.png", exif=orientation(6), dpi=(200, 100))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open("p.png"))), np.asarray(photo))
    Image.fromarray(box(48, 64)).save("m.png")
    shell.out("edit", "inpaint", "--mask", "m.png", "p.png", "--paste", "--out", "o.png")
    done = Image.open("o.png")
    assert np.array_equal(
        np.asarray(ImageOps.exif_transpose(done))[box(48, 64) == 0], np.asarray(photo)[box(48, 64) == 0]
    )
    # Turned by a quarter, what was across is now down.
    assert done.info["dpi"] == pytest.approx((100, 200), abs=0.01)


def test_transparency_that_a_result_loses_is_said():
    alpha = np.full((8, 8), 255, np.uint8)
    whole, holed = (
        Image.fromarray(np.dstack([np.asarray(smooth(8, 8)), layer]))
        for layer in (alpha, 255 - np.eye(8, dtype=np.uint8) * 255)
    )
    lost = "what is transparent is laid on white and written so: results have no transparency"
    assert photo_of(holed, 3).notes == (lost,) and photo_of(holed, 1).notes[0] == lost
    assert photo_of(whole, 3).notes == photo_of(holed, 4).notes == ()
    assert photo_of(holed, 3, see_through=True).notes == ()


def test_sixteen_bit_gray_with_a_profile_is_read_as_everywhere(shell):
    """Pixels that cannot carry their profile are converted for good, as training and judging read them."""
    from cmtool.data.decode import read_image

    levels = (np.asarray(smooth().convert("L")).astype(np.uint16) + 1) * 257 - 257
    for name, image in (("deep.png", Image.fromarray(levels)), ("gray.png", smooth().convert("L"))):
        image.save(name, icc_profile=LINEAR_GRAY)
        Image.fromarray(box()).save("m.png")
        shell.out("edit", "inpaint", "--mask", "m.png", name, "--out", "o.png")
        assert "icc_profile" not in Image.open("o.png").info
        assert np.array_equal(pixels("o.png")[box() == 0], read_image(name)[box() == 0])
        assert (
            np.abs(read_image(name).astype(int) - np.asarray(smooth().convert("RGB").convert("L"))[..., None]).max()
            > 20
        )
