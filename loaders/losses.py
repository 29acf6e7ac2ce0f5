"""Losses of a student on mixed pairs: DBR (the paper, Eq. 8 to 11), and other label kinds on the same images.

Everything is computed in float32 at least, whatever the logits' type. Where both images of a pair have the
same class, y_i = y_j, there is one probability and one distance, and it counts once.

Shapes: B pairs, C classes. Distances are -log p, in nats.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loaders.batch import ClassDistances, DBRBatch
from nrrdd_format.errors import ConfigError, require

LEAST, LEAST_IN_ALL = 1e-4, 1e-2
"""Floor of a class's share, and of all classes' together: many classes would fill the label otherwise."""

Sce = Literal["sample", "batch", "target", "entropy"]
Distance = Literal["l1", "huber", "squared"]


class DBRLoss(nn.Module):
    """alpha_sce * L_sce + alpha_dbr * L_dbr: bounded cross-entropy plus error of the distances (Eq. 9).

    L_sce is the cross-entropy CE to the mixed one-hot labels, without effect once it is as small as `radius`.
    L_dbr is the mean of |d_org(S) - d_org| + |d_aug(S) - d_aug|, d(S) the student's own distances (Eq. 10).

    Args:
        alpha_sce, alpha_dbr: weights of the two parts.
        radius: r, in nats.
        sce: "sample": mean of max(0, CE - r); "batch": max(0, mean CE - r); "target": CE to labels cut at
            max(1 - r, 1 / C), what is cut spread evenly over the classes below; "entropy": mean of
            max(0, CE - H(lam) - r), H(lam) being the least value CE can have.
        distance: "l1": |x|; "huber": quadratic up to 1 nat, then linear; "squared": x**2.
        temperature: softmax temperature of the student's distances; must be the teacher's
            (`DBRLoader.dataset_info.temperature`).

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        alpha_sce: float = 1.0,
        alpha_dbr: float = 1.0,
        radius: float = 0.4,
        sce: Sce = "sample",
        distance: Distance = "l1",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        require(alpha_sce >= 0, f"alpha_sce: found {alpha_sce}, expected 0 or more")
        require(alpha_dbr >= 0, f"alpha_dbr: found {alpha_dbr}, expected 0 or more")
        require(radius >= 0, f"radius: found {radius}, expected 0 or more")
        require(sce in get_args(Sce), f"sce: found {sce!r}, expected one of {', '.join(get_args(Sce))}")
        require(sce != "target" or radius < 1, f"radius: found {radius}, expected less than 1 with sce='target'")
        require(
            distance in get_args(Distance),
            f"distance: found {distance!r}, expected one of {', '.join(get_args(Distance))}",
        )
        require(temperature > 0, f"temperature: found {temperature}, expected more than 0")
        self.alpha_sce = alpha_sce
        self.alpha_dbr = alpha_dbr
        self.radius = radius
        self.sce: Sce = sce
        self.distance: Distance = distance
        self.temperature = temperature

    def forward(self, logits: Tensor, batch: DBRBatch) -> Tensor:
        """The loss of logits (B, C): a float32 scalar."""
        return self.terms(logits, batch)["loss"]

    def terms(self, logits: Tensor, batch: DBRBatch) -> dict[str, Tensor]:
        """The loss and its parts, float32 scalars.

        Returns:
            `loss`, `sce`, `dbr`, and `clipped_share`: the share of pairs that L_sce leaves alone (with
            "target": whose labels are cut).
        """
        _check_sizes(logits, batch)
        sce, clipped = self._bounded_cross_entropy(logits, batch)
        dbr = _own_error(_log_softmax(logits, self.temperature), batch, self.distance).mean()
        return {
            "loss": self.alpha_sce * sce + self.alpha_dbr * dbr,
            "sce": sce,
            "dbr": dbr,
            "clipped_share": clipped.float().mean(),
        }

    def _bounded_cross_entropy(self, logits: Tensor, batch: DBRBatch) -> tuple[Tensor, Tensor]:
        """L_sce, and which pairs are clipped: (B,) or one for all."""
        log_p = _log_softmax(logits)
        if self.sce == "target":
            labels = _mixed_labels(batch, logits.shape[1])
            cap = max(1 - self.radius, 1 / logits.shape[1])  # a lower one would cut both of two classes
            capped = labels > cap
            return _soft_cross_entropy(log_p, _spread_excess(labels, capped, cap)), capped.any(1)
        cross_entropy = _mixed_cross_entropy(log_p, batch)
        if self.sce == "batch":
            cross_entropy = cross_entropy.mean()
        if self.sce == "entropy":
            cross_entropy = cross_entropy - _label_entropy(batch)
        excess = cross_entropy - self.radius
        return excess.clamp_min(0).mean(), excess <= 0


