"""The command: see the package."""

import argparse
import collections
import gc
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1"}  # a forked child has no threads but its own
SUPPORT = Path(__file__).resolve().parents[1] / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT.parents[1])]

# What the commands import, once for all children.
import moco_det.benchmark.jobs.reproduction  # noqa: E402, F401
import moco_det.benchmark.report.tables  # noqa: E402, F401
import moco_det.dataset_doctor  # noqa: E402, F401
import moco_det.native.engine.trainer  # noqa: E402, F401
import moco_det.visualize  # noqa: E402, F401
import pretrain.engine.pretraining  # noqa: E402, F401
import pretrain.evaluation.features  # noqa: E402, F401
from tests.fuzz import annotations, detection, folders, images, settings, weights  # noqa: E402
from tests.fuzz.cases import run_cases  # noqa: E402
from tests.fuzz.sandbox import FAILURES, Outcome, run_all  # noqa: E402
from tests.fuzz.subjects import Subject  # noqa: E402

# Class -> subject, and how many of its inputs to each round.
CLASSES = {
    "checkpoints": (Subject(weights.prepare_checkpoints, weights.attempt_checkpoint), 2),
    "pickles": (Subject(weights.prepare_checkpoints, weights.attempt_pickle), 4),
    "foreign": (Subject(weights.prepare_foreign, weights.attempt_foreign), 2),
    "yaml": (Subject(settings.prepare_yaml, settings.attempt_yaml), 8),
    "json": (Subject(annotations.prepare_json, annotations.attempt_json), 5),
    "xml": (Subject(detection.prepare_voc, folders.attempt_xml), 3),
    "lists": (Subject(detection.prepare_voc, folders.attempt_list), 3),
    "images": (Subject(images.prepare_images, images.attempt_image), 3),
    "runs": (Subject(settings.prepare_runs, settings.attempt_run), 4),
}
COLUMNS = {
    "traceback": "tracebacks", "crash": "crashes", "hang": "hangs", "executed": "code executed",
    "wrong": "silent wrong", "memory": "over 2 GB", "wordy": "not one line",
    "refused": "refused", "ok": "ok",
}  # fmt: skip

Key = tuple[str, int]


def prepare(classes: list[str], root: Path, jobs: int) -> dict[str, Path]:
    """The whole files of each class; subjects with one way of making them share these."""
    corpora, works = {}, {}
    for name in classes:
        make = CLASSES[name][0].prepare
        corpora[name] = root / make.__name__
        works[make] = corpora[name]

    def work(make, corpus: Path, folder: Path) -> tuple[str, str]:
        corpus.mkdir()
        make(corpus)
        return "", ""

    todo = iter([(make.__name__, partial(work, make, corpus)) for make, corpus in works.items()])
    for name, outcome in run_all(todo, root, jobs):
        if outcome.failed:
            raise RuntimeError(f"{name}: {outcome.kind} {outcome.detail} {outcome.place}")
    return corpora


def attempt(key: Key, corpus: Path, folder: Path) -> tuple[str, str]:
    name, seed = key
    rng = random.Random(f"{name}:{seed}")
    complaint = CLASSES[name][0].attempt(rng, corpus, folder)
    return (folder / "mutation").read_text(), complaint


def inputs(
    classes: list[str], first: int, corpora: dict[str, Path], seconds: float, count: int | None
) -> Iterator[tuple[Key, partial]]:
    """Inputs of all classes in turn, until time or count are used up."""
    end, seeds = time.monotonic() + seconds, {name: itertools.count(first) for name in classes}
    round_ = [name for name in classes for _ in range(CLASSES[name][1])]
    random.Random(0).shuffle(round_)
    for number, name in enumerate(itertools.cycle(round_)):
        if time.monotonic() > end or number == count:
            return
        key = name, next(seeds[name])
        yield key, partial(attempt, key, corpora[name])


def table(outcomes: dict[Key, Outcome]) -> str:
    from tabulate import tabulate

    rows = []
    for name in [*CLASSES, "all"]:
        found = [o for (of, _), o in outcomes.items() if name in (of, "all")]
        if found:
            kinds = collections.Counter(outcome.kind for outcome in found)
            peak = max(outcome.rss for outcome in found) >> 20
            rows.append([name, len(found), *(kinds[kind] for kind in COLUMNS), f"{peak} MB"])
    return tabulate(rows, ["class", "inputs", *COLUMNS.values(), "peak RSS"], "github")


def failures(outcomes: dict[Key, Outcome]) -> str:
    """Each distinct failure once: how often, what, where, and an input to see it with."""
    distinct: dict[tuple, list[tuple[Key, Outcome]]] = {}
    for key, outcome in outcomes.items():
        if outcome.failed:
            distinct.setdefault((key[0], *outcome.signature), []).append((key, outcome))
    order = [*CLASSES]
    lines = []
    for (name, kind, _, place), found in sorted(
        distinct.items(), key=lambda item: (order.index(item[0][0]), FAILURES.index(item[0][1]))
    ):
        (_, seed), outcome = found[0]
        lines.append(
            f"{len(found)} x {kind} {place or '-'}: {outcome.detail[:240]}\n"
            f"      --only {name}:{seed}  ({outcome.mutation[:140]})".replace("\0", "\\0")
        )
    return f"{len(lines)} distinct failures\n" + "\n".join(lines)


def show(outcome: Outcome) -> str:
    lines = [f"{outcome.mutation}\n{outcome.kind} {outcome.place} {outcome.detail}"]
    for step in outcome.steps:
        lines.append(
            f"--- {step.name}: exit code {step.code}\n{step.out[-4000:]}{step.err[-4000:]}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=60, help="after which no new input is begun (default 60)")
    add("--inputs", type=int, help="at most so many")
    add("--seed", type=int, default=0, help="number of the first input of each class")
    add("--class", dest="classes", action="append", choices=CLASSES, help="may be repeated")
    add("--only", metavar="CLASS:SEED", help="one input, and all that was printed")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    add("--cases", type=Path, metavar="DIR", help="instead: the cases in these folders")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fz") as name:
        root = Path(name)
        if args.cases:
            return run_cases(args.cases.resolve(), root, args.jobs)
        if args.only:
            of, _, seed = args.only.partition(":")
            corpora, key = prepare([of], root, args.jobs), (of, int(seed))
            todo = iter([(key, partial(attempt, key, corpora[of]))])
            ((_, outcome),) = run_all(todo, root, 1)
            print(show(outcome))
            return int(outcome.failed)
        classes, begun = args.classes or [*CLASSES], time.monotonic()
        gc.freeze()  # so that children copy no page only to count references
        corpora = prepare(classes, root, args.jobs)
        print(f"whole files after {time.monotonic() - begun:.0f} s", flush=True)
        begun = time.monotonic()
        todo = inputs(classes, args.seed, corpora, args.seconds, args.inputs)
        outcomes = dict(run_all(todo, root, args.jobs))
    seconds, used = time.monotonic() - begun, sum(o.seconds for o in outcomes.values())
    each = used / len(outcomes)
    print(f"{len(outcomes)} inputs in {seconds:.0f} s, {each:.2f} s of a processor each\n")
    print(table(outcomes), failures(outcomes), sep="\n\n")
    return int(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
