"""MIGA: an encoder of each stock's last days, groups of experts that attend to one another, a router that weighs a few.

Plain torch. One call scores one day: N stocks (units), T days of window, F features; D is the width of a stock's state.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tasks.stocks.panel import CLIP, RobustScaler
from zoo.errors import UnknownNameError
from zoo.moe import FeedForward, GroupedExperts, MoELayer, RoutingOutput, TopKRouter

BALANCE = "load_balancing"
# Of the Transformer encoder.
HEADS = 4


class Miga(nn.Module):
    """Mixture of experts with group aggregation (Yu et al. 2024, arXiv 2410.02241) for one day's cross-section.

    An encoder maps each stock's window to a state. All experts, small heads, run on the state; inside each group they
    attend to one another, so that those which are chosen also hear the others. The router keeps the K largest logits of
    a stock and weighs their experts by a softmax over these alone; one linear map turns the weighted sum into a score.

    Nothing is compared between stocks: a stock's score does not depend on which others are scored. Scores of one day
    can be ranked; their level and scale mean nothing under the IC loss.

    Called with features it returns the scores alone; `score` tells more.

    Attributes:
        feature_median: `(F,)`, what features are centred by.
        feature_scale: `(F,)`, what they are divided by.
    """

    feature_median: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        features: int = 20,
        window: int = 20,
        encoder: Literal["conv", "gru", "transformer"] = "conv",
        hidden_dim: int = 64,
        layers: int = 2,
        num_groups: int = 7,
        experts_per_group: int = 9,
        top_k: int = 8,
        expert_dim: int = 16,
        num_heads: int = 2,
        activation: Literal["identity", "gelu"] = "gelu",
        attention: bool = True,
        dropout: float = 0.1,
        expert_dropout: float = 0.0,
        balance: float = 2e-3,
        mixture: bool = True,
        linear_path: bool = False,
    ) -> None:
        """Build the network.

        Args:
            features: F.
            window: T, at least 1; with 1 the convolutional encoder is a residual MLP.
            encoder: `conv` (blocks like ModernTCN's), `gru` or `transformer`.
            hidden_dim: D.
            layers: Of the encoder. Without any, `conv` is a linear map of the latest day's features.
            num_groups: Groups of experts.
            experts_per_group: Experts in each.
            top_k: K, experts that speak for a stock.
            expert_dim: Width inside and behind every expert.
            num_heads: Of the attention inside groups.
            activation: Of the experts; with `identity` they are linear, as the paper's.
            attention: False leaves it out: a plain mixture of experts.
            dropout: Inside the encoder, in training.
            expert_dropout: Share of a stock's experts whose output is dropped in training.
            balance: Coefficient of the balance loss, see `scale_balance`.
            mixture: False builds the twin: one head as large as K experts in place of the mixture.
            linear_path: Adds a linear map of the latest day's features to the score, which starts at 0. Encoder and
                experts then need to learn only what is not linear.

        Raises:
            UnknownNameError: There is no such encoder.
            ValueError: Sizes do not fit each other.
        """
        super().__init__()
        if encoder not in ENCODERS:
            raise UnknownNameError("encoder", encoder, ENCODERS)
        if min(features, window) < 1 or layers < (encoder != "conv"):
            raise ValueError(
                f"features={features}, window={window}, layers={layers}: each must be at least 1, but layers=0 is "
                "allowed with encoder='conv'."
            )
        if expert_dim % num_heads or expert_dim == num_heads:
            raise ValueError(f"expert_dim={expert_dim}, num_heads={num_heads}: a head needs two or more of the width.")
        if mixture and top_k < 2:
            raise ValueError(f"top_k={top_k}: the weight of a single expert is always 1 and would teach no router.")
        self.features = features
        self.window = window
        self.encoder = encoder
        self.hidden_dim = hidden_dim
        self.layers = layers
        self.num_groups = num_groups
        self.experts_per_group = experts_per_group
        self.top_k = top_k
        self.expert_dim = expert_dim
        self.num_heads = num_heads
        self.activation = activation
        self.attention = attention
        self.dropout = dropout
        self.expert_dropout = expert_dropout
        self.balance = balance
        self.mixture = mixture
        self.linear_path = linear_path
        self.register_buffer("feature_median", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.encode = ENCODERS[encoder](features, window, hidden_dim, layers, dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        self.experts = self.build_mixture() if mixture else self.build_twin()
        self.readout = nn.Linear(expert_dim, 1)
        if linear_path:
            self.linear = nn.Linear(features, 1, bias=False)
            nn.init.zeros_(self.linear.weight)

    def build_mixture(self) -> MoELayer:
        """Router, experts and the attention between them.

        Of the core's balance losses `load_balancing` is used: it counts the experts that stocks really chose, and its
        gradient reaches, through the softmax over all experts, those that no stock chose.
        """
        width, experts = self.expert_dim, self.num_groups * self.experts_per_group
        mixer: nn.Module = nn.Dropout1d(self.expert_dropout)
        if self.attention:
            mixer = nn.Sequential(mixer, GroupAttention(self.num_groups, width, self.num_heads))
        return MoELayer(
            TopKRouter(self.hidden_dim, experts, self.top_k, order="topk_then_softmax", num_groups=self.num_groups),
            GroupedExperts(
                experts, self.hidden_dim, width, out_dim=width, activation=self.activation, gated=False, bias=True
            ),
            experts_first=True,
            mixer=mixer,
            aux_losses={BALANCE: self.balance},
        )

    def build_twin(self) -> FeedForward:
        """One expert as wide as those that speak for a stock together."""
        width = self.expert_dim
        return FeedForward(
            self.hidden_dim, self.top_k * width, out_dim=width, activation=self.activation, gated=False, bias=True
        )

    def standardise_by(self, scaler: RobustScaler) -> None:
        """Adopt the scaling of the training data, which is saved with the network; without, features stay as they are.

        Args:
            scaler: Fitted on the network's features.
        """
        for buffer, values in ((self.feature_median, scaler.median), (self.feature_scale, scaler.scale)):
            buffer.copy_(torch.from_numpy(values))

    def scale_balance(self, factor: float) -> None:
        """Set the balance loss's coefficient to `factor * balance`; the paper's reproduction lowers it over epochs."""
        if isinstance(self.experts, MoELayer):
            self.experts.aux_losses[BALANCE] = factor * self.balance

    def forward(self, features: Tensor) -> Tensor:
        """Score a day's stocks, `(N,)`; the argument is that of `score`."""
        return self.score(features)[0]

    def score(self, features: Tensor) -> tuple[Tensor, RoutingOutput | None]:
        """Score a day's stocks, and say which experts spoke for each.

        Args:
            features: `(N, T, F)` as computed; NaN, a feature without a value, counts as the feature's median.

        Returns:
            Scores `(N,)`, and the routing, which a twin does not have.

        Raises:
            ValueError: The shape is another.
        """
        if features.ndim != 3 or features.shape[1:] != (self.window, self.features):
            raise ValueError(
                f"features has shape {tuple(features.shape)}, expected (N, {self.window}, {self.features}): stocks, "
                "days, features."
            )
        scaled = self.standardise(features)
        state = self.norm(self.encode(scaled))
        if isinstance(self.experts, MoELayer):
            heard, routing = self.experts(state, return_routing=True)
        else:
            heard, routing = self.experts(state), None
        scores = self.readout(heard)
        if self.linear_path:
            scores = scores + self.linear(scaled[:, -1])
        return scores.squeeze(-1), routing

    def explain(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Score a day's stocks, and say how much each expert weighed; the argument is that of `score`.

        Returns:
            Scores `(N,)` and weights `(N, E)` that sum to 1; a twin has no experts, so that its E is 0.
        """
        scores, routing = self.score(features)
        return scores, routing.dense_weight() if routing else scores.new_zeros(len(scores), 0)

    def standardise(self, features: Tensor) -> Tensor:
        """What `RobustScaler.apply` does."""
        scaled = (features - self.feature_median) / self.feature_scale
        return scaled.clamp(-CLIP, CLIP).nan_to_num(nan=0.0)


class MigaEnsemble(nn.Module):
    """The mean score of networks that differ in their seeds alone.

    Each network's scores have a scale of their own, by which they are divided first. As of one network, a stock's score
    does not depend on which others are scored.

    Attributes:
        score_scale: `(size,)`, what each network's scores are divided by.
    """

    score_scale: Tensor

    def __init__(self, network: dict[str, Any], size: int = 5) -> None:
        """Build the networks.

        Args:
            network: Arguments of `Miga`, the same for all.
            size: Number of networks.

        Raises:
            ValueError: There is none.
        """
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: an ensemble needs at least 1 network.")
        self.network = network
        self.size = size
        self.members = nn.ModuleList(Miga(**network) for _ in range(size))
        self.register_buffer("score_scale", torch.ones(size))

    @property
    def features(self) -> int:
        """F."""
        return self.first.features

    @property
    def window(self) -> int:
        """T."""
        return self.first.window

    @property
    def first(self) -> Miga:
        """The first network."""
        network: Miga = self.members[0]  # type: ignore[assignment]
        return network

    def forward(self, features: Tensor) -> Tensor:
        """Score a day's stocks, `(N,)`; the argument is that of `Miga.score`."""
        return self.explain(features)[0]

    def explain(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Score a day's stocks, and say how much each expert weighed; the argument is that of `Miga.score`.

        Returns:
            Scores `(N,)` and weights `(N, size * E)` that sum to 1, those of the first network's experts first.
        """
        scores, weights = zip(*(network.explain(features) for network in self.members), strict=True)
        mean = sum(score / scale for score, scale in zip(scores, self.score_scale, strict=True)) / self.size
        return mean, torch.cat(weights, 1) / self.size


class GroupAttention(nn.Module):
    """Multi-head self-attention among the experts of a group, whose outputs are the sequence; nothing crosses groups.

    The outputs are normalised before and kept beside it. All groups share the projections.
    """

    def __init__(self, num_groups: int, dim: int, num_heads: int) -> None:
        """Build it.

        Args:
            num_groups: Experts form this many equal contiguous groups.
            dim: Width of an expert's output.
            num_heads: Heads, which divide the width.
        """
        super().__init__()
        self.num_groups = num_groups
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 3 * dim)
        self.join = nn.Linear(dim, dim)

    def forward(self, outputs: Tensor) -> Tensor:
        """Map the outputs of all experts `(N, E, dim)` to the same shape."""
        projected = self.project(self.norm(outputs)).unflatten(1, (self.num_groups, -1)).flatten(0, 1)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heard = nn.functional.scaled_dot_product_attention(query, key, value)
        heard = self.join(heard.transpose(1, 2).flatten(2))
        return outputs + heard.view_as(outputs)


class ConvEncoder(nn.Module):
    """Blocks in the manner of ModernTCN (Luo and Wang 2024, ICLR) over features mixed into one stream."""

    def __init__(self, features: int, window: int, dim: int, layers: int, dropout: float) -> None:
        """Build the blocks; arguments as those of `Miga`, D being `dim`."""
        super().__init__()
        self.embed = nn.Linear(features, dim)
        # Only the latest day leaves the encoder: the last block computes no other.
        lengths = [1 if layer == layers - 1 else window for layer in range(layers)]
        self.blocks = nn.ModuleList(ConvBlock(dim, window, length, dropout) for length in lengths)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, F)` to states `(N, D)`."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x[:, -1]


class ConvBlock(nn.Module):
    """A depth-wise convolution over time, then a mixing of channels, beside what came in.

    The kernel is as long as the window and sees past days only.
    """

    lags: Tensor

    def __init__(self, dim: int, window: int, length: int, dropout: float) -> None:
        """Build it.

        Args:
            dim: D.
            window: T.
            length: How many of the latest days to compute.
            dropout: In training.
        """
        super().__init__()
        bound = window**-0.5
        self.kernel = nn.Parameter(torch.empty(dim, window).uniform_(-bound, bound))
        self.mix = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(dim, dim),
            nn.Dropout(dropout),
        )
        days = torch.arange(window)
        lags = days[-length:, None] - days
        # Days to come have the lag T, where the kernel is padded with 0.
        self.register_buffer("lags", lags.where(lags >= 0, window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, D)` to the latest days, `(N, length, D)`."""
        # As a product: torch's depth-wise convolution takes ten times as long on a CPU.
        weight = nn.functional.pad(self.kernel, (0, 1))[:, self.lags]
        out: Tensor = x[:, -len(self.lags) :] + self.mix(torch.einsum("nsd,dts->ntd", x, weight))
        return out


class GruEncoder(nn.Module):
    """A GRU; a stock's state is the last one."""

    def __init__(self, features: int, window: int, dim: int, layers: int, dropout: float) -> None:
        """Build the GRU; arguments as those of `Miga`, D being `dim`."""
        super().__init__()
        self.gru = nn.GRU(features, dim, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, F)` to states `(N, D)`."""
        state: Tensor = self.gru(x)[0][:, -1]
        return state


class TransformerEncoder(nn.Module):
    """A small Transformer over days with learned positions; a stock's state is that of the latest day."""

    def __init__(self, features: int, window: int, dim: int, layers: int, dropout: float) -> None:
        """Build the layers; arguments as those of `Miga`, D being `dim`.

        Raises:
            ValueError: The heads do not divide D.
        """
        super().__init__()
        if dim % HEADS:
            raise ValueError(f"hidden_dim={dim}: the transformer has {HEADS} heads, which must divide it.")
        self.embed = nn.Linear(features, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(window, dim))
        layer = nn.TransformerEncoderLayer(
            dim, HEADS, 2 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, F)` to states `(N, D)`."""
        state: Tensor = self.layers(self.embed(x) + self.positions)[:, -1]
        return state


ENCODERS: dict[str, Callable[[int, int, int, int, float], nn.Module]] = {
    "conv": ConvEncoder,
    "gru": GruEncoder,
    "transformer": TransformerEncoder,
}
