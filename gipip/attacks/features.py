"""What the last layer's gradient gives away: the features of each single image.

Let H (B × D) be what enters the last linear layer, W its weights, b its bias, and
E = softmax(HWᵀ + b) − Y, with the one-hot labels Y. The layer's gradient is
G_W = EᵀH/B and G_b = Eᵀ1/B. With the singular value decomposition G_W = UΣVᵀ of rank B
the features are H = MΣVᵀ, with a B × B matrix M: B² unknowns for the B × C equations
EᵀM/B = U.

Single images were read off such gradients by Geiping et al. (2020, proposition 3.1),
batches by the Cocktail Party Attack (Kariyappa et al., ICML 2023: independent
components) and SPEAR (Dimitrov et al., NeurIPS 2024: zeros of ReLU); here the softmax
is used as well, and says what is right.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from numpy import ndarray
from torch import Tensor, nn

from gipip.attacks.labels import infer_labels, logit_gradients
from gipip.errors import UpdateError
from gipip.federation.client import FedAvg, SharedUpdate
from gipip.federation.models import ClientModel, Mode, class_logits, in_mode, last_linear

ROUNDING = 5e-6  # benchmarks/features.py: residuals of true features in float32 are below
_FLOAT32 = 1e-7
_PRECISE = 0.01  # the relative error up to which an image's features count as recovered
_STEADY = 0.05  # the residual from which features change too much in local steps to simulate these
_ITERATIONS = 60
_SUBSETS = 2000
_COMPLETIONS = 50
_DOUBT = 0.1  # weight of an estimated entry of the gradient, beside 1 of a shared one
_LARGEST_JACOBIAN = 5_000_000  # entries


@dataclass(frozen=True, eq=False)
class RecoveredFeatures:
    """The features of each image of a batch, in the order of `labels`.

    `features`: what entered the last linear layer, `logits`: what left it. `residual`:
    by how much the gradient that these features would have caused differs from the
    shared one, relative to it. `covariance`: between the images, of the errors of a
    feature that the residual, rounding, noise or local steps let expect. `known`: which
    features the update tells of at all; the others, which a client has pruned, are 0.
    `status`: "exact" when the residual is no more than rounding and each image is told
    apart from the others (`errors` below 1 %), else "approximate".
    """

    features: Float64[Tensor, "batch features"]
    logits: Float64[Tensor, "batch classes"]
    labels: Int[Tensor, "batch"]
    residual: float
    covariance: Float64[Tensor, "batch batch"]
    known: Bool[Tensor, "features"]
    status: Literal["exact", "approximate"]

    @property
    def errors(self) -> Float64[Tensor, "batch"]:
        """The relative error to expect of each image's features; large where an image
        adds next to nothing to the gradient, as one that a trained client is sure of.
        """
        variances = self.covariance.diagonal() * self.features.shape[1]
        return variances.sqrt() / self.features.norm(dim=1)


def recover_features(model: ClientModel, update: SharedUpdate) -> RecoveredFeatures:
    """The features of every image behind `update`, from the gradient of the last linear layer.

    First by a fixed-point iteration from uniform predictions, then by
    Levenberg–Marquardt from several starts. The gradient's scale is taken as unknown,
    so clipping does no harm. Missing labels are inferred. The rest is approximate:
    noise, whose strength follows from what exceeds rank B, leaves the least-squares
    solution; missing entries are estimated with the features; of local steps those of
    the last layer are simulated, and the drift of features is deducted; of features
    that Soteria pruned, the logits' mean is known from the bias gradient.

    Raises UpdateError when nothing can be recovered: as many images as classes or more,
    or a last layer that is frozen or shares only zeros; ModelError when the last layer
    is not linear.
    """
    update.check(model)
    return recovered(model, update)


@torch.no_grad()
def recovered(model: ClientModel, update: SharedUpdate) -> RecoveredFeatures:
    """`recover_features` of an update that is known to be the model's."""
    weight, bias, gradient, bias_gradient = _last_layer(model, update)
    if update.batch_size >= len(weight):
        raise UpdateError(
            f"The features of {update.batch_size} images cannot be told apart by {len(weight)} "
            "classes: the last layer's gradient has too low a rank. Expected fewer images than "
            "classes."
        )
    labels = infer_labels(model, update) if update.labels is None else update.labels
    fedavg = update.fedavg or FedAvg()
    span = _Span(weight, bias, gradient, bias_gradient, labels.cpu().numpy(), fedavg)
    with np.errstate(all="ignore"):  # a start may lead nowhere
        found = span.solved(labels_known=update.labels is not None)
        if fedavg.steps > 1 and found.residual > _STEADY:
            found = replace(span, fedavg=FedAvg()).solved(labels_known=update.labels is not None)
            return replace(found, status="approximate")
    if fedavg.steps == 1:
        return found
    drift, variance = _drift(model, update, fedavg)
    features = found.features - drift
    logits = features @ torch.from_numpy(weight.T) + torch.from_numpy(bias)
    covariance = found.covariance + variance.diag()
    return replace(found, features=features, logits=logits, covariance=covariance)


