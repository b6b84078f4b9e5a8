"""MIGA expert by expert against loops, what its attention may see, what a score may depend on, and its twin."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tasks.stocks.data import StocksDataModule
from tasks.stocks.evaluate import routing_agreement
from tasks.stocks.losses import ic_loss
from tasks.stocks.model import ENCODERS, ConvBlock, GroupAttention, Miga
from tasks.stocks.panel import RobustScaler
from zoo import hub
from zoo.moe import collect_aux_losses, load_balancing_loss, record_usage

FEATURES, WINDOW = 5, 6
# What tells styles apart, and what their rules read.
PLANTED = [
    *("STD5", "STD20", "STD60", "VSTD5", "VSTD20", "VSTD60"),
    *("ROC5", "MA5", "MA10", "VMA5", "VMA20", "WVMA20", "KUP"),
]
SMALL: dict[str, Any] = {
    "features": FEATURES,
    "window": WINDOW,
    "hidden_dim": 16,
    "num_groups": 3,
    "experts_per_group": 4,
    "top_k": 3,
    "expert_dim": 8,
    "dropout": 0.2,
}


def miga(**changes: Any) -> Miga:
    torch.manual_seed(0)
    return Miga(**(SMALL | changes)).eval()


@pytest.fixture(params=ENCODERS)
def model(request: pytest.FixtureRequest) -> Iterator[Miga]:
    with torch.no_grad():
        yield miga(encoder=request.param)


def day(stocks: int = 7, window: int = WINDOW) -> torch.Tensor:
    return torch.randn(stocks, window, FEATURES)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("changes", [{}, {"window": 1}, {"mixture": False}, {"attention": False}, {"layers": 1}])
def test_one_finite_score_for_every_stock(encoder: str, changes: dict[str, Any]) -> None:
    model = miga(encoder=encoder, **changes)
    for stocks in (1, 7):
        features = day(stocks, model.window)
        features[0, -1] = float("nan")
        features[-1] = float("nan")
        features[0, 0, 0] = float("inf")
        scores, routing = model.score(features)
        assert scores.shape == (stocks,) and torch.isfinite(scores).all()
        assert torch.equal(model(features), scores)
        assert (routing is None) == (not model.mixture)


def attend(group: torch.Tensor, attention: GroupAttention) -> torch.Tensor:
    """What the experts `(M, d)` of one group and stock become, head by head."""
    width = group.shape[1] // attention.num_heads
    query, key, value = attention.project(attention.norm(group)).chunk(3, dim=1)
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        match = torch.stack([torch.stack([q @ k for k in key[:, part]]) for q in query[:, part]]) / width**0.5
        heads.append(match.softmax(1) @ value[:, part])
    return group + attention.join(torch.cat(heads, 1))


def test_a_score_is_the_weighted_sum_of_the_chosen_experts(model: Miga) -> None:
    features = day()
    scores, routing = model.score(features)
    layer = model.experts
    for stock, state in enumerate(model.norm(model.encode(features))):
        heads = [
            down @ nn.functional.gelu(up @ state + up_bias) + down_bias
            for up, up_bias, down, down_bias in zip(
                layer.experts.up_proj,
                layer.experts.up_bias,
                layer.experts.down_proj,
                layer.experts.down_bias,
                strict=True,
            )
        ]
        groups = torch.stack(heads).view(3, 4, 8)
        heard = torch.cat([attend(group, layer.mixer[1]) for group in groups])
        logits = layer.router.weight @ state
        chosen = logits.argsort(descending=True)[:3]
        weights = logits[chosen].exp() / logits[chosen].exp().sum()
        total = sum(weight * heard[expert] for weight, expert in zip(weights, chosen, strict=True))
        assert scores[stock] == pytest.approx(model.readout(total).item(), abs=1e-5)
        assert routing.expert_index[stock].tolist() == chosen.tolist()
        assert torch.allclose(routing.expert_weight[stock], weights, atol=1e-6)


def test_attention_stays_inside_a_group_and_reaches_all_of_it() -> None:
    attention = GroupAttention(num_groups=3, dim=8, num_heads=2)
    outputs = torch.randn(5, 12, 8)
    changed = outputs.clone()
    changed[:, 5] += torch.randn(8)
    moved = (attention(changed) - attention(outputs)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert torch.equal(attention(outputs)[2:3], attention(outputs[2:3])), "and inside a stock"


def test_chosen_experts_hear_the_others_of_their_group_only_with_attention() -> None:
    features = day(1)
    for attention in (True, False):
        model = miga(attention=attention)
        scores, routing = model.score(features)
        chosen = routing.expert_index[0].tolist()
        beside = next(expert for expert in range(12) if expert not in chosen and expert // 4 == chosen[0] // 4)
        with torch.no_grad():
            model.experts.experts.up_bias[beside] += 1
        assert (model(features) == scores).all() != attention


def test_stocks_do_not_see_each_other(model: Miga) -> None:
    features = day()
    scores = model(features)
    order = torch.randperm(len(features))
    assert torch.allclose(model(features[order]), scores[order], atol=1e-6)
    assert torch.allclose(torch.cat([model(features[i : i + 1]) for i in range(7)]), scores, atol=1e-6)


def test_every_day_of_the_window_counts(model: Miga) -> None:
    features = day()
    for past in range(WINDOW):
        changed = features.clone()
        changed[:, past] += 1
        assert not torch.allclose(model(changed), model(features), atol=1e-5), past
    assert not torch.allclose(model(features.flip(1)), model(features), atol=1e-5)


@pytest.mark.parametrize("length", [1, 4, WINDOW])
def test_the_temporal_kernel_is_a_causal_depth_wise_convolution(length: int) -> None:
    block = ConvBlock(16, WINDOW, length, dropout=0.0)
    states = torch.randn(3, WINDOW, 16)
    conv = nn.Conv1d(16, 16, WINDOW, padding=WINDOW - 1, groups=16, bias=False)
    with torch.no_grad():
        conv.weight[:, 0] = block.kernel.flip(1)
        filtered = conv(states.transpose(1, 2))[..., :WINDOW].transpose(1, 2)
        expected = (states + block.mix(filtered))[:, -length:]
        assert torch.allclose(block(states), expected, atol=1e-6)


def test_without_layers_the_encoder_is_linear_in_the_latest_day() -> None:
    model = miga(layers=0)
    first, second = day(), day()
    mean = model.encode((first + second) / 2)
    assert torch.allclose(mean, (model.encode(first) + model.encode(second)) / 2, atol=1e-6)
    assert torch.equal(model.encode(torch.cat([second[:, :-1], first[:, -1:]], 1)), model.encode(first))


@pytest.mark.parametrize("mixture", [True, False])
def test_the_linear_path_adds_the_latest_days_scaled_features(mixture: bool) -> None:
    with_path, without = miga(linear_path=True, mixture=mixture), miga(mixture=mixture)
    for model in (with_path, without):
        model.standardise_by(RobustScaler(*np.float32([[2.0], [0.5]]).repeat(FEATURES, 1)))
    missing, unexpected = with_path.load_state_dict(without.state_dict(), strict=False)
    assert missing == ["linear.weight"] and not unexpected
    features = 2 + 0.5 * day()
    assert torch.equal(with_path(features), without(features))
    weight = torch.arange(FEATURES) - 2.0
    with_path.linear.weight.data.copy_(weight)
    added = with_path(features) - without(features)
    assert torch.allclose(added, ((features[:, -1] - 2) / 0.5).clamp(-3, 3) @ weight, atol=1e-5)


def test_features_are_scaled_as_the_scaler_does() -> None:
    random = np.random.default_rng(0)
    features = random.normal(5, 10, (4, WINDOW, FEATURES)).astype(np.float32)
    features[1, 2, 3] = np.nan
    scaler = RobustScaler(*random.uniform(1, 6, (2, FEATURES)).astype(np.float32))
    model = miga()
    assert torch.equal(model.standardise(torch.ones(1, 1, FEATURES)), torch.ones(1, 1, FEATURES))
    model.standardise_by(scaler)
    expected = scaler.apply(features)
    assert (np.abs(expected) == 3).any()
    np.testing.assert_allclose(model.standardise(torch.from_numpy(features)), expected, rtol=1e-6)


def test_the_twin_is_as_large_as_the_experts_that_speak() -> None:
    for changes in ({}, {"top_k": 8, "num_groups": 7, "experts_per_group": 9, "expert_dim": 16, "hidden_dim": 64}):
        model, twin = miga(**changes), miga(mixture=False, **changes)
        assert parameters(twin.encode) == parameters(model.encode)
        active = parameters(model.experts.experts) * model.top_k / (model.num_groups * model.experts_per_group)
        # Only the K output biases become one.
        assert active - parameters(twin.experts) == (model.top_k - 1) * model.expert_dim


@pytest.mark.parametrize("encoder", ENCODERS)
def test_everything_learns(encoder: str) -> None:
    model = miga(encoder=encoder, top_k=12).train()
    (model(day(30)).square().mean() + collect_aux_losses(model).total).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_balance_loss_and_its_coefficient() -> None:
    model = miga(balance=0.5).train()
    _, routing = model.score(day(30))
    expected = load_balancing_loss(routing).item()
    assert expected > 1
    aux = collect_aux_losses(model)
    assert aux.total.item() == pytest.approx(0.5 * expected)
    for factor in (0.96, 0.0, 1.0):
        model.scale_balance(factor)
        _, routing = model.score(day(30))
        total = collect_aux_losses(model).total.item()
        assert total == pytest.approx(0.5 * factor * load_balancing_loss(routing).item())
    twin = miga(mixture=False).train()
    twin.scale_balance(0.5)
    twin(day())
    assert collect_aux_losses(twin).total == 0


def test_the_balance_loss_wakes_experts_that_nobody_chooses() -> None:
    model = miga(balance=1.0).train()
    with torch.no_grad():
        model.experts.router.weight[4:] *= 0.01
        model.experts.router.weight[:4] = model.norm(model.encode(day(50))).mean(0)
    optimizer = torch.optim.Adam([model.experts.router.weight], 0.01)
    for _ in range(60):
        model(day(50))
        optimizer.zero_grad()
        collect_aux_losses(model).total.backward()
        optimizer.step()
    with record_usage(model.eval()) as usages, torch.no_grad():
        model(day(200))
    assert not usages["experts"].dead


def test_dropped_experts_are_dropped_whole_and_in_training_only() -> None:
    model = miga(attention=False, expert_dropout=0.5).train()
    ones = torch.ones(200, 12, 8)
    seen = model.experts.mixer(ones)
    assert set(seen.unique().tolist()) == {0.0, 2.0}
    assert (seen == seen[..., :1]).all() and 0.4 < (seen == 0).float().mean() < 0.6
    assert torch.equal(model.eval().experts.mixer(ones), ones)
    with_attention = miga(expert_dropout=0.5)
    assert isinstance(with_attention.experts.mixer[0], nn.Dropout1d)


def test_a_checkpoint_brings_its_scaling(tmp_path) -> None:
    model = miga(encoder="gru", balance=0.01)
    model.standardise_by(RobustScaler(*np.full((2, FEATURES), 3, dtype=np.float32)))
    card = hub.Card("title", "task", "words", "data", "terms", "licence")
    features = day()
    loaded = hub.load(hub.save(model, tmp_path / "checkpoint", card=card, golden_input=features))
    assert torch.equal(loaded(features), model(features))
    assert not torch.equal(loaded(features), miga(encoder="gru")(features))
    assert loaded.experts.aux_losses == {"load_balancing": 0.01}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"encoder": "convolution"}, "conv, gru, transformer"),
        ({"activation": "linear"}, "identity"),
        ({"top_k": 1}, "top_k=1: the weight of a single expert"),
        ({"top_k": 13}, "top_k=13"),
        ({"num_heads": 3}, "expert_dim=8, num_heads=3"),
        ({"num_heads": 8}, "two or more"),
        ({"window": 0}, "window=0"),
        ({"encoder": "gru", "layers": 0}, "layers=0"),
        ({"encoder": "transformer", "hidden_dim": 18}, "hidden_dim=18"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        miga(**arguments)


@pytest.mark.parametrize("shape", [(WINDOW, FEATURES), (3, WINDOW + 1, FEATURES), (3, WINDOW, FEATURES + 1)])
def test_features_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 6, 5\)"):
        miga()(torch.zeros(shape))


# --- the mechanism ---------------------------------------------------------------------------------------------------


def trained_on(data: StocksDataModule, mixture: bool) -> Miga:
    """A network as of configs/stocks/planted.yaml after four quick epochs."""
    torch.manual_seed(0)
    network = {"layers": 0, "hidden_dim": 16, "num_groups": 4, "experts_per_group": 1, "top_k": 2, "balance": 0.03}
    model = Miga(len(PLANTED), 1, activation="identity", mixture=mixture, **network)
    model.standardise_by(data.scaler)
    days = [data.train_set[place] for place in range(len(data.train_set))]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, 4 * len(days), pct_start=0.1)
    for epoch in range(4):
        for place in np.random.default_rng((0, epoch)).permutation(len(days)):
            loss = ic_loss(model(days[place].features), days[place].labels) + collect_aux_losses(model).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def test_routing_finds_planted_styles_and_beats_one_head() -> None:
    market = {"days": 400, "stocks": 400, "signal": 0.35}
    data = StocksDataModule(source="generated", features=PLANTED, window=1, market=market)
    data.setup()
    days = [data.test_set[place] for place in range(len(data.test_set))]
    ic = {}
    for mixture in (False, True):
        model = trained_on(data, mixture)
        with torch.no_grad():
            scores, weights = zip(*(model.explain(day.features) for day in days), strict=True)
        ic[mixture] = np.mean([-float(ic_loss(*pair)) for pair in zip(scores, [d.returns for d in days], strict=True)])
    styles = [data.styles[row, day.positions] for row, day in zip(data.test_set.days, days, strict=True)]
    assert routing_agreement(torch.cat(weights).numpy(), 4, np.concatenate(styles)) >= 0.7
    assert ic[True] - ic[False] > 0.02
