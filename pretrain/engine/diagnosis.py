"""From what a run logs to what is wrong with it, in plain words.

The thresholds are ours, between what healthy and broken runs log; test_diagnosis.py has both kinds.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moco_det.common.documents import read_json_lines, shortened, shown
from moco_det.common.errors import UserError, one_line
from pretrain.engine import checkpoints

LOG = "metrics.jsonl"
RECENT = 5  # records that one judgement is about
LINEAR_RULE = 0.03 / 256  # lr over batch; 0.12 at 1024 (arXiv:1911.05722, Sec. 3.3 and 4.1)
LARS_RULE = 0.3 / 256  # SimCLR's (arXiv:2002.05709, Sec. 2.3)
SMALL_DATA = 10  # times LINEAR_RULE: 0.3 at 256 on 118,000 images (arXiv:2106.05967, Sec. 3)
RISE = 0.05  # of the loss, as a share of chance
COLLAPSED = 0.15  # feature_std over 1/sqrt(dim), what evenly spread features have
LEAKING = 99.0  # pretext accuracy in percent, as plotted in Fig. A.1
WAITING = 0.3  # share of the time
FREE = 0.05  # share of the crops whose draws ran out; of usual images it is 0 at the defaults
EXPLODED = 1e8  # a weight, or a variance, that no training leads to


@dataclass(frozen=True)
class Finding:
    """One condition of a run; `problem` is False for what only looks wrong."""

    step: int
    condition: str
    text: str
    problem: bool

    def __str__(self) -> str:
        return f"doctor: {'' if self.problem else 'no problem: '}{self.text}"


class Doctor:
    """Hears the records of metrics.jsonl in their order; reports each condition once a start.

    Args:
        output: the folder of the run, to say which checkpoint is good.
    """

    def __init__(self, output: Path):
        self.course = Course(output)
        self.reported: set[str] = set()

    def hear(self, record: dict) -> list[Finding]:
        """What is new with `record`; one with "flags" begins another start of the run."""
        self.course.add(record)
        if "flags" in record:
            self.reported.clear()
        findings = []
        for rule in RULES:
            name = rule.__name__
            if name not in self.reported and (text := rule(self.course)):
                findings.append(Finding(record["step"], name, text, rule is not filling))
                self.reported.add(name)
        return findings


def examine(output: Path) -> list[Finding]:
    """All findings on the run of `output`, in the order in which they showed.

    Raises:
        UserError: there is no log of a run.
    """
    path = output / LOG
    if not path.is_file():
        raise UserError(f"no {path}: name the --output folder of a run of pretrain/main.py")
    doctor, findings = Doctor(output), []
    for record in read_records(path):
        try:
            findings += doctor.hear(record)
        except (KeyError, ArithmeticError) as error:
            raise UserError(
                f"{path}: the record of step {record['step']} cannot be judged ({error!r}): "
                "remove that line"
            ) from error
    return findings


def read_records(path: Path, last_step: float = math.inf) -> list[dict]:
    """The records of a log up to a step; a last line that a kill cut short is none.

    Raises:
        UserError: the file cannot be read, or another line is no record.
    """
    records = []
    for number, record in enumerate(read_json_lines(path, "log", finite=False, kind="a step"), 1):
        if problem := _problem(record):
            raise UserError(f"{shortened(path)}, line {number} is no JSON of a step: {problem}")
        if record["step"] <= last_step:
            records.append(record)
    return records


# What a rule computes with: of a report, beside the names that end in "_fill"; of the run's flags.
MEASURES = {
    "epoch", "loss", "acc1", "chance_loss", "lr", "knn_top1", "feature_std", "positive_similarity",
    "negative_similarity", "images_per_second", "data_wait", "free_pairs", "free_crops",
}  # fmt: skip
NUMBERS = {
    "lr", "batch_size", "moco_m", "moco_t", "moco_dim", "weight_decay", "workers", "cores",
    "image_size", "last_step",
}  # fmt: skip


def _problem(record: dict) -> str | None:
    """What is wrong with a record: no step, or no number where a rule needs one."""
    step, flags = record.get("step"), record.get("flags", {})
    if not isinstance(step, int) or step < 0:
        return f"step {shown(step)}"
    if not isinstance(flags, dict):
        return f"flags {shown(flags)}"
    numbers = {k: v for k, v in record.items() if k in MEASURES or k.endswith("_fill")}
    numbers |= {name: flags[name] for name in NUMBERS & flags.keys()}
    for name, value in numbers.items():
        if not isinstance(value, int | float | None):
            return f"{one_line(name, 40)} {shown(value)}"
    return None


class Course:
    """What the rules look at: the last records and a few marks of the whole run.

    Attributes:
        flags: those of the run, beside what it counted: see `Trainer`. Empty in logs without them.
        recent: the last RECENT reports of training since the last start but its first one, which
            waits for the loader's processes and takes whatever else a start takes.
        knn: (epoch, top-1 in percent) of every kNN monitor.
        fill: share of the queue or bank that is real, 1 where there is none.
        lowest: the least loss while the memory fills; afterwards the least mean of `recent`.
    """

    def __init__(self, output: Path):
        self.output = output
        self.flags: dict = {}
        self.recent: deque[dict] = deque(maxlen=RECENT)
        self.knn: list[tuple[float, float]] = []
        self.knn_at = -1  # step of the last one
        self.last: dict = {}  # the last report
        self.fill, self.full_at = 0.0, math.inf
        self.lowest, self.lowest_at = math.inf, 0
        self.step, self.fresh = 0, True

    def add(self, record: dict) -> None:
        self.step = record["step"]
        if "flags" in record:
            self.flags, self.fresh = record["flags"], True
            self.recent.clear()
        elif "knn_top1" in record:
            self.knn.append((record["epoch"], record["knn_top1"]))
            self.knn_at = self.step
        elif "loss" in record:
            self._add_report(record)

    def _add_report(self, record: dict) -> None:
        self.last = record
        if not self.fresh:
            self.recent.append(record)
        self.fresh = False
        self.fill = min((v for k, v in record.items() if k.endswith("_fill")), default=1.0)
        if self.fill == 1 and self.full_at == math.inf:
            self.full_at = self.step
            self.recent.clear()
        if self.settled and self.lowest_at < 2 * self.full_at:
            self.lowest = math.inf
        now = self.mean("loss") if self.settled else record["loss"]
        if now < self.lowest and (not self.settled or self.enough):
            self.lowest, self.lowest_at = now, self.step

    @property
    def settled(self) -> bool:
        """Whether the memory was replaced once since it was full: early keys are easy to tell."""
        return self.step >= 2 * self.full_at

    @property
    def enough(self) -> bool:
        return len(self.recent) == RECENT

    def mean(self, name: str) -> float:
        """Over the recent reports, weighted alike; NaN where there are none."""
        return statistics.fmean(r[name] for r in self.recent) if self.recent else math.nan


def nan(course: Course) -> str | None:
    loss = course.last.get("loss", 0.0)
    if math.isfinite(loss):
        return None
    good = last_good(course.output)
    where = f"the last good checkpoint is {good}" if good else "of checkpoints none is saved yet"
    return f"the loss is {loss} at step {course.last['step']}; {where}. {causes(course)}"


def learning_rate(course: Course) -> str | None:
    """A rate that is far off the linear rule; a factor of 2 is common in short runs."""
    ratio = rate_ratio(course.flags)
    published = course.flags.get("optimizer", "sgd") == "sgd" and math.isclose(ratio, SMALL_DATA)
    if not course.flags or 0.25 <= ratio <= 4 or published:
        return None
    danger = "features may collapse" if ratio > 1 else "training takes that much longer"
    return f"{rate_words(course.flags)}; {danger}. Scale --lr with --batch-size"


def never_full(course: Course) -> str | None:
    """More keys than the whole run encodes: some negatives stay random points to its end."""
    flags = course.flags
    if flags.get("mechanism") != "moco" or "last_step" not in flags:
        return None
    seen = flags["last_step"] * flags["batch_size"]
    if flags["moco_k"] <= seen:
        return None
    return (
        f"the queue never fills: --moco-k {flags['moco_k']} is more than the {seen} keys of all "
        f"{flags['last_step']} steps, so at least {1 - seen / flags['moco_k']:.0%} of the "
        "negatives are random to the end. Pass a --moco-k that a few epochs fill, or train longer"
    )


def filling(course: Course) -> str | None:
    """The initial keys are random points of the sphere, far from all images' features."""
    if course.fill == 1 or not course.last:
        return None
    loss, chance = course.last["loss"], course.last["chance_loss"]
    if not loss >= course.lowest + RISE * chance:
        return None
    name = "bank" if "bank_fill" in course.last else "queue"
    full = math.ceil(course.step / course.fill)
    return (
        f"the loss is rising ({course.lowest:.2f} to {loss:.2f}, chance {chance:.2f}) because the "
        f"{name} is {course.fill:.0%} real: the rest are random initial keys, which are easy to "
        f"tell from images. It is full at step {full}; judge the loss from step {2 * full} on"
    )


