"""Three published verdicts on a checkpoint, as baselines: Neural Cleanse, DECREE and MM-BD.

Written anew. Every number is a field of `NeuralCleanse`, `Decree` or `MmBd`: by default the published one,
from the paper or, where that is silent, from its authors' program. The one deviation forced by cost is
`within`: it cuts the settings to a number of images that may go through the encoder and back, and says of
each method what it gives up. The classifier is the zero-shot head of a class list: logits are cosines times
the model's own temperature. The encoder may run in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cbpt_runtime.models.clip import ImageEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuralCleanse:
    """Settings of Neural Cleanse.

    Source: Wang et al., "Neural Cleanse", S&P 2019; the numbers that it leaves open from the authors'
    github.com/bolunwang/backdoor, `gtsrb_visualize_example.py` and `visualizer.py`.

    Attributes:
        step_size: Of Adam on mask and pattern, each the tanh of its parameters (`LR`).
        first_decay: Adam's first beta.
        second_decay: Its second.
        batch: Images at a time (`BATCH_SIZE`).
        batches_per_step: Between two looks at the success; 1,000 images (`NB_SAMPLE`) over the batch.
        steps: At most (`STEPS`).
        weight: Of the mask's L1 norm, in pixels; 0 until the trigger works for the first time (`INIT_COST`).
        patience: Steps of success after which the weight grows, of failure after which it shrinks.
        growth: Factor up (`COST_MULTIPLIER`).
        shrinkage: Factor down: growth to the power 1.5.
        success: Share of the images called the target that is success.
        stop_patience: Steps without a smaller mask before the end (`EARLY_STOP_PATIENCE`).
        threshold: Anomaly index above which a class is a target.
        consistency: From the median absolute deviation to the deviation of a normal distribution.
    """

    step_size: float = 0.1
    first_decay: float = 0.5
    second_decay: float = 0.9
    batch: int = 32
    batches_per_step: int = 31
    steps: int = 1000
    weight: float = 1e-3
    patience: int = 5
    growth: float = 2.0
    shrinkage: float = 2.0**1.5
    success: float = 0.99
    stop_patience: int = 25
    threshold: float = 2.0
    consistency: float = 1.4826

    def within(self, passes: int, classes: int) -> NeuralCleanse:
        """Return the settings cut to so many images: a look at the success after every batch, fewer steps."""
        steps = passes // (classes * self.batch)
        return replace(self, batches_per_step=1, steps=max(1, min(self.steps, steps)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decree:
    """Settings of DECREE.

    Source: Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023; the numbers that it leaves
    open from the authors' github.com/GiantSeaweed/DECREE, `main.py` and `run_decree.py`, as for CLIP.

    Attributes:
        batch: Images at a time.
        epochs: At most.
        steps: At most; the program has no such bound.
        step_sizes: Of Adam, from which epoch on.
        first_decay: Adam's first beta.
        second_decay: Its second.
        weight: First one of the mask's L1 norm, which counts every channel of every pixel.
        factor: By which it grows after more than `patience` successes in turn, and shrinks after failures.
        patience: See there.
        least_weight: Below it the weight shrinks no more.
        most_weight: Above it the weight grows no more.
        success: Mean cosine of two different images' features that is success.
        stop_patience: Steps without a smaller mask before the end, which is at the end of an epoch.
        threshold: Share of the largest possible L1 norm below which an encoder is backdoored.
    """

    batch: int = 32
    epochs: int = 1000
    steps: int | None = None
    step_sizes: tuple[tuple[int, float], ...] = ((0, 0.5), (200, 0.1), (500, 0.05))
    first_decay: float = 0.5
    second_decay: float = 0.9
    weight: float = 1e-3
    factor: float = 5.0
    patience: int = 5
    least_weight: float = 1e-7
    most_weight: float = 1e5
    success: float = 0.99
    stop_patience: int = 35
    threshold: float = 0.1

    def within(self, passes: int, classes: int) -> Decree:
        """Return the settings cut to so many images, in fewer steps; the number of classes does not count."""
        return replace(self, steps=max(1, passes // self.batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class MmBd:
    """Settings of MM-BD.

    Source: Wang et al., "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern
    Types Using a Maximum Margin Statistic", S&P 2024; the numbers that it leaves open from the authors'
    github.com/wanghangpsu/MM-BD, `univ_bd.py`. Its momentum has no effect there, since every step has a new
    optimiser: here there is none.

    Attributes:
        starts: Random images per class.
        steps: Of gradient ascent, at most.
        step_size: Of these.
        tolerance: Relative change of the summed margin that ends them.
        level: p-value below which the class with the largest margin is a target.
    """

    starts: int = 30
    steps: int = 300
    step_size: float = 1e-2
    tolerance: float = 1e-5
    level: float = 0.05

    def within(self, passes: int, classes: int) -> MmBd:
        """Return the settings cut to so many images: fewer starts, down to four, only then fewer steps."""
        starts = max(4, min(self.starts, passes // (classes * self.steps)))
        return replace(self, starts=starts, steps=max(1, min(self.steps, passes // (classes * starts))))


Rival = NeuralCleanse | Decree | MmBd


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is looked at.

    Attributes:
        encoder: The image tower.
        head: Unit text features of the classes.
        scale: The model's logit scale.
        images: A few clean ones.
        seed: Of every random choice.
        mixed: Run the encoder in bfloat16 where autocast allows it.
    """

    encoder: ImageEncoder
    head: Float[Tensor, "classes dim"]
    scale: float
    images: UInt8[Tensor, "images 3 height width"]
    seed: int
    mixed: bool = False

    def features(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return unit features of pixels in [0, 1]."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.mixed):
            found = self.encoder.encode_images(pixels.contiguous(memory_format=torch.channels_last))
        return normalize(found.float(), dim=-1)

    def logits(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the zero-shot logits of pixels in [0, 1]."""
        return self.scale * self.features(pixels) @ self.head.T

    def epoch(
        self, batch: int, generator: torch.Generator
    ) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        """Yield all images once, in [0, 1], in batches of random order; a last single one is left out."""
        for drawn in torch.randperm(len(self.images), generator=generator).split(batch):
            if len(drawn) > 1:
                yield self.images[drawn.to(self.images.device)].float() / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a method says of a checkpoint.

    Attributes:
        score: The larger, the more suspicious.
        probability: That there is a backdoor.
        is_backdoored: The method's own decision.
        targets: Classes that it names, the most suspicious first.
        evidence: The values behind it.
    """

    score: float
    probability: float
    is_backdoored: bool
    targets: tuple[int, ...]
    evidence: dict[str, Any]


def judged(subject: Subject, settings: Rival) -> Verdict:
    """Ask the method that the settings are of."""
    match settings:
        case NeuralCleanse():
            return neural_cleanse(subject, settings)
        case Decree():
            return decree(subject, settings)
        case MmBd():
            return mm_bd(subject, settings)


def neural_cleanse(subject: Subject, settings: NeuralCleanse) -> Verdict:
    """Ask whether one class has a mask far smaller than the others.

    The probability is that of a normal value to deviate less than the largest anomaly index does: the paper
    calls an index of 2 an outlier with 95 %.
    """
    norms = [smallest_mask(subject, target, settings) for target in range(len(subject.head))]
    indices = anomaly_indices(torch.tensor(norms), settings.consistency)
    order = indices.argsort(descending=True).tolist()
    score = float(indices.max())
    return Verdict(
        score=score,
        probability=math.erf(score / math.sqrt(2)),
        is_backdoored=score > settings.threshold,
        targets=tuple(target for target in order if indices[target] > settings.threshold),
        evidence={"norms": [round(norm, 2) for norm in norms]},
    )


def anomaly_indices(norms: Float[Tensor, " classes"], consistency: float) -> Float[Tensor, " classes"]:
    """How many deviations each norm lies below the median; the deviation is the median absolute one."""
    below = norms.quantile(0.5) - norms
    deviation = consistency * below.abs().quantile(0.5)
    return below / deviation.clamp(min=1e-9)


@dataclass(slots=True)
class MaskWeight:
    """Neural Cleanse's weight of the mask, which follows the trigger's success.

    Attributes:
        settings: How.
        value: The weight now.
        was_raised: Whether it grew since the trigger first worked.
        was_lowered: Whether it shrank since.
    """

    settings: NeuralCleanse
    value: float = 0.0
    was_raised: bool = False
    was_lowered: bool = False
    _first: int = 0
    _good: int = 0
    _bad: int = 0

    def update(self, is_reached: bool) -> None:
        """Take note of one more step."""
        patience = self.settings.patience
        self._first = self._first + 1 if self.value == 0 and is_reached else 0
        if self._first >= patience:
            self.value = self.settings.weight
            self._good, self._bad, self.was_raised, self.was_lowered = 0, 0, False, False
        self._good, self._bad = (self._good + 1, 0) if is_reached else (0, self._bad + 1)
        if self._good >= patience:
            self.value, self._good, self.was_raised = self.value * self.settings.growth, 0, True
        elif self._bad >= patience:
            self.value, self._bad, self.was_lowered = self.value / self.settings.shrinkage, 0, True


def smallest_mask(subject: Subject, target: int, settings: NeuralCleanse) -> float:
    """L1 norm of the smallest mask found that takes the images to a class; of the last one if none does."""
    generator = torch.Generator().manual_seed(subject.seed + target)
    mask, pattern = _random_trigger(subject, generator)
    betas = (settings.first_decay, settings.second_decay)
    optimizer = torch.optim.Adam([mask, pattern], lr=settings.step_size, betas=betas)
    weight = MaskWeight(settings)
    batches = _endless(subject, settings.batch, generator)
    best, stale = math.inf, 0
    for _ in range(settings.steps):
        hits = norms = 0.0
        for _ in range(settings.batches_per_step):
            logits = subject.logits(_stamped(next(batches), mask, pattern))
            labels = torch.full((len(logits),), target, device=logits.device)
            norm = _squashed(mask).sum()
            optimizer.zero_grad()
            (cross_entropy(logits, labels) + weight.value * norm).backward()
            optimizer.step()
            hits += float((logits.argmax(dim=1) == target).float().mean()) / settings.batches_per_step
            norms += norm.item() / settings.batches_per_step
        is_reached = hits >= settings.success
        stale = 0 if is_reached and norms < best else stale + (best < math.inf)
        best = min(best, norms) if is_reached else best
        if weight.was_raised and weight.was_lowered and stale >= settings.stop_patience:
            break
        weight.update(is_reached)
    return best if best < math.inf else float(_squashed(mask.detach()).sum())


def decree(subject: Subject, settings: Decree) -> Verdict:
    """Ask whether a small patch gives all images the same features; it names no target.

    The probability has the odds threshold : share, so that it is one half at the threshold.
    """
    share = smallest_collapse(subject, settings)
    return Verdict(
        score=-share,
        probability=settings.threshold / (settings.threshold + share),
        is_backdoored=share < settings.threshold,
        targets=(),
        evidence={"share": round(share, 5)},
    )


@dataclass(slots=True)
class CollapseWeight:
    """DECREE's weight of the mask, which follows the features' collapse.

    Attributes:
        settings: How.
        value: The weight now.
    """

    settings: Decree
    value: float
    _good: int = 0
    _bad: int = 0

    def update(self, is_reached: bool) -> None:
        """Take note of one more step."""
        settings = self.settings
        self._good, self._bad = (self._good + 1, 0) if is_reached else (0, self._bad + 1)
        if self._good > settings.patience:
            self._good = 0
            if self.value < settings.most_weight:
                self.value *= settings.factor
        elif self._bad > settings.patience:
            self._bad = 0
            if self.value >= settings.least_weight:
                self.value /= settings.factor


def smallest_collapse(subject: Subject, settings: Decree) -> float:
    """Norm of the smallest mask that collapses features, as a share of the largest possible; 1 if none."""
    generator = torch.Generator().manual_seed(subject.seed)
    mask, pattern = _random_trigger(subject, generator)
    betas = (settings.first_decay, settings.second_decay)
    optimizer = torch.optim.Adam([mask, pattern], betas=betas)
    weight = CollapseWeight(settings, settings.weight)
    channels, best, stale, step = pattern.shape[0], math.inf, 0, 0
    for epoch in range(settings.epochs):
        step_size = [size for first, size in settings.step_sizes if epoch >= first][-1]
        optimizer.param_groups[0]["lr"] = step_size
        cosines = []
        for pixels in subject.epoch(settings.batch, generator):
            cosine = mean_cosine(subject.features(_stamped(pixels, mask, pattern)))
            norm = channels * _squashed(mask).sum()
            optimizer.zero_grad()
            (weight.value * norm - cosine).backward()
            optimizer.step()
            cosines.append(cosine.item())
            is_reached = cosines[-1] > settings.success
            stale = 0 if is_reached and norm.item() < best else stale + (best < math.inf)
            best = min(best, norm.item()) if is_reached else best
            weight.update(is_reached)
            step += 1
        is_done = sum(cosines) / len(cosines) > settings.success and stale > settings.stop_patience
        if is_done or (settings.steps is not None and step >= settings.steps):
            break
    return best / pattern.numel() if best < math.inf else 1.0


def mean_cosine(features: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean cosine between the unit features of two different images."""
    count = len(features)
    return (features.sum(dim=0).square().sum() - count) / (count * (count - 1))


def mm_bd(subject: Subject, settings: MmBd) -> Verdict:
    """Ask whether some image, however odd, can be given to one class far more clearly than to the others."""
    margins = torch.tensor([largest_margin(subject, target, settings) for target in range(len(subject.head))])
    chance = chance_of_largest(margins.double())
    is_backdoored = chance < settings.level
    return Verdict(
        score=-math.log10(max(chance, 1e-300)),
        probability=1 - chance,
        is_backdoored=is_backdoored,
        targets=(int(margins.argmax()),) if is_backdoored else (),
        evidence={"margins": [round(margin, 3) for margin in margins.tolist()], "p_value": chance},
    )


def largest_margin(subject: Subject, target: int, settings: MmBd) -> float:
    """How far a class' logit can exceed all others, by gradient ascent from random images."""
    generator = torch.Generator().manual_seed(subject.seed + target)
    images = torch.rand(settings.starts, *subject.images.shape[1:], generator=generator)
    images = images.to(subject.images.device).requires_grad_()
    others = torch.arange(len(subject.head), device=images.device) != target
    before = math.inf
    for _ in range(settings.steps):
        logits = subject.logits(images.clamp(0, 1))
        margins = logits[:, target] - logits[:, others].amax(dim=1)
        total = margins.sum().item()
        if before < math.inf and abs(before - total) < settings.tolerance * abs(before):
            break
        before = total
        (gradient,) = torch.autograd.grad(margins.sum(), images)
        with torch.no_grad():
            images += settings.step_size * gradient
    return margins.max().item()


def chance_of_largest(values: Float[Tensor, " classes"]) -> float:
    """p-value of the largest of so many, when all follow the Gamma distribution of the others."""
    ordered = values.sort().values
    shape, start, scale = fit_gamma(ordered[:-1])
    beyond = ((ordered[-1] - start) / scale).clamp(min=0)
    tail = torch.special.gammaincc(torch.tensor(shape, dtype=torch.float64), beyond)
    return float(-torch.expm1(len(values) * torch.log1p(-tail)))


def fit_gamma(sample: Float[Tensor, " values"]) -> tuple[float, float, float]:
    """Shape, start and scale of the likeliest Gamma distribution, as the authors' `scipy.stats.gamma.fit`.

    Shape and scale are found for many starts below the sample, and the likeliest taken. Only shapes from 1 on
    are looked at: below, the likelihood grows without bound as the start nears the smallest value, and what
    scipy returns depends on where it begins.
    """
    sample = sample.double()
    spread = (sample.max() - sample.min()).clamp(min=1e-6)
    starts = sample.min() - spread * torch.logspace(-6, 3, 3001, dtype=torch.float64)
    above = sample - starts.unsqueeze(1)
    mean, mean_log = above.mean(dim=1), above.log().mean(dim=1)
    gap = (mean.log() - mean_log).clamp(min=1e-9)
    shape = (3 - gap + ((gap - 3).square() + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(10):  # Newton's method on log(shape) - digamma(shape) = gap
        slope = 1 / shape - torch.special.polygamma(1, shape)
        shape = (shape - (shape.log() - torch.digamma(shape) - gap) / slope).clamp(min=1e-3)
    scale = mean / shape
    likelihood = (shape - 1) * mean_log - shape - shape * scale.log() - torch.lgamma(shape)
    best = int(likelihood.masked_fill(shape < 1, -torch.inf).argmax())
    return float(shape[best]), float(starts[best]), float(scale[best])


def _random_trigger(subject: Subject, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random mask and pattern, as the arguments of their tanh."""
    channels, height, width = subject.images.shape[1:]
    drawn = torch.rand(1 + channels, height, width, generator=generator).to(subject.images.device)
    free = torch.atanh((2 * drawn - 1) * (1 - 1e-6))
    return free[:1].clone().requires_grad_(), free[1:].clone().requires_grad_()


def _squashed(free: Tensor) -> Tensor:
    """From any number to [0, 1]."""
    return (torch.tanh(free) + 1) / 2


def _stamped(
    pixels: Float[Tensor, "batch 3 height width"],
    mask: Float[Tensor, "1 height width"],
    pattern: Float[Tensor, "3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    covered = _squashed(mask)
    return (1 - covered) * pixels + covered * _squashed(pattern)


def _endless(
    subject: Subject, batch: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "batch 3 height width"]]:
    while True:
        yield from subject.epoch(batch, generator)
