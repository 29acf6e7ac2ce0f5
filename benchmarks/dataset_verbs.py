"""The verbs of `nrrdd` for people who hold a dataset: look into it, check it, repair it, and group its shards anew."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import add_device, local_folder, pick_device, whole
from benchmarks.verbs import Verbs, add_dataset, add_json, add_verb
from nrrdd_format.errors import ConfigError, counted

if TYPE_CHECKING:  # each verb loads what it needs only when it runs
    from builders.drift import Drift
    from nrrdd_format.manifest import Manifest
    from nrrdd_format.repair import Repair

INSPECT_EPILOG = """\
examples:
  nrrdd inspect digits-ipc10
  nrrdd inspect digits-ipc10 --record 0:12:3    shard 0, epoch 12, pair 3
  nrrdd inspect digits-ipc10 --json             every class and every epoch; reads every record
The table of epochs has the number of pairs, the mean of lam, the shares of CutMix pairs and of pairs within one
class, and of both distances (org, aug; in nats) the mean and quantiles.
"""

VERIFY_EPILOG = """\
examples:
  nrrdd verify digits-ipc10 && echo sound
  nrrdd verify digits-ipc10 --teacher-checkpoint digits-teacher.pt    also computes distances anew
Checks the manifest, every shard's hash, every member and every record, and prints each problem on a line.
With the dataset's own teacher, both distances of a sample of pairs are computed anew, through the same replay as
in training. Each should round to the level that is stored. Another device moves a distance d by up to about 5% of
d + 0.1 nats; where more than 1% of them lie further from where they would round to their level, they are not this
teacher's distances of these images.
Exit status: 0 without problems, 1 with, 2 when the command itself is wrong.
"""

REPAIR_EPILOG = """\
examples:
  nrrdd repair digits-ipc10 --dry-run                       say what is bad and what would be lost
  nrrdd repair digits-ipc10 --from elsewhere/digits-ipc10    replace bad shards from another copy
  nrrdd repair digits-ipc10                                  list the dataset anew without its bad shards
A shard is bad if `nrrdd verify` finds any problem in it. With --from, it is replaced by the other copy's, if that is
the file the manifest names, and nothing is dropped; a damaged dataset.json comes from there, too. Without --from, bad
shards are dropped from dataset.json: each shard is complete in itself, so the others stay as good as they are.
No file is lost: a damaged shard-00003.tar is set aside as shard-00003.tar.damaged, and where shards are dropped the old
dataset.json is kept as dataset.json.before. The builder's README.md is written anew then; your own is left alone.
Exit status: 0 when the dataset is sound now, 1 when it is not (a dry run, or the other copy is damaged as well), 2
when the command itself is wrong or nothing would be left.
"""

SPLIT_EPILOG = """\
examples:
  nrrdd split digits-ipc10 --out part-a part-b
  nrrdd split imagenet-ipc50 --out part-{0..9}    ten parts; the shell writes the names out
Each part is a dataset of neighbouring shards, copied byte for byte, in as equal numbers as whole shards allow.
`nrrdd merge` of all parts gives the same dataset.json and shards. Other files in the folder are not copied.
"""

MERGE_EPILOG = """\
example:
  nrrdd merge part-a part-b --out digits-ipc10
The parts' manifests must agree in everything but their shards, and no shard number and no image number may occur twice.
Shards are copied byte for byte.
"""

RESHARD_EPILOG = """\
example:
  nrrdd reshard imagenet-ipc50 --images 5000 --out imagenet-ipc50-large