def rising(course: Course) -> str | None:
    if not course.enough or course.step < 2 * course.full_at + 50:
        return None
    loss = course.mean("loss")
    if not loss >= course.lowest + RISE * course.last["chance_loss"]:
        return None
    text = (
        f"the loss rises again: {course.lowest:.2f} at step {course.lowest_at}, now {loss:.2f} "
        f"(chance {course.last['chance_loss']:.2f}) at lr {course.last['lr']:g}. {causes(course)}"
    )
    if "queue_fill" not in course.last:
        return text
    return (
        f"{text}. Where the encoder changes quickly, old keys are told from new ones by their age: "
        "a smaller --moco-k keeps them young"
    )


def collapse(course: Course) -> str | None:
    """Features that are nearly equal for all images, beyond the first 50 steps and epoch."""
    since = course.step - 2 * course.full_at
    early = since < 50 or (course.last["epoch"] < 1 and since < 5000)
    if early or not course.enough or "moco_dim" not in course.flags:
        return None
    spread = course.flags["moco_dim"] ** -0.5
    deviation = course.mean("feature_std")
    if not deviation < COLLAPSED * spread:
        return None
    own, others = (course.mean(f"{name}_similarity") for name in ("positive", "negative"))
    return (
        f"the features collapse: their standard deviation over a batch is {deviation:.4f}, where "
        f"evenly spread ones have {spread:.3f}; the similarity of an image's views is {own:.2f}, "
        f"that of different images {others:.2f}. {causes(course)}"
    )


