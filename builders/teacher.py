"""Teacher networks: checkpoints, and the check on real images before hours are spent on a build."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises when it refuses a file
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from builders.conventions import Colour
from builders.image_sets import ImageSet
from builders.models import IMAGENET_CLASSES, create_model
from builders.reading import Skipped, read_batches
from builders.timm_models import PREFIX, timm_normalisation
from nrrdd_format import draws
from nrrdd_format.errors import TeacherError
from nrrdd_format.files import atomic_write
from nrrdd_format.replay import normalize

PREFLIGHT_IMAGES = 1000
TEST_BATCH = 64
_SAVE_PLAIN = "save the weights alone, with torch.save(model.state_dict(), path)"


Normalisation = tuple[Colour, Colour]
"""Mean and standard deviation by channel."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network in eval mode whose weights need no gradient.

    `sha256` is `state_dict_sha256` of its weights, or of an ensemble what `load_teachers` makes of its members'.
    """

    model: nn.Module
    architecture: str
    num_classes: int
    sha256: str
    normalisation: Normalisation | None = None
    """Mean and standard deviation of its training's input, of a pixel's value / 255; None where its file is silent and
    timm does not say."""
    members: tuple[Teacher, ...] = ()
    """Of an ensemble."""

    @property
    def first(self) -> Teacher:
        """The one that images are made with."""
        return self.members[0] if self.members else self


def state_dict_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    It identifies the weights whatever file, device or memory format they come from.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: Path,
    model: nn.Module,
    architecture: str,
    class_names: Sequence[str],
    normalisation: Normalisation | None = None,
) -> None:
    """Writes a teacher as one file that `load_teacher` and `torch.load(weights_only=True)` read.

    `normalisation` is what its input was normalised with in training: a build from the same images under another
    name (an `imagefolder` of CIFAR-10, say) then shows it what it knows.

    Raises:
        OutputError: the file cannot be written; an older one at `path` stays as it was.
    """
    weights = model.state_dict()
    for name, tensor in weights.items():  # in place: a new dictionary would lose the modules' version numbers
        weights[name] = tensor.detach().cpu().contiguous()
    content: dict[str, Any] = {
        "architecture": architecture,
        "class_names": list(class_names),
        "state_dict": weights,
    }
    if normalisation is not None:
        content |= {"mean": list(normalisation[0]), "std": list(normalisation[1])}
    with atomic_write(path) as file:
        torch.save(content, file)


def load_weights_only(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a file of `torch.save` that holds a dictionary of tensors and plain values; runs no code from it.

    `remedy` says in the error's message what to do.

    Raises:
        TeacherError: the file is missing, damaged, or holds other objects.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise TeacherError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TeacherError(f"{path}: damaged, or no file that torch.load(weights_only=True) reads; {remedy}") from error
    if not isinstance(content, dict):
        raise TeacherError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors; {remedy}")
    return content


def measure_top1(
    model: nn.Module,
    images: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str,
    limit: int | None = None,
    on_skipped: Callable[[Skipped], object] = lambda skipped: None,
) -> float:
    """Share of the usable images whose label has the highest logit; for the arguments see `predict`.

    Raises:
        TeacherError: there is no usable image.
    """
    labels, predicted = predict(model, images, mean, std, device=device, limit=limit, on_skipped=on_skipped)
    return float((labels == predicted).mean())


@torch.no_grad()
def predict(
    model: nn.Module,
    images: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str,
    limit: int | None = None,
    on_skipped: Callable[[Skipped], object] = lambda skipped: None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels of the usable images, and the classes with the highest logit. Leaves the model in the mode it was in.

    Args:
        model: a classifier on `device`.
        images: labelled images.
        mean, std: of a pixel's value / 255, one per channel.
        device: where to compute.
        limit: test only this many images, drawn over the whole set.
        on_skipped: told which images of a batch are unusable.

    Raises:
        TeacherError: there is no usable image.
    """
    order = draws.permutation(0, "top1-images", count=len(images))[:limit]
    was_training = model.training
    model.eval()
    known, predicted = [], []
    for pixels, labels, skipped in read_batches(images, _split(np.sort(order), TEST_BATCH)):
        on_skipped(skipped)
        if len(labels):
            logits = model(normalize(pixels.to(device), mean, std))
            predicted.append(logits.argmax(1).cpu().numpy())
            known.append(labels.numpy())
    model.train(was_training)
    if not known:
        raise TeacherError("no usable image to test the network on; give a folder of test images with --test-dir")
    return np.concatenate(known), np.concatenate(predicted)


