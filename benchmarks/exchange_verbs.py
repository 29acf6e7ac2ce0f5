"""The verbs of `nrrdd` that exchange data with other programs: `export` and `import-fkd`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import add_device, pick_device
from benchmarks.verbs import Verbs, add_dataset, add_json, add_verb
from nrrdd_format.errors import ConfigError, counted

if TYPE_CHECKING:  # each verb loads what it needs only when it runs
    from builders.import_fkd import ImportFacts

EXPORT_EPILOG = """\
examples:
  nrrdd export cifar10-ipc10 --layout imagefolder --to cifar10-ipc10-images
  nrrdd export cifar10-ipc10 --layout fkd --teacher-checkpoint cifar10-teacher.pt --to cifar10-ipc10-fkd
layouts: imagefolder  <class>/<number>.<ext>, bytes as stored, and classes.txt; for torchvision's ImageFolder
         fkd          the same in images, and soft labels in relabel/epoch_E/batch_N.tar, as FKD and SRe2L store them
A trainer of an FKD store takes the order of its images from torch's RandomSampler, so the stored pairs cannot be
kept: new ones are drawn (a crop and a flip an image, one CutMix a batch) and labelled by the dataset's own teacher.
Give the trainer the same batch size and the same sampler seed.
"""

IMPORT_EPILOG = """\
examples:
  nrrdd import-fkd relabel --images syn-images --out sre2l-ipc10 --teacher resnet18
  nrrdd import-fkd relabel --images syn-images --out cifar10-sre2l --dataset-name cifar10 --epochs 300
RELABEL_DIR holds epoch_0/batch_0.tar, …; --images the images it was made from, in class folders, all square, of one
size and one codec. They are copied byte for byte. Of the logits two distances a pair are kept.
The store does not say which images a batch shows; torch's RandomSampler with the store's seed does. With another seed
the logits have nothing to do with the images' labels, and the import is refused; so it is where there are too few
pairs to tell.
classes.txt beside the class folders may name the classes: a line for each folder, sorted: the folder, a tab, the name,
and maybe a tab and the WNID. A teacher that is not stated is "unknown", its SHA-256 64 zeros.
"""

_FKD_ONLY = ("teacher_checkpoint", "epochs", "batch_size", "sampler_seed", "view_scale", "seed", "device")


def add_exchange_verbs(verbs: Verbs) -> None:
    """Adds all verbs of this module."""
    _add_export(add_verb(verbs, "export", run_export, "write a dataset's images for other programs", EXPORT_EPILOG))
    _add_import(add_verb(verbs, "import-fkd", run_import, "make a dataset of FKD or SRe2L soft labels", IMPORT_EPILOG))


def run_export(options: argparse.Namespace) -> int:
    """`nrrdd export`."""
    if options.layout == "fkd":
        return _export_fkd(options)
    from builders.export import export_images
    from nrrdd_format.dataset import open_dataset

    for name in _FKD_ONLY:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: found with --layout imagefolder, expected with fkd only")
    with open_dataset(options.path) as dataset:
        count = export_images(dataset, options.out)
    print(f"{options.out}: {counted(count, 'image')}")
    return 0


def _export_fkd(options: argparse.Namespace) -> int:
    from benchmarks.student import load_dataset_teacher
    from builders.export import IMAGES, LABELS, FkdConfig, export_fkd
    from nrrdd_format.dataset import open_dataset

    names = ("epochs", "batch_size", "sampler_seed", "view_scale", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config, device = FkdConfig(**given), pick_device(options.device or "auto")
    with open_dataset(options.path) as dataset:
        teacher = load_dataset_teacher(dataset.manifest, options.teacher_checkpoint, device)
        written = export_fkd(dataset, teacher, options.out, config, device=device)
        count = dataset.manifest.images.count
    print(
        f"{options.out}: {counted(count, 'image')} in {IMAGES}, {written:,} bytes of soft labels for "
        f"{counted(config.epochs, 'epoch')} in "
        f"{LABELS}; train with batch size {config.batch_size} and sampler seed {config.sampler_seed}"
    )
    return 0


def run_import(options: argparse.Namespace) -> int:
    """`nrrdd import-fkd`."""
    from builders.import_fkd import ImportConfig, import_fkd

    given: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in fields(ImportConfig)
        if getattr(options, field.name) is not None
    }
    for name in {"mean", "std"} & given.keys():
        given[name] = tuple(given[name])
    facts = import_fkd(ImportConfig(**given))
    if options.json:
        print(json.dumps(asdict(facts) | {"ratio": facts.ratio}, indent=2))
    else:
        print(_sentence(options.out, facts))
    return 0


def _sentence(out: Path, facts: ImportFacts) -> str:
    return (
        f"{out}: {facts.images} images, {counted(facts.epochs, 'epoch')}, {facts.pairs} pairs; "
        f"the highest logit is at one of the pair's classes in {facts.agreement:.1%}, by chance {facts.chance:.1%}: "
        f"a wrong order of images comes to that with a probability below {max(facts.doubt, 1e-9):.1g}\n"
        f"labels: {facts.label_bytes:,} bytes, {facts.label_bytes / facts.pairs:.2f} a pair; the store: "
        f"{facts.store_bytes:,} bytes, {facts.store_bytes / facts.pairs:.2f} a pair, {facts.ratio:.1f} times as many"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--layout", choices=("imagefolder", "fkd"), required=True, help="what to write")
    parser.add_argument(
        "--to", "--out", dest="out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    group = parser.add_argument_group("fkd only")
    group.add_argument("--teacher-checkpoint", nargs="+", type=Path, metavar="FILE", help="the dataset's own teacher")
    group.add_argument("--epochs", type=int, metavar="N", help="epochs of soft labels (300)")
    group.add_argument("--batch-size", type=int, metavar="N", help="pairs a file (100)")
    group.add_argument("--sampler-seed", type=int, metavar="N", help="of the order of the images (42)")
    group.add_argument("--view-scale", type=float, metavar="X", help="smallest share of the area a view shows (0.08)")
    group.add_argument("--seed", type=int, metavar="N", help="of views, flips and mixes (0)")
    add_device(parser)
    parser.set_defaults(device=None)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="RELABEL_DIR", help="the folder that holds epoch_0, epoch_1, …")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="the store's images in class folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
    parser.add_argument("--sampler-seed", type=int, metavar="N", help="of the store's order of images (42, as SRe2L's)")
    parser.add_argument("--epochs", type=int, metavar="N", help="take only the first N epochs")
    parser.add_argument("--min-agreement", type=float, metavar="X", help="accept pairs from this agreement on, 0 to 1")
    parser.add_argument("--distance-levels", type=int, metavar="N", help="size of the codebook of distances")
    group = parser.add_argument_group("facts for the manifest")
    group.add_argument("--dataset-name", metavar="NAME", help="the source dataset (imagefolder)")
    group.add_argument("--source-license", metavar="TEXT", help="the licence of the source")
    for name in ("mean", "std"):
        text = f"{name} by channel that the teacher's input was normalised with (the named dataset's, or ImageNet's)"
        group.add_argument(f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help=text)
    group.add_argument("--temperature", type=float, metavar="T", help="of the softmax behind the distances (1)")
    group.add_argument("--teacher", metavar="ARCH", help="the network that made the logits (unknown)")
    group.add_argument("--teacher-sha256", metavar="HEX", help="of its weights (64 zeros: not stated)")
    group.add_argument("--teacher-top1", type=float, metavar="X", help="its accuracy on real images, 0 to 1")
    add_json(parser)