def leak(course: Course) -> str | None:
    """The pretext task is solved, and the features are no better for it (Sec. 3.3, Fig. A.1)."""
    accuracy = course.mean("acc1")
    if not (course.settled and course.enough and accuracy >= LEAKING):
        return None
    two_views = course.flags.get("mechanism", "moco") != "memory-bank"
    unshuffled = two_views and not course.flags.get("shuffle_bn", True)
    solved = f"pretext accuracy is {accuracy:.1f} %"
    if len(course.knn) < 2:
        if not unshuffled:
            return None
        return f"{solved} without shuffled BN: batch statistics may leak. Pass --shuffle-bn"
    best, last = max(course.knn, key=lambda entry: entry[1]), course.knn[-1]
    fallen = last[1] <= best[1] - max(2.0, 0.05 * best[1])
    if not fallen and last[1] > course.knn[0][1]:
        return None
    verb = f"falls from {best[1]:.1f} % (epoch {best[0]:g}) to" if fallen else "stays at"
    solved = f"{solved} while kNN top-1 {verb} {last[1]:.1f} %"
    if unshuffled:
        return f"{solved}: batch statistics leak. Switch shuffling on: --shuffle-bn"
    return (
        f"{solved}: the task is solved by something else than content, such as the "
        "age of the keys or too few of them. A quicker change of the queue (a smaller --moco-k) or "
        "a slower one of the key encoder (--moco-m) helps against the first, --aug-plus and a "
        "larger --moco-k against the second"
    )


def loader(course: Course) -> str | None:
    waiting = course.mean("data_wait")
    if not (course.enough and waiting >= WAITING):
        return None
    speed = course.mean("images_per_second")
    text = (
        f"{waiting:.0%} of the time goes into waiting for images: {speed:.0f} images/s, where "
        f"{speed / (1 - min(waiting, 0.99)):.0f} would be possible"
    )
    workers, cores = (course.flags.get(name) for name in ("workers", "cores"))
    if workers is None:
        return f"{text}. Pass more --workers, or keep the images smaller or on a faster disk"
    if workers == 0:
        return f"{text}. They are loaded between the steps: pass --workers {cores}"
    if workers < cores:
        return f"{text}. {workers} of {cores} cores load: pass --workers {cores}"
    size = round(course.flags.get("image_size", 224) * 256 / 224)
    return (
        f"{text}. All cores load: keep the images smaller (a short side of {2 * size} pixels is "
        "enough) or on a faster disk; tools/benchmark.py data-path gives the rate of a core"
    )


