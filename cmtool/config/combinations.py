"""Which settings go together: every reason to refuse a resolved run, in one sentence each, as plain ValueErrors."""

from __future__ import annotations

from cmtool.config.condition import KINDS, parse_condition
from cmtool.config.parts import RecipeConfig
from cmtool.config.schema import RunConfig, TrainConfig
from cmtool.config.sources import SOURCES

# On a grid of this many points, neighbors near 80 are 57 float32 roundings apart. On a finer grid the gap between them,
# by which losses are divided, would be off by more than a percent.
MOST_POINTS = 1_000_000

# Within a group, F and its conditioning mean the same, so weights can be passed on.
MEANINGS = ({"edm", "consistency"}, {"trig"}, {"flow"}, {"hard"}, {"ddpm"})
TRIG = ("edm", "trig")
# Rules about the average velocity between two times, and scalings of networks that can be asked for it.
TWO_TIMES = ("average_velocity", "two_leg")
AVERAGES = ("flow", "edm")


class Unfit(ValueError):
    """Settings that do not go together, in one sentence without its full stop; `hint` is what to type instead."""

    def __init__(self, sentence: str, hint: str) -> None:
        super().__init__(sentence)
        self.hint = hint


def same_meaning(one: str, other: str) -> bool:
    """Whether a network trained under parameterization `one` can go on under `other`."""
    return any(one in group and other in group for group in MEANINGS)