class OneHotLoss(nn.Module):
    """Cross-entropy to lam * y_i + (1 - lam) * y_j: nothing from the teacher."""

    def forward(self, logits: Tensor, batch: DBRBatch) -> Tensor:
        """The loss of logits (B, C): a float32 scalar."""
        _check_sizes(logits, batch)
        return _mixed_cross_entropy(_log_softmax(logits), batch).mean()


class CompactLoss(nn.Module):
    """Cross-entropy to the teacher's probabilities of the two classes, scaled to sum to one.

    That is softmax(-d_org, -d_aug): a distribution even where quantised distances give p_i + p_j > 1.

    Args:
        temperature: softmax temperature of the student; must be the teacher's
            (`DBRLoader.dataset_info.temperature`).
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        require(temperature > 0, f"temperature: found {temperature}, expected more than 0")
        self.temperature = temperature

    def forward(self, logits: Tensor, batch: DBRBatch) -> Tensor:
        """The loss of logits (B, C): a float32 scalar."""
        _check_sizes(logits, batch)
        log_p = _log_softmax(logits, self.temperature)
        shares = torch.stack([-batch.distance_org, -batch.distance_aug]).softmax(0)
        distances = torch.stack([_distance(log_p, batch.label_org), _distance(log_p, batch.label_aug)])
        # With one class both shares fall on the same distance and sum to one, so it counts once.
        return (shares * distances).sum(0).mean()


class CompletedDBRLoss(nn.Module):
    """KL divergence from the completed labels (`completed_labels`), plus alpha_dbr times the error of the distances.

    That error is the mean of |d(S) - d| over the distances that a pair stores: of its two classes (of one, where they
    are the same) and of its further ones. The KL hears little of unlikely classes, and what it hears of classes that
    are not stored is a guess.

    Args:
        temperature: softmax temperature of the student; must be the teacher's
            (`DBRLoader.dataset_info.temperature`).
        soft_temperature: T; both softmaxes of the KL are taken at T times that temperature, as `SoftLoss` does with the
            teacher's logits, without the factor T**2. A label tells its least likely classes only roughly, and they
            count the more the higher T is: none is taken as less than `floor_of` says then.
        alpha_dbr: weight of the distances' error, which is divided by T**2, as the KL's gradients are.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, *, temperature: float = 1.0, soft_temperature: float = 1.0, alpha_dbr: float = 0.5) -> None:
        super().__init__()
        require(temperature > 0, f"temperature: found {temperature}, expected more than 0")
        require(soft_temperature > 0, f"soft_temperature: found {soft_temperature}, expected more than 0")
        require(alpha_dbr >= 0, f"alpha_dbr: found {alpha_dbr}, expected 0 or more")
        self.temperature = temperature
        self.soft_temperature = soft_temperature
        self.alpha_dbr = alpha_dbr

    def forward(self, logits: Tensor, batch: DBRBatch) -> Tensor:
        """The loss of logits (B, C): a float32 scalar."""
        _check_sizes(logits, batch)
        divergence = self._divergence(logits, completed_labels(batch, logits.shape[1]))
        weight = self.alpha_dbr / self.soft_temperature**2
        return divergence + weight * _mean_stored_error(_log_softmax(logits, self.temperature), batch)

    def _divergence(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = _log_softmax(logits, self.temperature * self.soft_temperature)
        labels = labels.to(log_p.dtype)
        if self.soft_temperature == 1:
            return F.kl_div(log_p, labels, reduction="batchmean")
        softened = _log_softmax(labels.clamp_min(floor_of(logits.shape[1])).log(), self.soft_temperature)
        return F.kl_div(log_p, softened, reduction="batchmean", log_target=True)


def completed_labels(batch: DBRBatch, classes: int) -> Tensor:
    """The teacher's prediction as far as the dataset tells: rows (B, C) that sum to one, float32 at least.

    The pair's two classes have the probabilities p = exp(-d) that the distances state, divided by max(1, their sum).
    So do further classes, where the dataset stores any, and these count in the sum.
    What is left goes to the other classes like lam * prior_org + (1 - lam) * prior_aug, no class less than
    `floor_of` says before normalisation; evenly where the dataset stores no priors.

    Raises ConfigError where the batch names classes beyond these (not on a GPU, which it would have to wait for).
    """
    listed = [each.classes for each in (batch.prior_org, batch.prior_aug, batch.further) if each is not None]
    _check_classes(classes, batch.label_org, batch.label_aug, *listed)
    same = _same_class(batch)
    known = batch.distance_org.new_zeros(len(batch), classes)
    known = known.scatter(1, batch.label_org[:, None], batch.distance_org.neg().exp()[:, None])
    aug = torch.where(same, batch.distance_org, batch.distance_aug)
    known = known.scatter(1, batch.label_aug[:, None], aug.neg().exp()[:, None])
    others = _mixed_prior(batch, classes)
    for labels in (batch.label_org, batch.label_aug):
        others = others.scatter(1, labels[:, None], 0.0)
    if batch.further is not None:
        known = known.scatter(1, batch.further.classes, batch.further.distances.neg().exp())
        others = others.scatter(1, batch.further.classes, 0.0)
    total, spread = known.sum(1, keepdim=True), others.sum(1, keepdim=True)
    # With no class to take the rest, what the rounding of distances left out is shared in proportion.
    tiny = torch.finfo(total.dtype).tiny
    known = known / torch.where(spread > 0, total.clamp_min(1), total.clamp_min(tiny))
    rest = (1 - known.sum(1, keepdim=True)).clamp_min(0)
    return known + rest * others / torch.where(spread > 0, spread, 1.0)


def floor_of(classes: int) -> float:
    """The least share of one of so many classes in a mixed prior, and in a label at another temperature than 1.

    What is less, a dataset does not tell.
    """
    return min(LEAST, LEAST_IN_ALL / classes)


def _mixed_prior(batch: DBRBatch, classes: int) -> Tensor:
    """lam * prior_org + (1 - lam) * prior_aug, each class at least `floor_of`: (B, C)."""
    if batch.prior_org is None or batch.prior_aug is None:
        return batch.lam.new_ones(len(batch), classes)
    org, aug = _dense_prior(batch.prior_org, classes), _dense_prior(batch.prior_aug, classes)
    return torch.lerp(aug, org, batch.lam[:, None]).clamp_min(floor_of(classes))


def _dense_prior(prior: ClassDistances, classes: int) -> Tensor:
    """Probabilities of all classes (B, C) from those listed; the rest of 1 goes evenly to the others but the own."""
    listed = prior.distances.neg().exp()
    others = max(classes - 1 - listed.shape[1], 1)
    left = (1 - listed.sum(1, keepdim=True)).clamp_min(0) / others
    return left.expand(-1, classes).scatter(1, prior.classes, listed)


class SoftLoss(nn.Module):
    """KL divergence from the teacher's full softmax, both at temperature T, without the factor T**2.

    Args:
        temperature: T; RDED's evaluations use 20 with CutMix.
        top: keep this many of the teacher's highest probabilities and spread the rest evenly over the other classes,
            as FKD's compressed labels do; None keeps all.
    """

    def __init__(self, temperature: float = 20.0, *, top: int | None = None) -> None:
        super().__init__()
        require(temperature > 0, f"temperature: found {temperature}, expected more than 0")
        require(top is None or top >= 1, f"top: found {top}, expected 1 or more, or None")
        self.temperature = temperature
        self.top = top

    def forward(self, logits: Tensor, batch: DBRBatch, teacher_logits: Tensor) -> Tensor:
        """The loss of logits (B, C) against the teacher's (B, C) for `batch.images`: a float32 scalar."""
        _check_sizes(logits, batch)
        require(
            teacher_logits.shape == logits.shape,
            f"teacher logits: found shape {tuple(teacher_logits.shape)}, expected {tuple(logits.shape)}",
        )
        student = _log_softmax(logits, self.temperature)
        teacher = _log_softmax(teacher_logits, self.temperature)
        if self.top is not None and self.top < logits.shape[1]:
            return F.kl_div(student, _even_below(teacher.exp(), self.top), reduction="batchmean")
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of logits (B, C), in float32 where they are narrower."""
    full = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (full / temperature).log_softmax(1)


def _distance(log_p: Tensor, labels: Tensor) -> Tensor:
    """-log p of each row's label: (B,)."""
    return log_p.gather(1, labels[:, None]).squeeze(1).neg()


def _own_error(log_p: Tensor, batch: DBRBatch, kind: Distance) -> Tensor:
    """Error of the distances of each pair's two classes together, of one where they are the same: (B,)."""
    error_org = _error(_distance(log_p, batch.label_org), batch.distance_org, kind)
    error_aug = _error(_distance(log_p, batch.label_aug), batch.distance_aug, kind)
    return error_org + error_aug.masked_fill(_same_class(batch), 0.0)


def _error(student: Tensor, teacher: Tensor, kind: Distance) -> Tensor:
    teacher = teacher.to(student.dtype)
    if kind == "l1":
        return (student - teacher).abs()
    if kind == "squared":
        return (student - teacher).square()
    return F.huber_loss(student, teacher, reduction="none")


def _mean_stored_error(log_p: Tensor, batch: DBRBatch) -> Tensor:
    """Mean over the pairs of a pair's mean |d(S) - d| over the classes whose distances it stores; log p is (B, C)."""
    total, count = _own_error(log_p, batch, "l1"), 2 - _same_class(batch).to(log_p.dtype)
    if batch.further is not None:
        error = _error(-log_p.gather(1, batch.further.classes), batch.further.distances, "l1")
        total, count = total + error.sum(1), count + error.shape[1]
    return (total / count).mean()


def _same_class(batch: DBRBatch) -> Tensor:
    return torch.eq(batch.label_org, batch.label_aug)


def _mixed_cross_entropy(log_p: Tensor, batch: DBRBatch) -> Tensor:
    """CE to lam * y_i + (1 - lam) * y_j, pair by pair: (B,)."""
    distance_org, distance_aug = _distance(log_p, batch.label_org), _distance(log_p, batch.label_aug)
    return distance_aug + batch.lam * (distance_org - distance_aug)


def _label_entropy(batch: DBRBatch) -> Tensor:
    """H(lam) of the mixed labels in nats, 0 where both classes are the same: (B,)."""
    entropy: Tensor = torch.special.entr(batch.lam) + torch.special.entr(1 - batch.lam)
    return entropy.masked_fill(_same_class(batch), 0.0)


def _mixed_labels(batch: DBRBatch, classes: int) -> Tensor:
    """lam * y_i + (1 - lam) * y_j as dense rows: (B, C) float32."""
    labels = batch.lam.new_zeros(len(batch), classes)
    labels.scatter_add_(1, batch.label_org[:, None], batch.lam[:, None])
    return labels.scatter_add_(1, batch.label_aug[:, None], 1 - batch.lam[:, None])


def _spread_excess(labels: Tensor, capped: Tensor, cap: float) -> Tensor:
    """Cuts the capped entries of labels (B, C) to `cap`; what they lose goes evenly to the row's others."""
    excess = ((labels - cap) * capped).sum(1, keepdim=True)
    others = (~capped).sum(1, keepdim=True).clamp_min(1)
    return torch.where(capped, cap, labels + excess / others)


def _even_below(p: Tensor, top: int) -> Tensor:
    """The `top` highest of each row of probabilities (B, C), the rest spread evenly over the other classes."""
    values, classes = p.topk(top, dim=1)
    rest = (1 - values.sum(1, keepdim=True)).clamp_min(0) / (p.shape[1] - top)
    return rest.expand_as(p).scatter(1, classes, values)


def _soft_cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    return -(labels * log_p).sum(1).mean()


def _check_sizes(logits: Tensor, batch: DBRBatch) -> None:
    if logits.ndim != 2 or len(logits) != len(batch):
        raise ConfigError(
            f"logits of shape {tuple(logits.shape)}, expected ({len(batch)}, classes) as the batch has "
            f"{len(batch)} pairs"
        )
    _check_classes(logits.shape[1], batch.label_org, batch.label_aug)


def _check_classes(classes: int, *named: Tensor) -> None:
    """Refuses class numbers beyond so many classes; on a GPU they are not looked at, since that would wait for it."""
    if named[0].device.type == "cpu" and not torch.compiler.is_compiling():
        highest = max(int(numbers.max()) for numbers in named)
        require(highest < classes, f"logits of {classes} classes, but the batch names class {highest}")