def free_crops(course: Course) -> str | None:
    """Small crops that were to lie within the key's crop, and do not."""
    share = course.last.get("free_crops", 0.0)
    if not share >= FREE:
        return None
    return (
        f"{share:.0%} of the small crops lie anywhere in their images: ten draws gave none with as "
        "much of it within the key's crop as --constrained asks. Pass a smaller share, or a larger "
        "--crop-min, which makes the key's crop larger"
    )


def free_pairs(course: Course) -> str | None:
    """Pairs of large crops whose IoU was to be within limits, and is not."""
    share = course.last.get("free_pairs", 0.0)
    if not share >= FREE:
        return None
    return (
        f"{share:.0%} of the pairs of large crops have an IoU outside --min-iou to --max-iou: "
        "thousands of draws gave none within. Widen the limits, or change --crop-min: smaller "
        "crops overlap less"
    )


def no_gain(course: Course) -> str | None:
    """At the end of a run: its features are no better than those that it began with."""
    end = course.flags.get("last_step", math.inf)
    if len(course.knn) < 2 or course.knn[0][0] > 0 or course.knn_at < end:
        return None
    first, last = course.knn[0][1], course.knn[-1][1]
    if last > first or last > 99:
        return None
    return (
        f"kNN top-1 ended at {last:.1f} %, where the random encoder had {first:.1f} %: nothing was "
        f"learnt that tells the classes apart. {causes(course)}"
    )


RULES: list[Callable[[Course], str | None]] = [
    nan, learning_rate, never_full, filling, rising, collapse, leak, loader, free_crops, free_pairs,
    no_gain,
]  # fmt: skip


def causes(course: Course) -> str:
    """The settings of the run that are known to do such things, else the usual suspect."""
    flags, found = course.flags, []
    if flags.get("amp", "none") == "fp16":
        found.append("--amp fp16 overflows at 65504: try --amp bf16 or none")
    if flags and rate_ratio(flags) > 1.5:
        found.append(f"{rate_words(flags)}: lower it")
    if flags.get("mechanism") == "moco" and flags["moco_m"] < 0.9:
        found.append(
            f"--moco-m {flags['moco_m']:g} changes the keys too fast (0.999 is best and 0 fails in "
            "the paper, Sec. 4.1)"
        )
    if flags.get("weight_decay", 0.0) > 0.01:
        found.append(f"--wd {flags['weight_decay']:g} is far above the papers' 0.0001")
    if flags.get("moco_t", 1.0) < 0.05:
        found.append(f"--moco-t {flags['moco_t']:g} is low (0.07 to 0.2 are usual)")
    return f"Likely: {'; '.join(found)}" if found else "Lower --lr first"


def rate_ratio(flags: dict) -> float:
    """The learning rate over that of the linear rule, 0.03 at a batch of 256; 0.3 for LARS."""
    return flags["lr"] / (linear_rule(flags) * flags["batch_size"]) if flags else 1.0


def linear_rule(flags: dict) -> float:
    return LARS_RULE if flags.get("optimizer") == "lars" else LINEAR_RULE


def rate_words(flags: dict) -> str:
    batch, ratio, rule = flags["batch_size"], rate_ratio(flags), linear_rule(flags)
    return (
        f"--lr {flags['lr']:g} is {ratio:.2g} times the {rule * batch:.2g} that the linear "
        f"rule ({rule * 256:g} at a batch of 256) gives for a batch of {batch}"
    )


def last_good(output: Path) -> Path | None:
    """The newest checkpoint of `output` whose weights are those of a network that can work.

    A step may spoil the weights whose loss, computed before it, is a number; they are then saved.
    """
    numbered = sorted(output.glob("checkpoint_[0-9]*.pth.tar"), reverse=True)
    for path in (output / checkpoints.LAST, *numbered):
        if path.exists():
            try:
                weights = checkpoints.load(path)["state_dict"].values()
            except UserError:  # damaged, or not finite
                continue
            if all((value.abs() < EXPLODED).all() for value in weights):  # never true of NaN
                return path
    return None
