"""The published and the tuned noise levels for editing, against the exact posterior of Gaussian images."""

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.editing_times import TWO_PIXEL_GUIDANCE, TWO_PIXEL_TIMES, problems, two_pixels
from cmtool.config.schema import EditConfig, EditLevels
from cmtool.editing.levels import edit_settings, plan_edit, tuned_times
from cmtool.editing.tasks import TASKS
from cmtool.errors import UserError
from cmtool.samplers.times import solver_times, validate_times
from tests.editing.test_loop import two_pixels as simulated

TUNED = [task.name for task in TASKS.values() if task.levels == "tuned"]
PAPER = solver_times(40)[:-1]
HEADER = {"kind": "consistency", "preset": "shapes", "process": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}}


def test_the_formula_gives_the_known_answer_on_the_karras_grid():
    means, covariance = two_pixels().after_edit(PAPER, 0.0)
    assert means[0, 1] == pytest.approx(0.70777, abs=1e-5)
    assert np.sqrt(covariance[1, 1]) == pytest.approx(0.27236, abs=1e-5)
    assert two_pixels().distance(PAPER) == pytest.approx(0.1998, abs=1e-4)


def test_the_formula_knows_the_true_posterior():
    _, means, covariance = two_pixels().posterior()
    assert abs(means[0, 0]) == pytest.approx(0.9, abs=1e-6)
    assert np.sqrt(covariance[0, 0]) == pytest.approx(0.21794, abs=1e-5)


def test_20_evaluations_come_within_005_of_the_posterior():
    assert len(TWO_PIXEL_TIMES) == 20
    assert two_pixels().distance(TWO_PIXEL_TIMES, TWO_PIXEL_GUIDANCE) < 0.035


def test_the_loop_does_what_the_formula_says_with_guidance():
    means, covariance = two_pixels().after_edit(TWO_PIXEL_TIMES, TWO_PIXEL_GUIDANCE)
    mean, sd = simulated(TWO_PIXEL_TIMES, guidance=TWO_PIXEL_GUIDANCE)
    assert mean == pytest.approx(means[0, 1], abs=4 * sd / 20_000**0.5)
    assert sd == pytest.approx(covariance[1, 1] ** 0.5, rel=4 / 40_000**0.5)


def test_tuned_levels_beat_the_published_ones_with_half_the_evaluations():
    for task, group in problems().items():
        for problem in group:
            levels = getattr(EditConfig(), task)
            tuned = tuned_times(levels, 20, 0.002, 80.0)
            assert problem.distance(tuned, levels.guidance) < 0.97 * problem.distance(PAPER), problem.name


def test_guidance_brings_every_task_nearer_to_the_posterior_at_the_same_levels():
    for task, group in problems().items():
        levels = getattr(EditConfig(), task)
        times = tuned_times(levels, 20, 0.002, 80.0)
        for problem in group:
            assert problem.distance(times, levels.guidance) < problem.distance(times), problem.name


@pytest.mark.parametrize("task", TUNED)
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
@pytest.mark.parametrize("sigma_max", [0.05, 1.0, 80.0])
def test_tuned_levels_are_usable_for_any_number_and_range(task, steps, sigma_max):
    times = tuned_times(getattr(EditConfig(), task), steps, 0.002, sigma_max)
    assert len(times) == steps
    assert validate_times(times, 0.002, sigma_max) == times


def test_published_levels_by_task_and_data_set():
    assert plan_edit(HEADER, "inpaint", times="paper").times == PAPER
    assert len(plan_edit({**HEADER, "preset": "cifar10"}, "inpaint", times="paper").times) == 17
    for preset in ("lsun_bedroom256", "shapes"):
        assert plan_edit({**HEADER, "preset": preset}, "stroke", times="paper").times == (5.38, 2.24)
    assert plan_edit({**HEADER, "preset": "lsun_bedroom256"}, "stroke").times == (5.38, 2.24)
    by_index = plan_edit(HEADER, "stroke", indices=(16, 20), of=40).times
    assert by_index == pytest.approx((5.38, 2.24), rel=1e-3)