def check_combination(config: RunConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        ValueError: one sentence that names the settings and what would be right.
    """
    config.network.check(config.data.shape[1])
    _check_condition(config)
    _check_curriculum(config.recipe, config.train)
    _check_times(config)
    _check_groups(config)
    _check_coupling(config)
    _check_direction(config)
    _check_average(config)
    _check_augment(config)
    _check_derivative(config)
    _check_measure(config)
    _check_score(config)
    _check_shard(config)
    _check_time(config)


def _check_condition(config: RunConfig) -> None:
    """Refuse a picture beside the input that the data cannot have, or that a part of the recipe knows nothing of."""
    data, recipe = config.data, config.recipe
    if data.condition is None:
        return
    if SOURCES[data.source].points:
        raise ValueError("data.condition is a picture, and these data are points")
    seen = parse_condition(data.condition, data.channels, data.resolution)
    if not seen.is_derived and data.path is None and SOURCES[data.source].built_in:
        raise Unfit(
            f"data.condition = '{data.condition}' is none of {', '.join(KINDS)}, and for a folder of pairs images of a "
            "folder are needed",
            "name one with --data",
        )
    if recipe.coupling.kind == "teacher":
        raise ValueError("recipe.coupling.kind = 'teacher' stores pairs that have no picture of data.condition")
    if config.recipe.score.kind != "none":
        raise ValueError(
            f"recipe.score.kind = '{config.recipe.score.kind}' sees no pictures, and these data have data.condition; "
            "take another recipe, such as icd"
        )


def _check_curriculum(recipe: RecipeConfig, train: TrainConfig) -> None:
    part = recipe.curriculum
    if train.restart == "stage" and part.scales != "halving":
        raise Unfit(
            f"train.restart = 'stage' is for recipe.curriculum.scales = 'halving', not '{part.scales}'",
            "add --set train.restart=none",
        )
    if part.scales in ("sqrt", "doubling") and part.s1 < part.s0:
        raise Unfit(
            f"recipe.curriculum ends (s1 = {part.s1}) before it starts (s0 = {part.s0})",
            f"add --set recipe.curriculum.s1={part.s0} or more, or --set recipe.curriculum.s0={part.s1} or less",
        )
    if part.scales == "halving" and part.s1 > part.s0:
        raise Unfit(
            f"recipe.curriculum halves from s0 = {part.s0} and cannot end at s1 = {part.s1} above it",
            f"add --set recipe.curriculum.s1={part.s0} or less",
        )
    if part.scales == "fixed" and part.s1 < 2:
        raise Unfit(
            "recipe.curriculum.s1 = 1 is no grid: a fixed curriculum needs at least 2 points",
            "add --set recipe.curriculum.s1=18, for example",
        )
    most = max(part.s0, part.s1)
    if most > MOST_POINTS:
        raise Unfit(
            f"recipe.curriculum asks for {most:,} grid points; above {MOST_POINTS:,} float32 rounds the gap between "
            "neighbors by more than a percent",
            "add --set recipe.curriculum.s1=1280, for example",
        )


def _check_times(config: RunConfig) -> None:
    recipe, process = config.recipe, config.process
    times, gap, rule = recipe.times, recipe.gap, recipe.target.rule
    on_grid = times.kind.startswith("grid")
    if rule in ("pair", "leap") and not on_grid and gap.kind != "ratio":
        raise ValueError(
            f"recipe.target.rule = '{rule}' needs two different times: times on the grid, or gap.kind = 'ratio'"
        )
    if times.draws_two and rule not in TWO_TIMES:
        raise ValueError(f"recipe.times.kind = '{times.kind}' is for target.rule = {' or '.join(map(repr, TWO_TIMES))}")
    if rule in TWO_TIMES and not times.draws_two:
        raise Unfit(
            f"recipe.target.rule = '{rule}' averages between two levels, and recipe.times.kind = '{times.kind}' draws "
            "one",
            "add --set recipe.times.kind=two_lognormal",
        )
    if (rule == "moments") != (times.kind == "flow_pair") or (rule == "moments") != (gap.kind == "decrement"):
        raise ValueError(
            "recipe.target.rule = 'moments', recipe.times.kind = 'flow_pair' and recipe.gap.kind = 'decrement' belong "
            "together: jumps from two levels to a third"
        )
    if rule == "moments" and not config.network.two_time:
        raise Unfit(
            "recipe.target.rule = 'moments' needs a network that is told where to jump: network.two_time = true",
            "add --set network.two_time=true",
        )
    if times.kind == "student_t" and not process.sigma_min <= times.low < process.sigma_max:
        raise ValueError(f"recipe.times.low = {times.low} lies outside the noise levels of the process")
    if process.truncated_at is not None and times.kind == "student_t" and times.low != process.truncated_at:
        raise ValueError(
            f"recipe.times.low = {times.low} must be process.truncated_at = {process.truncated_at}, where the trained "
            "network begins"
        )
    if recipe.weighting.kind == "inverse_gap" and not on_grid and gap.kind != "ratio":
        raise ValueError("recipe.weighting.kind = 'inverse_gap' divides by t - r, and this recipe has r = t")


def leaves_one_alone(images: int, micro: int) -> bool:
    """Whether passes of `micro` images leave one with a single image, whose noise cannot be exchanged."""
    return min(images, micro) < 2 or images % micro == 1


def splits_groups(images: int, micro: int, group: int) -> bool:
    """Whether passes of `micro` of `images` images part a group of `group` neighbors that share their times."""
    return bool(images % group or min(micro, images) % group)


def _check_groups(config: RunConfig) -> None:
    group, train = config.recipe.times.group, config.train
    if group > 1 and train.micro_batch == "auto":
        raise Unfit(
            f"recipe.times.group = {group} images share a forward pass: train.micro_batch cannot be 'auto'",
            f"give a multiple of {group}: --micro-batch {16 * group}, for example",
        )
    if train.batch_size % group:
        raise Unfit(
            f"recipe.times.group = {group} images of a batch share their times, and train.batch_size = "
            f"{train.batch_size} is no multiple of {group}",
            f"add --batch-size {group * -(-train.batch_size // group)}",
        )
    if isinstance(train.micro_batch, int) and splits_groups(train.batch_size, train.micro_batch, group):
        raise Unfit(
            f"recipe.times.group = {group} images of a batch share their times, and train.micro_batch = "
            f"{train.micro_batch} is no multiple of {group}",
            f"add --micro-batch {group * -(-train.micro_batch // group)}",
        )


def _check_coupling(config: RunConfig) -> None:
    part, train = config.recipe.coupling, config.train
    if part.kind == "ot" and train.micro_batch == "auto":
        raise Unfit(
            "recipe.coupling.kind = 'ot' depends on how many images meet: train.micro_batch cannot be 'auto'",
            "give a number: --micro-batch 64, for example",
        )
    micro = train.batch_size if train.micro_batch in (None, "auto") else int(train.micro_batch)
    if part.kind == "ot" and min(micro, train.batch_size) < 2:
        raise Unfit(
            "recipe.coupling.kind = 'ot' exchanges noise within a batch and needs at least 2 images in it, not "
            f"train.batch_size = {train.batch_size} by train.micro_batch = {micro}",
            "raise --batch-size, and --micro-batch if it is given",
        )
    if part.kind == "ot" and leaves_one_alone(train.batch_size, micro):
        raise Unfit(
            f"recipe.coupling.kind = 'ot' needs at least 2 images in every forward pass: train.batch_size = "
            f"{train.batch_size} in parts of train.micro_batch = {micro} leaves one alone",
            f"add --batch-size {train.batch_size + 1}, or another --micro-batch",
        )
    if part.kind == "generator" and part.predictor == "frozen" and part.model is None:
        raise ValueError("recipe.coupling.predictor = 'frozen' needs recipe.coupling.model, a file or run folder")
    grid = config.recipe.times.kind.startswith("grid") and config.recipe.curriculum.scales == "fixed"
    if part.path and not (part.kind == "teacher" and grid):
        raise ValueError(
            "recipe.coupling.path = true stores a teacher's points on one grid: it needs coupling.kind = 'teacher', "
            "times on the grid, and curriculum.scales = 'fixed'"
        )
    if part.kind == "teacher" and not config.recipe.takes_teacher:
        raise ValueError("recipe.coupling.kind = 'teacher' needs a recipe of train-cd with needs = 'teacher'")


def _check_direction(config: RunConfig) -> None:
    part = config.recipe.direction
    if part.kind == "posterior_mean" and part.pool == "batch" and config.train.micro_batch == "auto":
        raise Unfit(
            "recipe.direction.pool = 'batch' depends on how many images meet: train.micro_batch cannot be 'auto'",
            "give a number: --micro-batch 64, for example",
        )
    _check_guidance(config)
    if part.kind == "teacher" and not config.recipe.takes_teacher:
        raise ValueError("recipe.direction.kind = 'teacher' needs a recipe of train-cd with needs = 'teacher'")
    if part.solver in ("dpmpp_2m", "adams_bashforth") and part.substeps < 2:
        raise ValueError(f"recipe.direction.solver = '{part.solver}' remembers a step: substeps must be at least 2")
    if part.kind == "target" and not config.recipe.target.keeps_network:
        raise ValueError("recipe.direction.kind = 'target' needs a target network: target.update = 'stage'")


def _check_guidance(config: RunConfig) -> None:
    part = config.recipe.direction
    if part.weak is not None and part.kind != "teacher":
        raise ValueError("recipe.direction.weak is for direction.kind = 'teacher'")
    if part.weak is not None and part.guidance == 1:
        raise Unfit(
            "recipe.direction.weak changes nothing while recipe.direction.guidance = 1",
            "add --set recipe.direction.guidance=2, for example",
        )
    if part.interval is not None and part.interval[0] >= part.interval[1]:
        raise ValueError(f"recipe.direction.interval = {list(part.interval)} must rise from a lower to a higher level")
    if config.network.guided:
        _check_told(config)
    if part.guidance == 1:
        return
    alone = part.kind == "sample" and config.recipe.target.rule in TWO_TIMES
    if part.kind != "teacher" and not alone:
        raise ValueError(
            "recipe.direction.guidance is for direction.kind = 'teacher', and for networks of two times from scratch"
        )
    if part.weak is None and not config.data.labels:
        raise Unfit(
            "recipe.direction.guidance needs class labels, and data.labels is false",
            "add --set data.labels=true if the images have classes",
        )
    if alone and not config.train.label_dropout:
        raise Unfit(
            "recipe.direction.guidance asks the network for its answer to no label, and train.label_dropout = 0",
            "add --set train.label_dropout=0.1",
        )


def _check_augment(config: RunConfig) -> None:
    """Refuse augmentation of what is no image, or that the network or a part of the recipe is not told of."""
    part, network, recipe = config.recipe.augment, config.network, config.recipe
    if network.augment_labels and not network.augments:
        raise ValueError(
            f"a network of kind '{network.kind}' cannot be told of augmentation: network.augment_labels = 0"
        )
    if part.p == 0:
        return
    off = "add --set recipe.augment.p=0"
    if not part.labels:
        raise Unfit(f"recipe.augment has p = {part.p:g} and no change with a factor above 0", off)
    if not network.augments:
        raise Unfit(
            f"recipe.augment tells the network what was done, and a '{network.kind}' network cannot hear it", off
        )
    if network.augment_labels != part.labels:
        raise Unfit(
            f"recipe.augment tells {part.labels} numbers, and network.augment_labels is {network.augment_labels}",
            "leave network.augment_labels out",
        )
    if SOURCES[config.data.source].points or config.data.resolution < 4:
        raise Unfit("recipe.augment is for images of at least 4 pixels a side", off)
    if recipe.coupling.kind == "teacher":
        raise Unfit("recipe.augment changes training images, and recipe.coupling.kind = 'teacher' uses none", off)
    if recipe.direction.kind == "posterior_mean" and recipe.direction.pool == "batch":
        raise Unfit("recipe.direction.pool = 'batch' takes the mean of images that recipe.augment changed unlike", off)


def _check_told(config: RunConfig) -> None:
    part = config.recipe.direction
    if config.recipe.target.rule not in TWO_TIMES or part.kind != "sample":
        raise ValueError("network.guided = true is for networks of two times from scratch (recipe imf)")
    if part.guidance <= 1:
        raise Unfit(
            f"network.guided = true needs the largest scale that it is told, and recipe.direction.guidance = "
            f"{part.guidance:g}",
            "add --set recipe.direction.guidance=8",
        )
    if part.mix or part.interval is not None:
        raise ValueError(
            "network.guided = true draws mix and interval itself: leave recipe.direction.mix and interval out"
        )


def _check_derivative(config: RunConfig) -> None:
    target, network, process = config.recipe.target, config.network, config.process
    if not target.differentiates:
        return
    forward = target.derivative == "forward"
    if forward and not network.forward_mode:
        raise Unfit(
            "network.attention_kernel = 'auto' has no forward-mode derivative, which this recipe needs; use 'math'",
            "add --set network.attention_kernel=math, or --set recipe.target.derivative=difference",
        )
    if forward and config.train.compile:
        raise ValueError(
            "train.compile = true has no forward-mode derivative, which this recipe needs; leave it out, or take "
            "recipe.target.derivative = 'difference'"
        )
    if network.checkpointing and not target.stop_gradient:
        raise ValueError("network.checkpointing has no forward-mode derivative, which this recipe needs; set it false")
    if config.recipe.gap.kind != "none":
        raise ValueError(f"recipe.target.rule = '{target.rule}' is a limit r -> t: gap.kind must be 'none'")
    if target.rule == "trig_tangent" and process.parameterization not in TRIG:
        raise ValueError(
            f"recipe.target.rule = 'trig_tangent' needs process.parameterization 'edm' or 'trig', not "
            f"'{process.parameterization}'"
        )


def _check_average(config: RunConfig) -> None:
    """Refuse what a rule about average velocities cannot work with."""
    target, legs = config.recipe.target, config.recipe.legs
    if target.rule not in TWO_TIMES:
        return
    if not config.network.two_time:
        raise ValueError(f"recipe.target.rule = '{target.rule}' needs network.two_time = true")
    if config.process.parameterization not in AVERAGES:
        raise ValueError(
            f"recipe.target.rule = '{target.rule}' needs process.parameterization {' or '.join(map(repr, AVERAGES))}, "
            f"not '{config.process.parameterization}'"
        )
    if target.rule == "two_leg" and legs.law in ("exponential", "uniform") and legs.end > legs.start:
        raise Unfit(
            f"recipe.legs shrinks from start = {legs.start} and cannot end at {legs.end} above it",
            f"add --set recipe.legs.end={legs.start} or less",
        )
    if legs.law == "sigmoid" and legs.begins >= legs.ends:
        raise ValueError(f"recipe.legs.begins = {legs.begins} must be below recipe.legs.ends = {legs.ends}")
    if target.rule == "two_leg" and target.limit and legs.law not in ("exponential", "sigmoid"):
        raise ValueError(f"recipe.target.limit is where the first leg shrinks to nothing, and legs.law = '{legs.law}'")


def _check_measure(config: RunConfig) -> None:
    recipe = config.recipe
    if recipe.distance.kind == "cauchy" and recipe.distance.c == 0:
        raise ValueError("recipe.distance.c = 0 leaves the Cauchy distance without a scale")
    if recipe.weighting.kind == "learned" and not config.network.log_variance:
        raise ValueError("recipe.weighting.kind = 'learned' needs network.log_variance = true")
    if recipe.distance.details and recipe.distance.kind == "lpips":
        raise Unfit(
            "recipe.distance.details weighs differences of pixels; recipe.distance.kind = 'lpips' compares features",
            "add --set recipe.distance.details=[]",
        )
    if config.data.resolution % 2 ** len(recipe.distance.details):
        raise Unfit(
            f"recipe.distance.details has {len(recipe.distance.details)} levels, and data.resolution = "
            f"{config.data.resolution} cannot be halved as often",
            "add --set recipe.distance.details=[], or weights for fewer levels",
        )
    if recipe.distance.kind == "lpips" and config.data.channels not in (1, 3):
        raise ValueError(
            f"recipe.distance.kind = 'lpips' compares gray or RGB images, not {config.data.channels} channels"
        )
    if recipe.distance.kind == "lpips" and recipe.target.rule in ("trig_tangent", *TWO_TIMES):
        raise ValueError(f"recipe.distance.kind = 'lpips' compares images, not what '{recipe.target.rule}' predicts")


def _check_score(config: RunConfig) -> None:
    recipe, network = config.recipe, config.network
    if recipe.score.kind == "none":
        return
    if recipe.direction.kind != "teacher":
        raise ValueError(
            f"recipe.score.kind = '{recipe.score.kind}' compares with a teacher: "
            "recipe.direction.kind must be 'teacher'"
        )
    dropped = network.dropout if isinstance(network.dropout, tuple) else (network.dropout,)
    if any(rate > 0 for rate in dropped):
        raise Unfit(
            f"recipe.score.kind = '{recipe.score.kind}' compares two networks, and network.dropout would make them "
            "differ by itself",
            "add --set network.dropout=0",
        )
    if config.train.precision in ("bf16", "fp16"):
        raise Unfit(
            f"recipe.score.kind = '{recipe.score.kind}' learns from the difference of two denoisers, which half "
            "precision rounds away",
            "use --precision fp32",
        )


def _check_shard(config: RunConfig) -> None:
    """Refuse what would make one of several processes wait for another, or what gathering the weights forbids."""
    train, target = config.train, config.recipe.target
    if not train.shard:
        return
    if train.micro_batch == "auto":
        raise ValueError(
            "train.shard = true takes no micro_batch = 'auto': a process that halves its own would leave the others "
            "waiting; give a number"
        )
    if train.compile:
        raise ValueError("train.shard = true and train.compile = true exclude each other; leave one of them out")
    if train.optimizer == "muon":
        raise Unfit(
            "train.shard = true gives every process a part of each matrix, and train.optimizer = 'muon' needs it whole",
            "add --set train.optimizer=adamw",
        )
    if config.process.truncated_at is not None:
        raise ValueError(
            "train.shard = true asks all processes to run the same layers, and this recipe chooses between two "
            "networks by its noise levels; leave train.shard out"
        )
    if target.differentiates and target.derivative == "forward" and not target.stop_gradient:
        raise ValueError(
            "train.shard = true cannot differentiate through a forward-mode derivative; leave it out, or take "
            "recipe.target.stop_gradient = true or recipe.target.derivative = 'difference'"
        )


def _check_time(config: RunConfig) -> None:
    stages = config.train.restart == "stage" or config.recipe.target.update == "stage"
    if config.train.time is not None and stages:
        raise Unfit(
            "train.time stretches the schedules of a run as its clock says, and this recipe starts over at fixed steps",
            "give --steps in place of --time",
        )