Joins neighbouring shards to about that many images each, with the same images and the same pairs in the same order.
Derived records become explicit ones. Where the sizes of the shards are no multiples of the records' cycle and mix
group, explicit coding cannot express the joined pairs: all are then stored verbatim, which takes more bytes. Both
figures are printed.
"""


def add_dataset_verbs(verbs: Verbs) -> None:
    """Adds all verbs of this module."""
    _add_inspect(add_verb(verbs, "inspect", run_inspect, "say what is in a dataset", INSPECT_EPILOG))
    _add_verify(add_verb(verbs, "verify", run_verify, "find every damage in a dataset", VERIFY_EPILOG))
    _add_repair(add_verb(verbs, "repair", run_repair, "replace or drop a dataset's bad shards", REPAIR_EPILOG))
    _add_split(add_verb(verbs, "split", run_split, "split a dataset into parts at shard boundaries", SPLIT_EPILOG))
    _add_merge(add_verb(verbs, "merge", run_merge, "merge the parts of a dataset", MERGE_EPILOG))
    _add_reshard(add_verb(verbs, "reshard", run_reshard, "join a dataset's shards into larger ones", RESHARD_EPILOG))


def run_inspect(options: argparse.Namespace) -> int:
    """`nrrdd inspect`."""
    from nrrdd_format.inspect import SHOWN_EPOCHS, describe, render

    facts = describe(options.path, record=options.record, epochs=None if options.json else SHOWN_EPOCHS)
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """`nrrdd verify`."""
    from nrrdd_format.verify import find_problems

    _check_drift_options(options)
    _check_is_dataset(options.path)
    problems = []
    for problem in find_problems(options.path):
        problems.append(problem)
        if not options.json:
            print(problem, flush=True)
    drift = _drift(options) if options.teacher_checkpoint is not None and not problems else None
    sound = not problems and (drift is None or drift.explained)
    if options.json:
        found = {"sound": sound, "problems": [asdict(problem) for problem in problems]}
        _print_json(found | {"drift": None if drift is None else drift.to_json()})
    else:
        _print_verdict(options, len(problems), drift)
    return 0 if sound else 1


def run_repair(options: argparse.Namespace) -> int:
    """`nrrdd repair`."""
    from nrrdd_format.repair import repair_dataset

    repair = repair_dataset(options.path, copy=options.copy, dry_run=options.dry_run)
    sound = not repair.left and not (options.dry_run and (repair.bad or repair.manifest_fault))
    card = _renew_card(options, repair)
    if options.json:
        _print_json({"sound": sound, "dry_run": options.dry_run, **_repair_facts(repair), "card_renewed": card})
    else:
        print("\n".join(_repair_lines(options, repair, card)))
    return 0 if sound else 1


def run_split(options: argparse.Namespace) -> int:
    """`nrrdd split`."""
    from nrrdd_format.regroup import split_dataset

    parts = split_dataset(options.path, options.out)
    facts = [_facts(out, part) for out, part in zip(options.out, parts, strict=True)]
    if options.json:
        _print_json(facts)
    else:
        print("\n".join(map(_sentence, facts)))
    return 0


def run_merge(options: argparse.Namespace) -> int:
    """`nrrdd merge`."""
    from nrrdd_format.regroup import merge_datasets

    facts = _facts(options.out, merge_datasets(options.paths, options.out))
    if options.json:
        _print_json(facts)
    else:
        print(_sentence(facts))
    return 0


def run_reshard(options: argparse.Namespace) -> int:
    """`nrrdd reshard`."""
    from nrrdd_format.reshard import reshard_dataset

    reshard = reshard_dataset(options.path, options.images, options.out)
    before, after = _facts(options.path, reshard.before), _facts(options.out, reshard.after)
    if options.json:
        _print_json({"before": before, "after": after})
        return 0
    print(_sentence(after))
    print(f"shards: {after['shards']}, before {before['shards']}")
    print(f"records: {_coding(after)}, before {_coding(before)}")
    if after["coding"] == "verbatim" != before["coding"]:
        print(
            f"stored verbatim, since the shards' sizes are no multiples of cycle {before['cycle']} and mix group "
            f"{before['mix_group']}, or too large for explicit records"
        )
    return 0


def _check_is_dataset(path: Path) -> None:
    """Refuses a path where no part of a dataset lies; one that lost its manifest is a damaged dataset."""
    from nrrdd_format.manifest import manifest_path

    file = manifest_path(path)
    if not os.path.isdir(file.parent):  # which, unlike Path's own, takes any name
        raise ConfigError(f"{path}: no such folder, expected a dataset's")
    if not file.exists() and not any(file.parent.glob("shard-*.tar")):
        raise ConfigError(f"{path}: holds neither {file.name} nor a shard, expected a dataset's folder")


def _check_drift_options(options: argparse.Namespace) -> None:
    if options.teacher_checkpoint is None:
        for name in ("sample", "seed", "device"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name}: found without --teacher-checkpoint, expected with it")


def _drift(options: argparse.Namespace) -> Drift:
    from benchmarks.student import load_dataset_teacher
    from builders.drift import measure_drift
    from nrrdd_format.dataset import open_dataset

    device = pick_device(options.device or "auto")
    with open_dataset(options.path) as dataset:
        teacher = load_dataset_teacher(dataset.manifest, options.teacher_checkpoint, device)
        return measure_drift(
            dataset,
            teacher,
            sample=1000 if options.sample is None else options.sample,
            seed=options.seed or 0,
            device=device,
        )


def _print_verdict(options: argparse.Namespace, problems: int, drift: Drift | None) -> None:
    if problems:
        print(f"{options.path}: {counted(problems, 'problem')}; see nrrdd repair --help")
        if options.teacher_checkpoint is not None:
            print(f"{options.path}: distances were not computed anew, since the dataset is damaged")
        return
    if drift is not None:
        print(
            f"distances of {drift.pairs} pairs computed anew: |difference| {drift.mean_nats:.3g} nats on average, "
            f"{drift.max_nats:.3g} at most; on another level {drift.other_level_share:.2%}, more than one level away "
            f"{drift.far_share:.2%}, unexplained by rounding and device {drift.unexplained_share:.2%}"
        )
        if not drift.explained:
            print(
                f"{options.path}: these are not the teacher's distances: {drift.unexplained_share:.2%} unexplained, "
                "expected at most 1%; the images, the replay or the records are not those that were labelled"
            )
            return
    print(f"{options.path}: no problems")


def _renew_card(options: argparse.Namespace, repair: Repair) -> bool:
    """Whether the card was written anew: it spoke of shards that are dropped, now or by a repair that was killed."""
    from builders.card import renew_card
    from nrrdd_format.manifest import manifest_path
    from nrrdd_format.repair import earlier_manifests

    if options.dry_run:
        return False
    file = manifest_path(options.path)
    return renew_card(file.parent, earlier_manifests(file), repair.manifest)


def _repair_facts(repair: Repair) -> dict[str, Any]:
    m = repair.manifest
    return {
        "manifest_fault": repair.manifest_fault,
        "bad": [asdict(one) for one in repair.bad],
        "fetched": repair.fetched,
        "dropped": repair.dropped,
        "left": [one.name for one in repair.left],
        "set_aside": repair.set_aside,
        "old_manifest": repair.old_manifest,
        "thinned": [asdict(one) for one in repair.thinned],
        "shards": len(m.shards),
        "images": m.images.count,
        "dataset_id": m.dataset_id,
    }


def _repair_lines(options: argparse.Namespace, repair: Repair, card_renewed: bool) -> Iterator[str]:
    would = "would be " if options.dry_run else ""
    if repair.manifest_fault is not None:
        yield repair.manifest_fault
        yield f"dataset.json: {would}taken from {options.copy}"
    for one in repair.bad:
        yield f"{one.name}: {counted(len(one.problems), 'problem')}, first: {one.problems[0]}"
        if one.name in repair.fetched:
            yield f"{one.name}: {would}fetched from {options.copy}"
        elif one.name in repair.dropped:
            yield f"{one.name}: {would}dropped, with {counted(one.images, 'image')} and {counted(one.pairs, 'pair')}"
        else:
            yield f"{one.name}: left as it is, since {options.copy} has no sound copy of it: {one.fault_of_copy}"
    for name in repair.set_aside:
        yield f"the damaged file is kept as {name}"
    if repair.old_manifest is not None:
        card = "written anew" if card_renewed else "left as it is, since it is not the builder's for this dataset"
        yield f"the dataset.json before is kept as {repair.old_manifest}; README.md: {card}"
    elif card_renewed:
        yield "README.md: written anew, since it was of an earlier dataset.json"
    yield from _loss_lines(repair)
    yield _outcome(options, repair)


def _loss_lines(repair: Repair) -> Iterator[str]:
    lost = [one for one in repair.bad if one.name in repair.dropped]
    if lost:
        rest, images, pairs = repair.manifest, sum(one.images for one in lost), sum(one.pairs for one in lost)
        yield (
            f"lost: {len(lost)} of {len(lost) + len(rest.shards)} shards, "
            f"{images} of {images + rest.images.count} images, {pairs} of {pairs + _pairs(rest)} pairs"
        )
    for one in repair.thinned:
        yield f"class {one.label} {one.name!r}: {one.images} of about {one.before:.0f} images left"


def _outcome(options: argparse.Namespace, repair: Repair) -> str:
    if not repair.bad and repair.manifest_fault is None:
        return f"{options.path}: no problems, nothing to do"
    if repair.left:
        left = counted(len(repair.left), "shard is", "shards are")
        return f"{options.path}: {left} still bad; name yet another copy, or leave out --from to drop them"
    if options.dry_run:
        return f"{options.path}: nothing was changed (--dry-run)"
    return f"{options.path}: sound now, dataset id {repair.manifest.dataset_id}"


def _facts(path: Path, manifest: Manifest) -> dict[str, Any]:
    pairs, record_bytes = _pairs(manifest), sum(entry.record_bytes for entry in manifest.shards)
    return {
        "path": str(path),
        "dataset_id": manifest.dataset_id,
        "shards": len(manifest.shards),
        "images": manifest.images.count,
        "pairs": pairs,
        "coding": manifest.records.coding,
        "cycle": manifest.records.cycle,
        "mix_group": manifest.records.mix_group,
        "record_bytes": record_bytes,
        "record_bytes_per_pair": round(record_bytes / pairs, 3),
    }


def _pairs(manifest: Manifest) -> int:
    return manifest.records.epochs * sum(entry.pairs_per_epoch for entry in manifest.shards)


def _sentence(facts: dict[str, Any]) -> str:
    amounts = ", ".join(counted(facts[f"{name}s"], name) for name in ("shard", "image", "pair"))
    return f"{facts['path']}: {amounts}; dataset id {facts['dataset_id']}"


def _coding(facts: dict[str, Any]) -> str:
    return "{coding}, {record_bytes_per_pair} bytes a pair".format_map(facts)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--record", type=_record, metavar="SHARD:EPOCH:PAIR", help="show one pair's record")
    add_json(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument(
        "--teacher-checkpoint",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="the dataset's teacher: compute distances anew with it",
    )
    parser.add_argument("--sample", type=whole(1), metavar="N", help="pairs to compute anew, over all shards (1000)")
    parser.add_argument("--seed", type=whole(0), metavar="N", help="of the choice of pairs (0)")
    add_device(parser)
    parser.set_defaults(device=None)
    add_json(parser)


def _add_repair(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument(
        "--from", dest="copy", type=local_folder, metavar="DIR", help="another copy of the same dataset"
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, say what would be done")
    add_json(parser)


def _add_split(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--out", type=Path, nargs="+", required=True, metavar="DIR", help="a new folder for each part")
    add_json(parser)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=local_folder, nargs="+", metavar="DATASET", help="the parts' folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
    add_json(parser)


def _add_reshard(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--images", type=int, required=True, metavar="N", help="images aimed at in a shard")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
    add_json(parser)


def _record(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected SHARD:EPOCH:PAIR, such as 0:12:3")
    return int(match[1]), int(match[2]), int(match[3])
