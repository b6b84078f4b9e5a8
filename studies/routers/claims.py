"""What each paper says, as a comparison of two methods over the same seeds, and whether it shows here."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from studies.rows import Row

Number = Callable[[Row], float]

# A difference in validation loss below this counts as equal quality: an eighth of what four times the width of the
# dense twin's mixtures gains a causal model.
SAME_LOSS = 0.01
# Two-sided 95 % quantiles of Student's t for 1 to 4 degrees of freedom: two to five seeds.
STUDENT = (12.706, 4.303, 3.182, 2.776)

SHOWS, SHOWS_NOT, OPPOSITE, OPEN = "shows", "does not show", "the opposite shows", "open"


def loss(row: Row) -> float:
    """Validation loss in nats per token."""
    return float(row["val_loss"])


def active(row: Row) -> float:
    """Routed experts per token."""
    return float(row["active_experts"])


def specialisation(row: Row) -> float:
    """Share of the domains' entropy that an expert gives away."""
    return float(row["specialisation"])


def imbalance(row: Row) -> float:
    """Load of the busiest expert over the mean."""
    return float(row["load_max_over_mean"])


def hard_minus_easy(row: Row) -> float:
    """Experts per token of the hardest quarter of tokens, less those of the easiest."""
    return float(row["active_by_difficulty"][-1] - row["active_by_difficulty"][0])


def last_minus_first(row: Row) -> float:
    """Experts per token of the last mixture, less those of the first."""
    return float(row["active_per_layer"][-1] - row["active_per_layer"][0])


@dataclass(frozen=True, slots=True)
class Claim:
    """One comparison.

    Attributes:
        source: Who says so.
        words: What, in a line.
        method: The method of the claim.
        other: What it is compared with; None compares with zero.
        number: What is compared.
        rule: Whether the number should be `lower` or `higher`, beyond the interval over seeds; or `same`: not higher by
            `SAME_LOSS` or more.
    """

    source: str
    words: str
    method: str
    other: str | None
    number: Number
    rule: Literal["lower", "higher", "same"]


CLAIMS = (
    Claim(
        "Demons in the Detail", "a larger balance batch specialises", "global-64", "micro-4", specialisation, "higher"
    ),
    Claim("Demons in the Detail", "and lowers the loss", "global-64", "micro-4", loss, "lower"),
    Claim("Dynamic routing", "top-p is as good as top-2", "top-p", "top2", loss, "same"),
    Claim("Dynamic routing", "with fewer experts", "top-p", "top2", active, "lower"),
    Claim("Dynamic routing", "harder tokens get more", "top-p", None, hard_minus_easy, "higher"),
    Claim("Dynamic routing", "lower layers get more", "top-p", None, last_minus_first, "lower"),
    Claim("AdaMoE", "null experts are as good as top-2", "null", "top2", loss, "same"),
    Claim("AdaMoE", "with fewer experts", "null", "top2", active, "lower"),
    Claim("AdaMoE", "also in a trained model", "retrofit-null", "top2", loss, "same"),
    Claim("AdaMoE", "with fewer experts there", "retrofit-null", "top2", active, "lower"),
    Claim("AdaMoE", "harder tokens get more", "null", None, hard_minus_easy, "higher"),
    Claim("DeepSeekMoE", "fine experts beat coarse ones", "fine-grained", "top2", loss, "lower"),
    Claim("DeepSeekMoE", "fine and shared beat plain top-2", "deepseek", "top2", loss, "lower"),
    Claim("DeepSeekMoE", "and GShard", "deepseek", "gshard", loss, "lower"),
    Claim("DeepSeekMoE", "and equal GShard at 1.5 times the width", "deepseek", "gshard-1.5", loss, "same"),
    Claim("DeepSeek-V3", "bias balancing is as good as a loss", "sigmoid-bias", "top2", loss, "same"),
    Claim("DeepSeek-V3", "and balances better", "sigmoid-bias", "top2", imbalance, "lower"),
    Claim("RMoE", "a recurrent router beats a linear one", "recurrent", "top2-weak", loss, "lower"),
    Claim("EvoMoE", "from dense to sparse beats top-1 throughout", "dense-to-sparse", "switch", loss, "lower"),
    Claim("THOR", "random experts and consistency beat Switch", "thor", "switch", loss, "lower"),
    Claim("StableMoE", "a frozen router beats one that learns on", "stable", "switch", loss, "lower"),
    Claim("Hash layers", "a fixed table is as good as Switch", "hash", "switch", loss, "same"),
    Claim("BASE", "balanced assignment is as good as Switch", "base", "switch", loss, "same"),
    Claim("X-MoE", "a cosine router beats a linear one", "cosine", "top2", loss, "lower"),
    Claim("Expert choice", "choosing by experts beats top-2", "expert-choice", "top2", loss, "lower"),
    Claim("Soft MoE", "soft slots beat top-2", "soft", "top2", loss, "lower"),
    Claim("Read-ME", "one decision for all layers is as good", "pre-gate", "top2", loss, "same"),
)


def judge(claim: Claim, rows: Mapping[str, Sequence[Row]]) -> Row | None:
    """Compare over the seeds that both methods have.

    Args:
        claim: What to compare.
        rows: Of every method, all of one objective.

    Returns:
        The mean difference, half its 95 % interval over seeds, and the verdict; None where a method has no rows.
    """
    seeds = {row["seed"]: claim.number(row) for row in rows.get(claim.method, ())}
    others = (
        {row["seed"]: claim.number(row) for row in rows.get(claim.other, ())}
        if claim.other
        else dict.fromkeys(seeds, 0.0)
    )
    differences = [value - others[seed] for seed, value in seeds.items() if seed in others]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    half = math.inf
    if len(differences) > 1:
        quantile = STUDENT[min(len(differences) - 2, len(STUDENT) - 1)]
        half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "source": claim.source,
        "claim": claim.words,
        "compared": f"{claim.method} - {claim.other}" if claim.other else claim.method,
        "number": claim.number.__name__.replace("_", " "),
        "seeds": len(differences),
        "difference": mean,
        "+-": half if math.isfinite(half) else None,
        "verdict": verdict(claim.rule, mean, half),
    }


def verdict(rule: str, mean: float, half: float) -> str:
    """A claim in two words.

    Args:
        rule: Of the claim.
        mean: Difference.
        half: Half its interval.
    """
    if rule == "same":
        if mean + half < SAME_LOSS:
            return SHOWS
        return OPPOSITE if mean - half > SAME_LOSS else OPEN if mean < SAME_LOSS else SHOWS_NOT
    wanted = -mean if rule == "lower" else mean
    if abs(mean) <= half:
        return OPEN if wanted > 0 else SHOWS_NOT
    return SHOWS if wanted > 0 else OPPOSITE