def test_strokes_of_a_preset_may_have_levels_of_their_own():
    plan = plan_edit(HEADER, "stroke")
    assert (plan.times, plan.source) == ((1.0, 0.4), "tuned for stroke")
    assert plan_edit({**HEADER, "preset": None}, "stroke").source == "the paper's"
    longer = plan_edit(HEADER, "stroke", steps=3)
    assert longer.times == pytest.approx((1.0, 0.4, 0.16))
    with pytest.raises(UserError, match="strictly decreasing"):
        plan_edit({**HEADER, "edit": {"paper_stroke": [1.0, 2.0]}}, "stroke")


def test_the_header_decides_then_the_preset_it_names_then_the_usual_levels():
    own = EditConfig(inpaint={"steps": 3, "first": 4.0, "last": 1.0, "guidance": 0.1}).model_dump(mode="json")
    plan = plan_edit({**HEADER, "edit": own}, "inpaint")
    assert plan.times == pytest.approx((4.0, 2.0, 1.0))
    assert (plan.guidance, plan.candidates) == (0.1, 1)
    assert edit_settings({**HEADER, "preset": "cifar10"}).paper_points == 18
    assert edit_settings({**HEADER, "preset": "never heard of"}) == EditConfig()
    assert edit_settings({}) == EditConfig()


def test_levels_that_were_found_later_replace_the_usual_ones_of_a_header():
    header = {"preset": "avatars", "edit": EditConfig().model_dump()}
    assert (edit_settings(header).deblur.steps, EditConfig().deblur.steps) == (20, 4)
    own = EditLevels(steps=7, first=3.0, last=0.3)
    assert edit_settings({**header, "edit": {**header["edit"], "deblur": own.model_dump()}}).deblur == own


def test_a_preset_of_the_same_name_in_the_working_folder_is_not_meant(tmp_path, monkeypatch):
    shipped = edit_settings({"preset": "shapes"})
    assert shipped.colorize.candidates > 1
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "shapes.toml").write_text("[edit]\ninpaint = { first = 9.0, last = 0.1 }\n")
    monkeypatch.chdir(tmp_path)
    assert edit_settings({"preset": "shapes"}) == shipped


def test_over_relaxation_belongs_to_the_tuned_levels_alone():
    for request in ({"times": "paper"}, {"times": (3.0, 1.0)}, {"indices": (0, 10), "of": 40}):
        plan = plan_edit(HEADER, "inpaint", **request)
        assert (plan.guidance, plan.candidates) == (0.0, 1)
    plan = plan_edit(HEADER, "stroke")
    assert (plan.guidance, plan.candidates) == (0.0, 1)
    assert plan_edit(HEADER, "inpaint", steps=7).guidance > 0


def test_unusable_requests_are_refused():
    with pytest.raises(UserError, match="levels for editing are unusable"):
        plan_edit({**HEADER, "edit": {"inpaint": {"first": 1.0, "last": 2.0}}}, "inpaint")
    with pytest.raises(UserError, match="neither"):
        plan_edit(HEADER, "inpaint", times="papers")
    with pytest.raises(UserError, match="give one of them"):
        plan_edit(HEADER, "inpaint", times=(1.0,), steps=3)


def test_the_class_is_searched_above_the_levels_that_tell_none_apart():
    own = {"superres": {"steps": 5, "first": 1.6, "last": 0.01, "class_last": 0.1}}
    header = {**HEADER, "edit": own}
    plan = plan_edit(header, "superres")
    assert plan.class_times == pytest.approx((1.6, 0.8, 0.4, 0.2, 0.1))
    assert plan.times[-1] == pytest.approx(0.01)
    # Where the levels are the user's own, or end above, the search keeps to them.
    given = plan_edit(header, "superres", times=[1.0, 0.05])
    assert given.class_times == (1.0, 0.05)
    few = plan_edit(header, "superres", steps=1)
    assert few.class_times == few.times
    assert plan_edit(HEADER, "stroke").class_times == plan_edit(HEADER, "stroke").times
    with pytest.raises(ValidationError, match="class_last = 3"):
        EditLevels(first=2.0, last=0.1, class_last=3.0)