def _drift(model: ClientModel, update: SharedUpdate, fedavg: FedAvg) -> tuple[Tensor, Tensor]:
    """By how much local training has moved each image's features when they were used
    (B × D), and the variance of that: as it moves those of random patches of colour in
    the model half-way.
    """
    steps, images = range(fedavg.steps), torch.arange(update.batch_size)
    used = torch.stack(
        [torch.isin(images, images[fedavg.rows(step, len(images))]) for step in steps]
    )
    times = used.double().T @ torch.arange(fedavg.steps).double() / used.sum(dim=0).clamp(min=1)
    half = copy.deepcopy(model)
    parameters, way = dict(half.named_parameters()), (fedavg.steps - 1) / 2
    for name, gradient in zip(update.parameter_names, update.gradients, strict=True):
        parameters[name].sub_(gradient, alpha=fedavg.learning_rate * way)
    channels, *size = update.image_shape
    patches = torch.rand(64, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = nn.functional.interpolate(patches, size, mode="bilinear")
    before, after = (_entering_last(each, patches, update.mode) for each in (model, half))
    drift = (after - before) / way
    return times[:, None] * drift.mean(dim=0), times**2 * drift.var(dim=0).mean()


def _entering_last(model: ClientModel, images: Tensor, mode: Mode) -> Tensor:
    model = in_mode(model, mode)
    inputs = model.normalize(images.to(next(model.parameters())))
    return last_linear(model.network, inputs)[1].cpu().double()


def _last_layer(model: ClientModel, update: SharedUpdate) -> tuple[ndarray, ...]:
    """Weights, bias, and the gradients of both, in float64; zeros for a bias that is not there."""
    model = in_mode(model, update.mode)
    probe = torch.rand(4, *update.image_shape, generator=torch.Generator().manual_seed(0))
    name, _ = last_linear(model, probe.to(next(model.parameters())))
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    gradients = logit_gradients(update, name)
    gradient = gradients.get("weight")
    if gradient is None or not gradient.any():
        raise UpdateError(
            f"The update holds no gradient of {name}.weight, from which features are recovered: "
            "the layer is frozen, withheld or pruned. Another attack may do without it."
        )
    missing = torch.zeros(len(gradient))
    bias = missing if layer.bias is None else class_logits(layer.bias[None])[0]
    weight = class_logits(layer.weight.T).T
    tensors = (weight, bias, gradient, gradients.get("bias", missing))
    return tuple(tensor.detach().cpu().double().numpy() for tensor in tensors)


def softmax(logits: ndarray) -> ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class _Span:
    """The equations t·ẼᵀM = U and t·Ẽᵀ1 = g̃ for the B × B matrix M and the update's scale t.

    Rows (classes) are divided by their rounding error, so that all equations are
    equally precise: Ẽ = E / (B·scale), UΣVᵀ = G_W / scale. The rounding of a class's
    row is relative to its own norm, but for a label's at least to that of p − 1 = O(1).
    """

    weight: ndarray
    bias: ndarray
    gradient: ndarray
    bias_gradient: ndarray
    labels: ndarray
    fedavg: FedAvg = FedAvg()
    any_scale: bool = False
    pruned: bool = False

    @cached_property
    def biased(self) -> bool:
        """Whether the gradient of a bias is there."""
        return bool(self.bias_gradient.any())

    @cached_property
    def rounding(self) -> ndarray:
        rows = np.linalg.norm(self.gradient, axis=1)
        feature_norm = rows.max() * len(self.labels)
        if self.biased:
            feature_norm = np.linalg.norm(self.gradient) / np.linalg.norm(self.bias_gradient)
        is_label = np.isin(np.arange(len(rows)), self.labels)
        scale = rows + is_label * feature_norm / len(self.labels)
        return np.maximum(scale, 1e-9 * scale.max())

    @cached_property
    def noise(self) -> float:
        """Standard deviation of each entry of G_W, as what exceeds rank B tells; 0 if rounding."""
        size, features = len(self.labels), self.gradient.any(axis=0).sum()
        scaled = self.gradient / self.rounding[:, None]
        values = np.linalg.svd(scaled, compute_uv=False)
        if np.linalg.norm(values[size:]) < ROUNDING * np.linalg.norm(values):
            return 0.0
        values = np.linalg.svd(self.gradient, compute_uv=False)[size:]
        return float(np.linalg.norm(values) / np.sqrt(len(values) * max(features - size, 1)))

    @cached_property
    def scale(self) -> ndarray:
        rows = np.linalg.norm(self.gradient, axis=1)
        scale = self.rounding + self.noise * np.sqrt(self.gradient.shape[1]) / _FLOAT32
        return scale * np.linalg.norm(rows / scale)

    @cached_property
    def factors(self) -> tuple[ndarray, ndarray, ndarray]:
        """U (classes × B), the diagonal of Σ, and ΣVᵀ (B × features)."""
        scaled = self.gradient / self.scale[:, None]
        left, values, right = np.linalg.svd(scaled, full_matrices=False)
        size = len(self.labels)
        values = np.maximum(values[:size], 1e-300)
        return left[:, :size], values, values[:, None] * right[:size]

    @cached_property
    def logits_span(self) -> ndarray:
        """ΣVᵀWᵀ: the logits are M times it, plus the bias."""
        return self.factors[2] @ self.weight.T

    @cached_property
    def scaled_bias(self) -> ndarray:
        return self.bias_gradient / self.scale

    @cached_property
    def bias_weight(self) -> float:
        if not self.biased or self.noise:
            return float(self.biased)
        return 1 / float(np.linalg.norm(self.scaled_bias))

    def logits(self, matrix: ndarray) -> ndarray:
        return matrix @ self.logits_span + self.bias

    def wrongness(self, logits: ndarray, gram: ndarray) -> ndarray:
        """Ẽ, its mean over the client's local steps, of logits before the first one.
        Each step moves the layer, and so the logits, by HHᵀ + 11ᵀ (`gram`) times E.
        """
        size, total = len(self.labels), np.zeros_like(logits)
        for step in range(self.fedavg.steps):
            rows = self.fedavg.rows(step, size)
            wrong = np.zeros_like(logits)
            wrong[rows] = softmax(logits[rows]) - np.eye(len(self.bias))[self.labels[rows]]
            wrong /= len(wrong[rows])
            logits = logits - self.fedavg.learning_rate * (gram @ wrong)
            total += wrong
        return total / self.fedavg.steps / self.scale

    def wrongness_of(self, matrix: ndarray) -> ndarray:
        logits = self.logits(matrix)
        if self.pruned:
            mean = self.bias_gradient + np.eye(len(self.bias))[self.labels].mean(axis=0)
            for _ in range(20):
                logits = logits + np.log(np.maximum(mean, 1e-6) / softmax(logits).mean(axis=0))
        features = matrix * self.factors[1]
        return self.wrongness(logits, features @ features.T + self.biased)

    def unpacked(self, unknowns: ndarray) -> tuple[ndarray, float]:
        """M and t."""
        size = len(self.labels)
        return unknowns[:-1].reshape(size, size), np.exp(unknowns[-1])

    def residuals(self, unknowns: ndarray) -> ndarray:
        """Of both equations, the first times Σ: the gradient's, in an orthonormal basis."""
        matrix, t = self.unpacked(unknowns)
        wrong = t * self.wrongness_of(matrix)
        left, values, _ = self.factors
        weights = (wrong.T @ matrix - left) * values
        biases = self.bias_weight * (wrong.sum(axis=0) - self.scaled_bias)
        scale = [0.0 if self.any_scale else unknowns[-1]]
        return np.concatenate([weights.ravel(), biases, scale])

    def jacobian(self, unknowns: ndarray) -> ndarray:
        """∂ residuals / ∂ unknowns."""
        matrix, t = self.unpacked(unknowns)
        size = len(matrix)
        predictions = softmax(self.logits(matrix))
        wrong = t * self.wrongness_of(matrix)
        centred = self.logits_span.T - (predictions @ self.logits_span.T)[:, None]
        slopes = t * predictions[:, :, None] * centred / self.scale[:, None] / size  # ∂Ẽ_ic/∂M_ik
        weights = np.einsum("ick,il->clik", slopes, matrix)
        for column in range(size):
            weights[:, column, :, column] += wrong.T
        weights *= self.factors[1][:, None, None]
        biases = self.bias_weight * slopes.transpose(1, 0, 2)
        parts = (weights, biases, np.zeros(size**2))
        of_matrix = np.concatenate([part.reshape(-1, size**2) for part in parts])
        by_scale = (wrong.T @ matrix) * self.factors[1]
        by_bias = self.bias_weight * wrong.sum(axis=0)
        of_scale = np.concatenate([by_scale.ravel(), by_bias, [not self.any_scale]])
        return np.column_stack([of_matrix, of_scale])

    # Starts ---------------------------------------------------------------------------

    def iterated(self) -> ndarray:
        """The fixed point of P → M = (t·Ẽᵀ)⁺U → P, from uniform P."""
        classes, size = len(self.bias), len(self.labels)
        wrong, t = self.wrongness(np.zeros((size, classes)), np.zeros((size, size))), 1.0
        for _ in range(_ITERATIONS):
            if self.any_scale and self.biased:
                total = wrong.sum(axis=0)
                t = np.clip(total @ self.scaled_bias / max(total @ total, 1e-300), 1e-9, 1e9)
            matrix = np.linalg.lstsq(t * wrong.T, self.factors[0])[0]
            before, wrong = wrong, self.wrongness_of(matrix)
            if not np.abs((wrong - before) * self.scale).max() >= 1e-13:  # or not a number
                break
        return np.append(matrix, np.log(t))

    def class_rows(self) -> ndarray:
        """hᵢ = G_W[yᵢ] / G_b[yᵢ]: exact for one image, near for one alone in its class."""
        features = self.gradient[self.labels] / self.bias_gradient[self.labels][:, None]
        return self.in_span(features)

    def in_span(self, features: ndarray) -> ndarray:
        _, values, spanning = self.factors
        return np.append(features @ spanning.T / values**2, 0.0)

    def peeled(self, any_label: bool = False) -> "tuple[_Span, ndarray]":
        """One image after another, by the zeros that ReLU leaves among the features (as SPEAR).

        Where r images are left, and r − 1 features are zero for one of them, its row of
        M is what is orthogonal to these columns of ΣVᵀ and to all of Ẽ found so far;
        G_b tells its length. Of many random choices of r − 1 features that one is taken
        whose predictions fit best.
        """
        generator = np.random.default_rng(0)
        left = list(range(len(self.bias))) if any_label else self.labels.tolist()
        found: list[int] = []
        rows, wrongs = [], np.zeros((0, len(self.labels)))
        while len(found) < len(self.labels):
            basis = np.linalg.svd(wrongs)[2][len(found) :].T
            candidates = self.orthogonal_rows(basis, generator)
            misfits, directions = self.misfits(candidates, np.unique(left))
            row, label = np.unravel_index(misfits.argmin(), misfits.shape)
            rows.append(candidates[row])
            wrongs = np.vstack([wrongs, directions[row, label]])
            found.append(int(np.unique(left)[label]))
            if not any_label:
                left.remove(found[-1])
        labels = np.sort(found) if any_label else self.labels
        features = np.empty((len(labels), self.gradient.shape[1]))
        order = np.argsort(found, kind="stable")
        features[np.argsort(labels, kind="stable")] = (np.array(rows) @ self.factors[2])[order]
        span = replace(self, labels=labels)
        return span, span.in_span(features)

    def orthogonal_rows(self, basis: ndarray, generator: np.random.Generator) -> ndarray:
        """Candidates for a row of M in the space of `basis`, (candidates, B)."""
        columns = basis.T @ self.factors[2]
        columns = columns[:, np.linalg.norm(columns, axis=0) > 0]
        columns = columns / np.linalg.norm(columns, axis=0)
        needed = basis.shape[1] - 1
        chosen = generator.random((_SUBSETS, columns.shape[1])).argsort(axis=1)[:, :needed]
        normals = np.linalg.svd(columns[:, chosen].transpose(1, 2, 0))[2][:, -1]
        rows = normals @ basis.T
        return rows / (rows @ (self.factors[0].T @ self.scaled_bias))[:, None]

    def misfits(self, rows: ndarray, labels: ndarray) -> tuple[ndarray, ndarray]:
        """How far each row's Ẽ, with each label, is from one of U's span whose product
        with the row is 1 (candidates, labels); and the Ẽ in coordinates of U.
        """
        unit = self.scale * len(self.labels)
        predictions = softmax(self.logits(rows)) / unit
        of_label = predictions[:, labels]
        squares = (predictions**2).sum(axis=1)[:, None] - of_label**2
        squares += (1 / unit[labels] - of_label) ** 2
        left = self.factors[0]
        inside = (predictions @ left)[:, None] - left[labels] / unit[labels][:, None]
        outside = np.sqrt(np.maximum(1 - (inside**2).sum(axis=2) / squares, 0))
        products = (inside * rows[:, None]).sum(axis=2)
        misfits = outside + (0 if self.any_scale else np.minimum(np.abs(products - 1), 1))
        return np.nan_to_num(misfits, nan=np.inf), inside

    # Solving --------------------------------------------------------------------------

    def solved(self, labels_known: bool) -> RecoveredFeatures:
        """The first solution whose residual is rounding, else that of the lowest residual."""
        if self.sparsified:
            return self.completed()
        tried = []
        for span, start in self.starts(labels_known):
            tried.append(span.result(span.polished(start)))
            if tried[-1].residual < self.tolerance:
                break
        return min(tried, key=lambda found: found.residual)

    def starts(self, labels_known: bool) -> "Iterator[tuple[_Span, ndarray]]":
        """The spans and starts to try: first with the scale as it is, then with any."""
        for span in (self, replace(self, any_scale=True)):
            yield span, span.iterated()
            if self.biased and not self.gradient.any(axis=0).all():
                yield (pruned := replace(span, pruned=True)), pruned.iterated()
            if self.biased:
                yield span, span.class_rows()
            if self.biased and self.small:
                yield span.peeled()
            if self.biased and self.small and not labels_known:
                yield span.peeled(any_label=True)

    def polished(self, unknowns: ndarray) -> ndarray:
        """The minimum of the residuals' squares near a start, by Levenberg–Marquardt;
        the start itself where there are too many unknowns.
        """
        if self.pruned or not self.small or not np.isfinite(self.residuals(unknowns)).all():
            return unknowns
        from scipy.optimize import least_squares  # slow to import

        fit = least_squares(
            self.residuals,
            unknowns,
            self.jacobian if self.fedavg.steps == 1 else "2-point",
            method="lm",
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
            max_nfev=200,
        )
        return fit.x

    @property
    def tolerance(self) -> float:
        """The residual of a solution."""
        noise = self.noise / np.linalg.norm(self.gradient)
        return max(ROUNDING, 4 * noise * np.sqrt(len(self.bias) * len(self.labels)))

    @property
    def small(self) -> bool:
        """Whether there are few enough equations and unknowns for a Jacobian."""
        return len(self.bias) * len(self.labels) ** 3 <= _LARGEST_JACOBIAN

    @cached_property
    def missing(self) -> ndarray:
        """Entries of G_W that are zero beside others in their row and column. (A column
        of zeros is a feature that no image has.)
        """
        shared = self.gradient != 0
        return ~shared & shared.any(axis=0) & shared.any(axis=1, keepdims=True)

    @property
    def sparsified(self) -> bool:
        """Whether the client left out what is small: then nothing small is there.
        (Beside what a trained client is sure of, which rounds to 0, there is.)
        """
        shared = np.abs(self.gradient[self.gradient != 0])
        return bool(self.missing.any() and shared.min() > 0.01 * np.sqrt(np.mean(shared**2)))

    def completed(self) -> RecoveredFeatures:
        """With what a client left out of G_W, because it was small, estimated in turn
        with the features: each by least squares, where estimates count less than what
        is there.
        """
        filled, bound = self.gradient, np.abs(self.gradient[self.gradient != 0]).min()
        weights = np.where(self.missing, _DOUBT, 1.0)
        classes, size = len(self.bias), len(self.labels)
        start = self.wrongness(np.zeros((size, classes)), np.zeros((size, size)))
        wrong = self.scale * start
        for _ in range(_COMPLETIONS):
            normal = np.einsum("ic,cd,jc->dij", wrong, weights, wrong, optimize=True)
            normal += 1e-9 * (wrong**2).sum() * np.eye(len(wrong))
            products = (wrong @ (weights * filled)).T[:, :, None]
            features = np.linalg.solve(normal, products)[:, :, 0].T
            logits = features @ self.weight.T + self.bias
            wrong = self.scale * self.wrongness(logits, features @ features.T + self.biased)
            filled = np.where(
                self.missing, np.clip(wrong.T @ features, -bound, bound), self.gradient
            )
        variance = bound**2 / 3 * _DOUBT  # of what is there, beside ± bound of what is not
        misfit = np.where(self.missing, 0, self.gradient - wrong.T @ features)
        return self.found(
            features,
            variance * np.linalg.inv(normal).mean(axis=0),
            float(np.linalg.norm(misfit) / np.linalg.norm(self.gradient)),
        )

    def result(self, unknowns: ndarray) -> RecoveredFeatures:
        matrix, t = self.unpacked(unknowns)
        residual = float(np.nan_to_num(np.linalg.norm(self.residuals(unknowns)), nan=np.inf))
        features, covariance = matrix @ self.factors[2], np.diag(np.full(len(matrix), 1e30))
        if np.isfinite(residual) and self.noise:
            features, covariance = self.least_squares(t * self.wrongness_of(matrix))
        elif np.isfinite(residual):
            covariance = self.covariance(unknowns, residual)
        found = self.found(features, covariance, residual)
        exact = residual < ROUNDING and found.errors.max() < _PRECISE
        return replace(found, status="exact") if exact and self.fedavg.steps == 1 else found

    def found(self, features: ndarray, covariance: ndarray, residual: float) -> RecoveredFeatures:
        features = np.nan_to_num(features)
        return RecoveredFeatures(
            features=torch.from_numpy(features),
            logits=torch.from_numpy(features @ self.weight.T + self.bias),
            labels=torch.from_numpy(self.labels),
            residual=residual,
            covariance=torch.from_numpy(covariance),
            known=torch.from_numpy(self.gradient.any(axis=0) | (not self.pruned)),
            status="approximate",
        )

    def least_squares(self, wrong: ndarray) -> tuple[ndarray, ndarray]:
        """The features that fit G_W best, also out of the span, where noise has bent
        that; and the covariance of the errors.
        """
        inverse = np.linalg.pinv(wrong.T) / self.scale
        return inverse @ self.gradient, self.noise**2 * inverse @ inverse.T

    def covariance(self, unknowns: ndarray, residual: float) -> ndarray:
        """Between the images' errors of a feature: out of the span and, where the
        Jacobian is small, in it.
        """
        matrix, _ = self.unpacked(unknowns)
        size, features = len(matrix), self.gradient.shape[1]
        covariance = matrix @ matrix.T
        if self.small:
            _, values, directions = np.linalg.svd(self.jacobian(unknowns), full_matrices=False)
            directions /= np.maximum(values, 1e-12 * values[0])[:, None]
            within = (directions.T @ directions)[:-1, :-1].reshape([size] * 4)
            covariance += np.einsum("ikjk,k->ij", within, self.factors[1] ** 2) / features
        noise = max(residual, _FLOAT32) / np.sqrt(size * len(self.bias))  # of each equation
        return noise**2 * covariance