def _split(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.array_split(order, max(1, math.ceil(len(order) / size)))


def preflight(
    teacher: Teacher,
    images: ImageSet,
    *,
    which: str = "real images",
    mean: Sequence[float],
    std: Sequence[float],
    minimum: float | None = None,
    device: torch.device | str,
) -> float:
    """Tests a teacher on up to 1000 images; returns its top-1 share.

    Args:
        teacher: the teacher, on `device`.
        images: labelled images: real ones, best held out from its training, or those to be labelled.
        which: what the message calls them.
        mean, std: of a pixel's value / 255, one per channel.
        minimum: the smallest share that is accepted. Default: min(0.6, 20 / number of classes).
        device: where to compute.

    Raises:
        TeacherError: the share is below `minimum`, or no image is usable.
    """
    floor = min(0.6, 20 / teacher.num_classes) if minimum is None else minimum
    top1 = measure_top1(teacher.model, images, mean, std, device=device, limit=PREFLIGHT_IMAGES)
    if top1 < floor:
        raise TeacherError(
            f"teacher {teacher.architecture}: top-1 {top1:.1%} on {which}, expected {floor:.1%} or more; "
            "the usual cause is that its classes stand in another order than theirs; "
            "check that order, or accept the teacher as it is with --min-teacher-top1"
        )
    return top1


def mixed_up_classes(labels: NDArray[np.int64], predicted: NDArray[np.int64], least: int = 4) -> dict[int, int]:
    """Classes whose images seem to lie in each other's folders, and which class each one shows.

    Most images of such a class, of at least `least`, are predicted as one other class, whose own are mistaken too.
    """
    shown = {}
    for label in np.unique(labels).tolist():
        counts = np.bincount(predicted[labels == label])
        if counts.sum() >= least and counts.argmax() != label and 2 * counts.max() > counts.sum():
            shown[label] = int(counts.argmax())
    return {label: other for label, other in shown.items() if other in shown}


def load_teacher(
    architecture: str | None,
    checkpoint: Path | None,
    *,
    num_classes: int,
    image_size: int,
    device: torch.device | str,
    class_names: Sequence[str],
    remedy: str | None = None,
) -> Teacher:
    """Loads a teacher, in eval mode and without gradients, channels last, on `device`.

    Args:
        architecture: see `builders.models.create_model`; may be None where the checkpoint names it, or with no
            checkpoint at 1000 classes (then torchvision's pretrained resnet18).
        checkpoint: a file by `save_checkpoint`, or a plain state dict; None: weights of torchvision or timm.
        num_classes: classes of the source.
        image_size: side of the images in pixels.
        device: where the teacher will run.
        class_names: the source's classes in order. A checkpoint with other names, or another order, is refused.
        remedy: what to do about a checkpoint that does not fit; None: change the options of a build.

    Raises:
        TeacherError: the checkpoint cannot be read or does not fit, or pretrained weights cannot be downloaded.
        ConfigError: the architecture is unknown or does not fit.
    """
    stated = None
    if checkpoint is None:
        architecture = architecture or _default_architecture(num_classes)
        model = create_model(architecture, num_classes, image_size, pretrained=True)
    else:
        content = load_weights_only(checkpoint, _SAVE_PLAIN)
        architecture = _named_architecture(content, architecture, checkpoint, remedy)
        _check_class_names(content, class_names, checkpoint, remedy)
        model = create_model(architecture, num_classes, image_size)
        wanted = f"{architecture} for {num_classes} classes and images of {image_size} px"
        _load_weights(model, content, wanted, checkpoint, remedy)
        stated = _named_normalisation(content, checkpoint)
    model = model.eval().requires_grad_(False)
    return Teacher(
        model=model.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        architecture=architecture,
        num_classes=num_classes,
        sha256=state_dict_sha256(model.state_dict()),
        normalisation=stated or _timms_normalisation(architecture, num_classes),
    )


def _timms_normalisation(architecture: str, num_classes: int) -> Normalisation | None:
    """What timm's own weights expect: a plain state dict of so many classes is taken for them."""
    return timm_normalisation(architecture, num_classes) if architecture.startswith(PREFIX) else None


def _named_normalisation(content: Mapping[str, Any], path: Path) -> Normalisation | None:
    """What the checkpoint says its input is normalised with."""
    if "mean" not in content and "std" not in content:
        return None
    return _colour(content, "mean", -10, path), _colour(content, "std", 1e-6, path)


def _colour(content: Mapping[str, Any], key: str, low: float, path: Path) -> Colour:
    found = content.get(key)
    sound = isinstance(found, list) and len(found) == 3 and all(type(v) is float and low <= v <= 10 for v in found)
    if not isinstance(found, list) or not sound:
        raise TeacherError(f"{path}: {key} is {str(found)[:60]}, expected three numbers from {low} to 10")
    return found[0], found[1], found[2]


def _default_architecture(num_classes: int) -> str:
    if num_classes == IMAGENET_CLASSES:
        return "resnet18"
    raise TeacherError(
        f"no teacher for {num_classes} classes; train one with `nrrdd teacher` and give it with --teacher-checkpoint"
    )


def _named_architecture(content: Mapping[str, Any], wanted: str | None, path: Path, remedy: str | None) -> str:
    """The architecture that the checkpoint or the user names; both must agree."""
    named = content.get("architecture")
    if not isinstance(named, str):
        if wanted is None:
            raise TeacherError(f"{path}: does not name its architecture; say it with --teacher")
        return wanted
    if wanted not in (None, named):
        remedy = remedy or "leave out --teacher or give its checkpoint"
        raise TeacherError(f"{path}: holds a {named}, expected {wanted}; {remedy}")
    return named


def _check_class_names(content: Mapping[str, Any], expected: Sequence[str], path: Path, remedy: str | None) -> None:
    found = content.get("class_names")
    if found is None:  # a plain state dict; the preflight must do
        return
    if not isinstance(found, list) or len(found) != len(expected):
        count = len(found) if isinstance(found, list) else "unreadable"
        raise TeacherError(
            f"{path}: teacher of {count} classes, expected {len(expected)}; {remedy or 'train one on this source'}"
        )
    for number, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        if theirs != ours:
            raise TeacherError(
                f"{path}: class {number} of the teacher is {theirs!r}, expected {ours!r}; "
                f"{remedy or 'train a teacher on this source, or bring its classes into the same order'}"
            )


def _load_weights(model: nn.Module, content: dict[str, Any], wanted: str, path: Path, remedy: str | None) -> None:
    """Loads a checkpoint's weights into `model`, after checking that names, shapes and values are sound."""
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        raise TeacherError(f"{path}: holds no state dict, which has tensors by name; {_SAVE_PLAIN}")
    expected = model.state_dict()
    _rename(weights)
    for name in [name for name in weights if name not in expected and _AUXILIARY.match(name)]:
        del weights[name]
    fault = _first_fault(weights, expected)
    if fault:
        remedy = remedy or "give one trained for these, or check --teacher and (where the source takes it) --size"
        raise TeacherError(f"{path}: not the weights of a {wanted}: {fault}; {remedy}")
    model.load_state_dict(weights)


_AUXILIARY = re.compile(r"aux1\.|aux2\.|AuxLogits\.")
"""Training-only heads in torchvision's files for googlenet and inception_v3."""
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")
"""Names in torchvision's files for densenet, from before module names could not hold a dot."""


def _rename(weights: dict[str, Tensor]) -> None:
    """Gives torchvision's and DistributedDataParallel's names the form that the model has, in place.

    In place, since a state dict carries version numbers that a new dictionary would lose.
    """
    for name in list(weights):
        weights[_OLD_DENSENET.sub(r"\1\2.", name.removeprefix("module."))] = weights.pop(name)


def _first_fault(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first way in which the weights do not fit, in words."""
    for name in expected:
        if name not in found:
            return f"{name} is missing"
        if found[name].shape != expected[name].shape:
            return f"{name} has shape {list(found[name].shape)}, expected {list(expected[name].shape)}"
        if not bool(found[name].isfinite().all()):
            return f"{name} holds values that are not finite"
    return next((f"{name} is not part of it" for name in found if name not in expected), None)
