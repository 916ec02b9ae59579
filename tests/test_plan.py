"""Plans as functions of pictures, wishes and speeds; the file that they become; what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cmtool.api.plan import (
    Speeds,
    Wishes,
    candidate,
    check_wishes,
    choose,
    resolutions_for,
    sizes_for,
    stages_of,
    with_named,
)
from cmtool.api.plan_preset import preset_of
from cmtool.api.plan_run import Plan, check_early, read_plan
from cmtool.api.plan_stages import shared_settings, stage_runs
from cmtool.api.plan_text import lines_of, warnings_of
from cmtool.config import laws
from cmtool.config.load import resolve
from cmtool.data.look import Look
from cmtool.errors import ConfigError, UsageError, UserError


def pictures(count=5000, size=(640, 480), **more):
    return Look("photos", count, count, Counter({size: count}), color=count, **more)


SLOW = Speeds({("small", 16): 400.0}, threads=2)
FAST = Speeds({("small", 16): 40_000.0}, device="cuda (H200)")


@pytest.mark.parametrize(
    ("size", "largest"), [((8, 8), 8), ((28, 28), 32), ((26, 90), 32), ((25, 90), 16), ((64, 64), 64), ((4000, 3000), 256), ((3, 3), 8)]
)  # fmt: skip
def test_resolutions_that_pictures_are_large_enough_for(size, largest):
    assert max(resolutions_for(pictures(size=size))) == largest


def test_more_time_and_a_faster_machine_never_choose_less():
    rank = [size.name for size in laws.SIZES]
    for speeds in (SLOW, FAST):
        chosen = [choose(pictures(), Wishes(time=60.0 * 2**n), speeds) for n in range(12)]
        good = [(c.resolution, rank.index(c.size.name)) for c in chosen if c.ratio >= 1]
        assert good == sorted(good) and len(set(good)) > 2
    for minutes in (5, 30, 120):
        slow, fast = (choose(pictures(), Wishes(time=60.0 * minutes), s) for s in (SLOW, FAST))
        assert fast.resolution > slow.resolution


def test_a_short_time_takes_the_smallest_size_and_a_shorter_one_is_refused():
    short = choose(pictures(), Wishes(time=60.0), SLOW)
    assert short.resolution == 16 and short.ratio < 1
    with pytest.raises(UserError, match=r"6 s are too short .* the least is about") as refused:
        choose(pictures(), Wishes(time=6.0), SLOW)
    assert "--anyway" in refused.value.hint
    assert choose(pictures(), Wishes(time=6.0, anyway=True), SLOW).resolution == 8


def test_speeds_follow_the_work_of_the_nearest_network():
    small, medium = laws.size_named("small"), laws.size_named("medium")
    assert SLOW.at(small, 16) == 400
    assert SLOW.at(medium, 16) == pytest.approx(100)  # twice the width, four times the work
    assert SLOW.at(small, 32) < 110


def test_each_resolution_has_its_networks_and_what_is_named_has_a_say():
    def names(side, *settings):
        return [size.name for size in sizes_for(Wishes(settings=settings), side)]

    assert names(16) == ["dit-small", "dit"] and names(64) == ["tiny", "small", "medium", "large"]
    assert names(32) == [*names(16), "dit-large"]
    assert names(16, "network.dropout=0.1") == names(16) and names(16, "network.kind=dit") == names(16)
    assert names(16, "network.channels=24") == names(16, "network.kind=adm") == names(64)
    assert names(64, "network.depth=3") == names(64, "network.kind=dit") == names(32)
    made = plan(settings=("network.kind=dit", "network.depth=3"), resolution=32, time=600.0)
    network = resolve(made, recipe="icd").config.network
    assert (network.kind, network.depth, network.width % 32) == ("dit", 3, 0)
    assert resolve(plan(settings=("network.channels=24",), time=600.0), recipe="icd").config.network.kind == "adm"


def test_the_tables_agree_with_the_networks():
    from cmtool.networks import parameter_count
    from cmtool.training.bench import stand_in_data
    from cmtool.training.setup import fresh_student

    for name, side in (("small", 16), ("medium", 32), ("large", 64), ("dit", 16)):
        size = laws.size_named(name)
        preset = preset_of(replace(choose(pictures(), Wishes(resolution=side), SLOW), size=size), pictures(), Wishes())
        config = resolve(preset, recipe="edm").config
        count = parameter_count(fresh_student(config, stand_in_data(config, 1)).network)
        assert size.memory(side)[0] / 28 == pytest.approx(count, rel=0.25), name
    for size in laws.SIZES:
        for side in laws.RESOLUTIONS:
            made = candidate(pictures(), Wishes(resolution=side), SLOW, side, size)
            assert laws.NEED[side] and resolve(preset_of(made, pictures(), Wishes()), recipe="edm")


def test_stages_of_each_command_and_recipe():
    def recipes(*a, **k):
        return " ".join(stage.recipe for stage in stages_of(Wishes(*a, **k)))

    assert recipes("ct") == recipes("cd") == "edm icd" and recipes("edm") == "edm"
    assert recipes("cd", teacher="t") == "icd" and recipes("cd", recipe="polish", teacher="t") == "icd polish"
    assert recipes("ct", recipe="ict") == "ict" and recipes("ct", recipe="cd") == "edm cd"
    assert recipes("cd", recipe="icd") == "edm icd" and recipes("cd", recipe="icd", teacher="t") == "icd"
    assert recipes("ct", recipe="polish") == "edm icd polish" and recipes("ct", recipe="ict-pm") == "ict-pm"
    with pytest.raises(ConfigError, match="belongs to train-ct, not to train-edm"):
        recipes("edm", recipe="ict")
    with pytest.raises(ConfigError, match="starts from a trained model"):
        recipes("ct", recipe="ect")
    with pytest.raises(ConfigError, match="Did you mean icd"):
        recipes("ct", recipe="itc")


def test_a_polish_that_is_asked_for_is_a_third_stage():
    assert [(one.stage.recipe, one.stage.share) for one in choose(pictures(), Wishes(time=1200.0), SLOW).stages] == [
        ("edm", 0.5), ("icd", 0.5)
    ]  # fmt: skip
    wishes = Wishes(time=1200.0, recipe="polish")
    long = choose(pictures(), wishes, SLOW)
    assert [one.stage for one in long.stages] == list(laws.POLISHED) and long.stages[-1].until == 1200
    made = preset_of(long, pictures(), wishes)
    configs = {row["recipe"]: resolve(made, recipe=row["recipe"]).config for row in made.tables["plan"]["stages"]}
    assert configs["polish"].train.lr == pytest.approx(configs["icd"].train.lr / 3)
    assert configs["polish"].recipe.score.kind == "dmd" and configs["polish"].recipe.score.keep
    assert [configs[recipe].train.optimizer for recipe in ("edm", "icd", "polish")] == ["muon"] * 3
    assert configs["polish"].network.dropout == 0 and made.default == {"edm": "edm", "cd": "icd"}
    assert configs["polish"].train.checkpoint_every < configs["edm"].train.checkpoint_every
    named = plan(time=1200.0, recipe="polish", settings=("train.lr=0.01", "network.channels=24"))
    rates = [resolve(named, recipe=name).config.train.lr for name in ("edm", "icd", "polish")]
    assert rates == pytest.approx([0.01, 0.01, 0.01 / 3])


@pytest.mark.parametrize("named", ["network.dropout=0.2", "data.condition=gray", "train.precision=bf16"])
def test_what_a_polish_cannot_go_with_is_refused_before_anything_is_measured(named):
    check_early(Wishes(time=1200.0, settings=(named,)), pictures())
    with pytest.raises(ConfigError):
        check_early(Wishes(recipe="polish", settings=(named,)), pictures())


def plan(look=None, speeds=SLOW, **wishes):
    look, asked = look or pictures(), with_named(Wishes(**wishes))
    return preset_of(choose(look, asked, speeds), look, asked)


def test_the_plan_is_a_preset_file_that_means_the_same(tmp_path):
    made = plan(time=600.0, recipe="icd")
    path = tmp_path / "plan.toml"
    path.write_text(Plan(made).toml)
    read = read_plan(path)
    for row in made.tables["plan"]["stages"]:
        one, other = (resolve(preset, recipe=row["recipe"]).config for preset in (made, read.preset))
        assert one == other
    assert read.preset.default == {"edm": "edm", "cd": "icd"}
    times = [resolve(path.as_posix(), recipe=name).config.train.time for name in ("edm", "icd")]
    assert times == [300.0, 300.0]
    runs = list(stage_runs(read, tmp_path / "run", None))
    assert [(run.recipe, run.family, run.until) for run in runs] == [("edm", "edm", 300.0), ("icd", "cd", 600.0)]
    assert [run.folder for run in runs] == [tmp_path / "run/teacher", tmp_path / "run"]
    assert [run.until for run in stage_runs(read, tmp_path, 50.0)] == [25.0, 50.0]
    assert [run.until for run in stage_runs(read, tmp_path, 50.0, spent=10.0)] == [30.0, 50.0]


def test_students_see_details_and_their_passes_are_pairs_unless_others_are_named():
    """Rounded passes drown the small differences of many intervals."""
    intervals = set()
    for hours in (0.02, 200):
        made = plan(time=3600.0 * hours, speeds=FAST, resolution=16)
        teacher, student = (resolve(made, recipe=name).config for name in ("edm", "icd"))
        assert student.recipe.distance.details == (4.0, 2.0) and teacher.recipe.distance.details == ()
        assert student.network.input_gate and student.network.width // student.network.heads == 32
        intervals.add(student.recipe.curriculum.s1)
        assert teacher.train.half_passes == student.train.half_passes == "pair"
    assert len(intervals) == 2 and min(intervals) == 80
    for sets, passes in ((("recipe.curriculum.s1=40",), "pair"), (("train.half_passes=all",), "all")):
        assert resolve(plan(settings=sets), recipe="icd").config.train.half_passes == passes
    # What one plan is told of the distance is not told to the next.
    told = plan(settings=("recipe.distance.details=[9]",))
    assert resolve(told, recipe="icd").config.recipe.distance.details == (9.0,)
    assert resolve(plan(), recipe="icd").config.recipe.distance.details == (4.0, 2.0)


def test_pictures_that_come_along_are_judged_by_their_own_reference():
    faces = replace(pictures(size=(16, 16)), path="avatars")
    assert resolve(plan(faces, time=600.0), recipe="icd").config.eval.reference == "avatars"
    assert resolve(plan(faces, time=600.0, resolution=32), recipe="icd").config.eval.reference is None
    assert resolve(plan(time=600.0), recipe="icd").config.eval.reference is None


def test_a_third_row_is_a_third_stage(tmp_path):
    made = plan(time=600.0, recipe="icd")
    made.tables["plan"]["stages"].append({"recipe": "cd", "share": 1.0, "folder": "polish"})
    (tmp_path / "three.toml").write_text(Plan(made).toml)
    runs = list(stage_runs(read_plan(tmp_path / "three.toml"), tmp_path, None))
    assert [run.folder.name for run in runs] == ["teacher", "student", tmp_path.name]
    assert [run.until for run in runs] == pytest.approx([150, 300, 600])


def test_what_is_named_is_kept():
    sets = (
        "train.lr=0.01",
        "network.dropout=0.3",
        "recipe.curriculum.s1=33",
        "data.resolution=32",
        "network.channels=24",
    )
    made = plan(settings=sets, steps=700, batch_size=12, named={"train.seed": 5}, speeds=FAST)
    teacher, student = (resolve(made, recipe=name).config for name in ("edm", "icd"))
    for config in (teacher, student):
        assert (config.train.lr, config.network.dropout, config.train.batch_size) == (0.01, 0.3, 12)
        assert (config.data.resolution, config.network.channels, config.train.seed) == (32, 24, 5)
        assert config.train.time is None
    assert student.train.steps == 700 and student.recipe.curriculum.s1 == 33
    # The teacher has its share of the time that the student's steps take.
    assert teacher.train.steps == round(700 * 1.8)
    assert plan(resolution=64, time=60.0).tables["data"]["resolution"] == 64
    assert shared_settings(("train.lr=1", "recipe.curriculum.s1=3", "train.steps=4")) == ["train.lr=1"]


def test_few_pictures_and_odd_resolutions_are_refused():
    with pytest.raises(UserError, match="has 12 pictures to train on; of fewer than 50"):
        check_wishes(Wishes(), pictures(12))
    with pytest.raises(UserError) as one:
        check_wishes(Wishes(), pictures(1))
    assert "cut it into tiles" in one.value.hint
    check_wishes(Wishes(anyway=True), pictures(12))
    with pytest.raises(UsageError, match="--resolution 48: a plan knows 8, 16, 32"):
        check_wishes(Wishes(resolution=48), pictures())


def test_memory_bounds_what_is_computed_at_once():
    wide = Wishes(resolution=256, time=1e6, recipe="polish")
    roomy, tight = (choose(pictures(), wide, replace(FAST, memory=memory)) for memory in (1e12, 4e9))
    assert roomy.micro is None and 0 < tight.micro < tight.batch
    made = preset_of(tight, pictures(), wide)
    at_once = [resolve(made, recipe=one.stage.recipe).config.train.micro_batch for one in tight.stages]
    assert at_once == [one.micro for one in tight.stages] and at_once[0] == at_once[1] > at_once[2] == tight.micro


def test_classes_are_learned_where_they_have_pictures():
    some = pictures(classes={"a": 40, "b": 60, "c": 1})
    made = choose(some, Wishes(time=600.0), SLOW)
    assert made.labels and any("one picture or none: 1 (c)" in said for said in warnings_of(made, some))
    few = pictures(classes={str(n): 2 for n in range(50)})
    made = choose(few, Wishes(time=600.0), SLOW)
    assert not made.labels and any("learns none" in said for said in warnings_of(made, few))
    assert resolve(plan(some, time=600.0), recipe="icd").config.data.labels


def test_what_is_odd_is_said_with_counts():
    sizes = Counter({(10, 10): 30, (640, 480): 70})
    odd = Look(
        "p", 100, 100, sizes, gray=20, color=75, transparent=5, duplicates=11, unusable=Counter({"too large": 5})
    )
    made = choose(odd, Wishes(resolution=16, time=600.0), SLOW)
    said = "\n".join(warnings_of(made, odd))
    for words in ("30 smaller than 16 pixels are enlarged", "70 that are not square are cropped", "20 gray and 75 color",
                  "5 pictures may have transparent parts", "11 pictures are exact copies", "not used: 5 too large"):  # fmt: skip
        assert words in said, words
    assert made.channels == 3
    assert resolve(preset_of(made, odd, Wishes()), recipe="icd").config.data.small == "upscale"
    assert not warnings_of(choose(pictures(size=(64, 64)), Wishes(), SLOW), pictures(size=(64, 64)))
    gray = Look("g", 100, 100, Counter({(28, 28): 100}), gray=100)
    assert choose(gray, Wishes(), SLOW).channels == 1


def test_five_lines_say_what_why_and_when():
    made = choose(pictures(), Wishes(time=600.0), SLOW)
    lines = lines_of(made, pictures(), Wishes(time=600.0), SLOW, now=0.0)
    assert [line.split(":")[0] for line in lines] == ["pictures", "size", "recipe", "machine", "done"]
    assert "5,000 in photos" in lines[0] and "teacher edm" in lines[2] and "in 10 min" in lines[4]


NONSENSE = [
    ("share = 0.5", "share = -1", "plan.stages[0]: share = -1 must be greater than 0"),
    ('recipe = "edm"', 'recipe = "edmm"', "no recipe of this file and no method"),
    ('folder = "teacher"', 'folder = "../x"', "must be one word"),
    ("stages = [", "stags = [", "plan.stags is an unknown key"),
    ("time = 600.0", "time = 'long'", "must be a number"),
    ('recipe = "icd"', 'recipe = "ict"', "takes no teacher"),
    ('recipe = "icd"', 'recipe = "polish"', "starts from a consistency model, and no stage before it makes one"),
    ('recipe = "edm"', 'recipe = "icd"', "needs a teacher, and no stage before it makes one"),
    ("batch_size = 32", "batch_sise = 32", "Did you mean"),
]


@pytest.mark.parametrize(("old", "new", "words"), NONSENSE, ids=lambda value: value)
def test_a_plan_edited_into_nonsense_is_refused_in_one_sentence(tmp_path, old, new, words):
    text = Plan(plan(time=600.0, recipe="icd")).toml
    assert old in text
    path = tmp_path / "plan.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        resolve(str(path), recipe=read_plan(path).preset.tables["plan"]["stages"][0]["recipe"])
    assert words in refused.value.message and "plan.toml" in refused.value.message
