"""The dataset card: a README beside the shards that says what they are, how they were made and how to load them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from nrrdd_format.files import atomic_write
from nrrdd_format.limits import MAX_MANIFEST_BYTES
from nrrdd_format.manifest import Manifest
from nrrdd_format.versions import version_text

CARD_NAME = "README.md"
TEMPLATE = """\
# {name}, distilled: {ipc} images per class

{count} images of {size}×{size} pixels in {classes} classes, {made}, with {epochs} epochs of mixed pairs.
For each pair two distances to the teacher stand in for its soft label (DBR).

| | |
|---|---|
| images | {image_bytes:,} bytes, {codec} |
| pair records | {record_bytes:,} bytes, {pairs:,} pairs, {per_pair:.2f} bytes a pair |
| shards | {shards} |
| teacher | {architecture}, {top1}, weights SHA-256 `{sha256}` |
| format | nrrdd {version} |

## Load it

```python
from loaders import DBRLoader, {loss}

loader, loss_function = DBRLoader("path/to/this/folder", batch_size={batch_size}), {loss}({temperature})
for batch in loader:
    loss = loss_function(model(batch.images), batch)
```

The shards are plain tar files: any WebDataset reader yields the images; the class is the number behind `c` in the key.

## Provenance

The images were made from the training images of **{name}**. Licence of the source, as stated by whoever built this
dataset: **{license}**. Distilled images hold recognisable parts of source images, so the source's terms apply to them.

Classes: {class_names}

## How it was built

The settings that determine the content, as `build-distilled` resolved them:

```json
{method}
```

## Cite

```bibtex
@inproceedings{{nrrdd2025,
  title     = {{Enhancing Dataset Distillation via Non-Critical Region Refinement}},
  booktitle = {{IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year      = {{2025}},
  note      = {{arXiv:2503.18267}}
}}
```
"""


def dataset_card(manifest: Manifest) -> str:
    """Writes the card's Markdown from the manifest alone."""
    images, records, shards = manifest.images, manifest.records, manifest.shards
    top1, given = manifest.teacher.top1, manifest.method.get("given_images")
    pairs = records.epochs * sum(shard.pairs_per_epoch for shard in shards)
    record_bytes = sum(shard.record_bytes for shard in shards)
    return TEMPLATE.format(
        name=manifest.dataset.name,
        ipc=images.ipc,
        count=images.count,
        size=images.size,
        classes=len(manifest.dataset.class_names),
        epochs=records.epochs,
        image_bytes=sum(shard.bytes - shard.record_bytes for shard in shards),
        codec=images.codec.upper() + (f" quality {images.quality}" if images.quality is not None else ""),
        record_bytes=record_bytes,
        pairs=pairs,
        per_pair=record_bytes / pairs,
        shards=len(shards),
        architecture=manifest.teacher.architecture,
        top1="not tested on real images" if top1 is None else f"top-1 {top1:.1%} on real images",
        made="distilled with NRR-DD" if given is None else f"distilled before (method: {given['method']})",
        sha256=manifest.teacher.sha256,
        version=version_text(manifest.version),
        batch_size=min(100, images.count),
        loss="DBRLoss" if records.priors is None and records.further is None else "CompletedDBRLoss",
        temperature="" if records.temperature == 1 else f"temperature={records.temperature:g}",
        license=manifest.dataset.source_license or "not stated",
        class_names=", ".join(manifest.dataset.class_names),
        method=json.dumps(manifest.method, indent=2, sort_keys=True),
    )


def write_card(folder: Path, manifest: Manifest) -> None:
    """Writes the card into a dataset's folder. Raises OutputError."""
    with atomic_write(folder / CARD_NAME) as file:
        file.write(dataset_card(manifest).encode())


def renew_card(folder: Path, earlier: Iterable[Manifest], now: Manifest) -> bool:
    """Writes the card anew where it is the builder's for an earlier manifest; False: any other is left alone."""
    path = folder / CARD_NAME
    found = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_MANIFEST_BYTES else None
    cards = [dataset_card(manifest).encode() for manifest in earlier]
    if found not in cards or found == dataset_card(now).encode():
        return False
    write_card(folder, now)
    return True
