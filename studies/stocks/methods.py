"""The methods of the comparison: networks that differ in a few arguments, and what learns without a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DAYS = {"features": "alpha158", "window": 5}
LATEST = {"features": "alpha158", "window": 1}
LONG = {"features": "alpha20", "window": 20}
# Of all networks, so that what differs is what a method's line says.
COMMON = {"features": 158, "window": 5, "dropout": 0.3, "linear_path": True}
EXPERTS = {"balance": 0.02, "expert_dropout": 0.1}


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        what: In words.
        network: Arguments of `Miga` besides `COMMON`; None learns without a network.
        data: Features and window.
        loss: Of training.
        lr: Peak learning rate.
        epochs: The most; the best on the validation year is kept.
    """

    what: str
    network: Mapping[str, Any] | None = None
    data: Mapping[str, Any] = field(default_factory=lambda: DAYS)
    loss: str = "ic"
    lr: float = 1e-4
    epochs: int = 5


def one_head(what: str, **changes: Any) -> Method:
    """A network with one head in place of the experts."""
    network = {"mixture": False, **changes.pop("network", {})}
    return Method(what, network, **changes)


MIGA = Method("MIGA, convolutional encoder", EXPERTS)
MLP: dict[str, Any] = {"network": {"window": 1}, "data": LATEST}


def long(network: Mapping[str, Any]) -> dict[str, Any]:
    """What a network on 20 features of 20 days changes."""
    return {
        "network": {**network, "features": 20, "window": 20, "linear_path": False},
        "data": LONG,
        "lr": 3e-4,
    }


GRU20 = long({"encoder": "gru"})

METHODS: dict[str, Method] = {
    "miga-conv": MIGA,
    "miga-gru": replace(MIGA, what="MIGA, GRU", network={**EXPERTS, "encoder": "gru"}),
    "miga-transformer": replace(
        MIGA, what="MIGA, Transformer", network={**EXPERTS, "encoder": "transformer", "layers": 1}
    ),
    "miga-gru-20": replace(
        MIGA, what="MIGA, GRU on 20 features of 20 days, no linear path", **long({**EXPERTS, "encoder": "gru"})
    ),
    "no-attention": replace(
        MIGA, what="miga-conv without attention in groups", network={**EXPERTS, "attention": False}
    ),
    "twin": one_head("miga-conv with one head of equal active size"),
    "gru": one_head("GRU, IC loss", network={"encoder": "gru"}),
    "gru-mse": one_head("GRU, squared error", network={"encoder": "gru"}, loss="mse"),
    "gru-20": one_head("GRU on 20 features of 20 days, no linear path", **GRU20),
    "gru-20-mse": one_head("the same, squared error", **GRU20, loss="mse"),
    "mlp": one_head("residual MLP on the day alone, IC loss", **MLP),
    "mlp-mse": one_head("the same, squared error", **MLP, loss="mse"),
    "ridge": Method("ridge regression on the day alone", data=LATEST),
    "trees-qlib": Method("LightGBM with Qlib's parameters, z-scores", data=LATEST),
    "trees": Method("LightGBM, rate 0.05, ranks", data=LATEST),
    "low-volatility": Method("minus the volatility of 20 days", data=LATEST),
}
# What the experts' arrangement is worth: chosen on the validation year.
for groups, per_group, top_k in ((1, 8, 4), (4, 4, 4), (7, 9, 4), (7, 9, 16), (14, 9, 8)):
    METHODS[f"groups-{groups}x{per_group}-k{top_k}"] = replace(
        MIGA,
        what=f"miga-conv with {groups} x {per_group}, {top_k} of them speak",
        network={**EXPERTS, "num_groups": groups, "experts_per_group": per_group, "top_k": top_k},
    )
# These have no seed.
DETERMINISTIC = ("ridge", "low-volatility")
