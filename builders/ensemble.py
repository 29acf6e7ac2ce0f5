"""Several teachers as one: the ensemble's probability is the mean of its members'."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from builders.config import TeacherChoice
from builders.conventions import Colour
from builders.teacher import Normalisation, Teacher, load_teacher
from nrrdd_format.errors import TeacherError

JOINT = "+"
"""Stands between the architectures of an ensemble's members."""


class Ensemble(nn.Module):
    """Networks whose probabilities are averaged.

    Its logits are log p̄, p̄ the mean over the members of softmax(z): whoever takes their softmax gets p̄ back, and a
    temperature acts on them as on any network's logits.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to log p̄ (B, C) float32; kept in log space, where no probability underflows."""
        log_p = torch.stack([member(images).float().log_softmax(1) for member in self.members])
        return log_p.logsumexp(0) - math.log(len(self.members))


def load_teachers(
    choices: Sequence[TeacherChoice],
    *,
    num_classes: int,
    image_size: int,
    device: torch.device | str,
    class_names: Sequence[str],
    remedy: str | None = None,
) -> Teacher:
    """Loads a teacher, or an ensemble of several; for the arguments see `load_teacher`.

    An ensemble's architecture is `a+b`, and its sha256 the digest of the members' digests, whatever their order.

    Raises:
        TeacherError: a checkpoint cannot be used, or two members have the same weights.
        ConfigError: an architecture is unknown or does not fit.
    """
    members = [
        load_teacher(
            choice.architecture,
            choice.checkpoint,
            num_classes=num_classes,
            image_size=image_size,
            device=device,
            class_names=class_names,
            remedy=remedy,
        )
        for choice in choices
    ]
    if len(members) == 1:
        return members[0]
    by_digest = sorted(members, key=lambda member: member.sha256)  # one digest, one mean: sums depend on their order
    digests = [member.sha256 for member in by_digest]
    if len(set(digests)) < len(digests):
        raise TeacherError("two of the teachers have the same weights; name each one once")
    return Teacher(
        model=Ensemble([member.model for member in by_digest]).eval(),
        architecture=JOINT.join(member.architecture for member in members),
        num_classes=num_classes,
        sha256=hashlib.sha256("\n".join(digests).encode("ascii")).hexdigest(),
        members=tuple(members),
    )


def common_normalisation(teacher: Teacher, default: Normalisation) -> tuple[Colour, Colour]:
    """How the input of a teacher, or of every member of an ensemble, is normalised.

    `default` is the source's, for those whose file is silent.

    Raises:
        TeacherError: the members disagree: a pair is normalised once, for all of them.
    """
    members = teacher.members or (teacher,)
    found = [member.normalisation or default for member in members]
    for member, normalisation in zip(members, found, strict=True):
        if normalisation != found[0]:
            raise TeacherError(
                f"teacher {member.architecture}: its input is normalised with mean and std {normalisation}, expected "
                f"{found[0]} as of {members[0].architecture}; take teachers that were trained alike"
            )
    return found[0]
