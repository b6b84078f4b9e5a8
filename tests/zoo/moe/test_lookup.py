"""Tables of token ids: hash layers and StableMoE's two stages."""

import pytest
import torch

from zoo.moe import (
    GroupedExperts,
    HashRouter,
    MoELayer,
    Router,
    StableMoERouter,
    StochasticRouter,
    collect_aux_losses,
    distillation_loss,
)

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(20, (40,), generator=torch.Generator().manual_seed(1))


def test_hash_routes_by_id_alone() -> None:
    router = HashRouter(4, 20, top_k=2)
    routing = router(X, token_ids=IDS)
    assert torch.equal(routing.expert_index, router.table[IDS]) and not list(router.parameters())
    assert (routing.expert_weight == 0.5).all()
    assert torch.equal(HashRouter(4, 20, top_k=2, seed=0).table, router.table)
    assert not torch.equal(HashRouter(4, 20, top_k=2, seed=1).table, router.table)
    with pytest.raises(ValueError, match="token_ids=None"):
        router(X)


def test_given_table_and_learned_gate() -> None:
    table = [[token % 4, (token + 1) % 4] for token in range(20)]
    router = HashRouter(4, 20, top_k=2, table=table, input_dim=8)
    routing = router(X, token_ids=IDS)
    assert torch.equal(routing.expert_index, torch.tensor(table)[IDS])
    logits = (X @ router.weight.T).gather(1, routing.expert_index)
    torch.testing.assert_close(routing.expert_weight, torch.softmax(logits, 1))
    single = HashRouter(4, 20, input_dim=8)
    probs = torch.softmax(X @ single.weight.T, 1)
    routing = single(X, token_ids=IDS)
    torch.testing.assert_close(routing.expert_weight, probs.gather(1, routing.expert_index))


def test_balanced_table_evens_out_zipfian_traffic() -> None:
    frequencies = [1 / rank for rank in range(1, 201)]
    traffic = {}
    for kind in ("balanced", "random"):
        table = HashRouter(4, 200, table=kind, frequencies=frequencies).table[:, 0]
        traffic[kind] = torch.zeros(4).index_add_(0, table, torch.tensor(frequencies))
    assert traffic["balanced"].max() / traffic["balanced"].mean() < 1.01
    assert traffic["random"].max() / traffic["random"].mean() > 1.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5}, "top_k=5: must not exceed num_experts=4"),
        ({"table": "sorted"}, "table='sorted'"),
        ({"table": "balanced"}, "frequencies=None"),
        ({"table": "balanced", "frequencies": [1.0]}, "1 values"),
        ({"table": [[0], [1]]}, r"shape \(2, 1\).*must have shape \(3, 1\)"),
        ({"table": [[0], [1], [4]]}, r"0\.\.3"),
        (
            {"table": [[0, 1], [1, 1], [2, 2]], "top_k": 2},
            r"table=\[\[1, 1\]\]: must hold 2 different experts in a row",
        ),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_bad_tables(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HashRouter(**{"num_experts": 4, "vocab_size": 3, **options})


@pytest.mark.parametrize("router", [HashRouter(4, 20, top_k=2), StableMoERouter(8, 4, 20)])
@pytest.mark.parametrize(("ids", "found"), [([0, -1], "'-1..0'"), ([20, 3], "'3..20'")])
def test_token_ids_outside_the_vocabulary(router: Router, ids: list[int], found: str) -> None:
    ids, x = torch.tensor(ids), X[:2]
    with pytest.raises(ValueError, match=rf"token_ids={found}: must be in 0\.\.19, as vocab_size=20"):
        router(x, token_ids=ids)
    known = (ids >= 0) & (ids < 20)
    padded = router(x, token_ids=ids, mask=known)
    assert torch.equal(padded.expert_index[known], router(x[known], token_ids=ids[known]).expert_index)


def test_stable_router_learns_its_own_choice_and_then_freezes_it() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(20, 8)
    x = embeddings[IDS]  # contextless, so that the student can be perfect
    layer = MoELayer(StableMoERouter(8, 4, 20), GroupedExperts(4, 8, 16), aux_losses={"distillation": 1.0})
    router = layer.router
    optimizer = torch.optim.Adam([router.embedding.weight, router.student_weight], lr=0.1)
    losses = []
    for _ in range(40):
        layer(x, token_ids=IDS)
        loss = collect_aux_losses(layer).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    learned = router(x, token_ids=IDS)
    assert torch.equal(learned.expert_index[:, 0], (x @ router.weight.T).argmax(1))
    router.freeze()
    frozen = router(torch.randn(40, 8), token_ids=IDS)
    assert torch.equal(frozen.expert_index, learned.expert_index), "in stage 2 the token id decides"
    assert not frozen.distilled_logits.requires_grad and frozen.expert_weight.requires_grad
    fresh = StableMoERouter(8, 4, 20)
    fresh.load_state_dict(router.state_dict())
    assert fresh.frozen
    with pytest.raises(ValueError, match="student"):
        distillation_loss(HashRouter(4, 20)(X, token_ids=IDS))


def test_stochastic_router_draws_one_expert_for_the_batch() -> None:
    router = StochasticRouter(4)
    drawn = [router(X).expert_index for _ in range(40)]
    assert all(index.unique().numel() == 1 for index in drawn)
    assert {int(index[0, 0]) for index in drawn} == {0, 1, 2, 3}
    averaged = router.eval()(X)
    assert torch.equal(averaged.expert_index, torch.arange(4).expand(40, 4)) and (averaged.expert_weight == 0.25).all()
    sample = torch.arange(40) // 10
    by_sample = StochasticRouter(4, "sample").eval()(X, sample_index=sample).expert_index.view(4, 10)
    assert all(row.unique().numel() == 1 for row in by_sample)
    assert StochasticRouter(4, "unit").eval()(X).expert_index.unique().numel() == 4
