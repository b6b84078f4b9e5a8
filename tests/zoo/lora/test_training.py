"""Training by hand, by transformers' Trainer, by Lightning, in two processes and compiled: the same step everywhere."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from two_ranks import run_ranks

from tests.zoo.lora.networks import make_base, make_config, make_inputs, old_name, output
from tests.zoo.lora.two_adapters import adapted_encoder, train_share
from zoo.callbacks import BiasBalancing
from zoo.lora.trainer import RoutedTrainerMixin
from zoo.moe import collect_aux_losses, routed_modules, update_selection_biases
from zoo.task import MoETask, StepOutput

pytestmark = old_name
both = pytest.mark.parametrize("method", ["smora", "mola"])

LEARNING_RATE = 0.05
BIAS_RATE = 0.01
LOSSES = {"load_balancing": 0.5, "z": 0.1}


class Rows(Dataset):
    """Sequences of several lengths; two rows are a micro-batch, two of these an optimiser step."""

    def __init__(self, network: str) -> None:
        inputs = [make_inputs(network, seed) for seed in range(3)]
        self.rows = [{name: value[row] for name, value in batch.items()} for batch in inputs for row in range(3)][:8]
        for number, row in enumerate(self.rows):
            ids, mask = row["input_ids"], row["attention_mask"]
            row["labels"] = torch.tensor(number % 2) if network == "bert" else ids.masked_fill(mask == 0, -100)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.rows[row]


def adapted(method: str, network: str, **options: Any) -> PeftModel:
    return get_peft_model(make_base(network), make_config(method, network, aux_losses=LOSSES, **options))


def biases(model: nn.Module) -> dict[str, Tensor]:
    found = routed_modules(model).items()
    return {name: m.biased_router.expert_bias for name, m in found if m.biased_router is not None}


def by_hand(model: PeftModel, network: str, accumulate: int) -> dict[str, Tensor]:
    """Plain gradient descent: the loss over all items of a step, and the mean of the auxiliary losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    batches = list(DataLoader(Rows(network), batch_size=2))
    model.train()
    for first in range(0, len(batches), accumulate):
        step = batches[first : first + accumulate]
        # A causal model predicts every position but the first.
        items = [(batch["labels"][:, 1:] != -100).sum() if network == "llama" else torch.tensor(2) for batch in step]
        for batch, count in zip(step, items, strict=True):
            loss = model(**batch).loss * count / sum(items)
            (loss + collect_aux_losses(model).total / len(step)).backward()
        if biases(model):
            update_selection_biases(model, BIAS_RATE)
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What a step changes, without the prefixes of wrappers."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | biases(model)
    return {name[name.index("base_model.") :]: value.clone() for name, value in values.items()}


class RoutedTrainer(RoutedTrainerMixin, Trainer):
    pass


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(folder, **(defaults | options))


class InOrder(RoutedTrainer):
    """Without shuffling, to compare."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("network", ["bert", "llama"])
@both
def test_transformers_trainer_trains_as_by_hand(method: str, network: str, tmp_path: Path) -> None:
    """Also where the trainer does not divide the loss of a micro-batch by their number, as for causal models."""
    expected = by_hand(adapted(method, network), network, accumulate=2)
    model = adapted(method, network)
    before = trained(model)
    options = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = InOrder(model=model, args=options, train_dataset=Rows(network), bias_rate=BIAS_RATE)
    if network == "bert":
        # Its loss is a mean, but transformers takes it for one over all items, as its forward takes any argument.
        trainer.loss_is_scaled_for_ga = False
    trainer.train()
    found = trained(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert {name.rpartition("default.")[2] for name in moved} >= {"lora_A", "lora_B", "router.weight"}
    assert bool(biases(model)) == (method == "smora")
    assert all(bias.abs().max() == pytest.approx(2 * BIAS_RATE) for bias in biases(model).values())
    trainer.eval_dataset = Rows(network)
    assert trainer.evaluate()["eval_loss"] > 0
    assert not collect_aux_losses(model).values


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_transformers_trainer_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Routers and biases come back from its checkpoint."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, resumed = adapted("smora", "llama"), adapted("smora", "llama")
    InOrder(model=whole, args=arguments(tmp_path, **options), train_dataset=Rows("llama")).train()
    trainer = InOrder(model=resumed, args=arguments(tmp_path, **options), train_dataset=Rows("llama"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(trained(resumed), trained(whole))
    assert all(bias.any() for bias in biases(resumed).values())


class Adapted(MoETask):
    """What a task of this zoo does with such a model."""

    def __init__(self, method: str) -> None:
        self.method = method
        super().__init__(LEARNING_RATE)

    def configure_models(self) -> None:
        self.model = adapted(self.method, "bert").train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step(self, batch: dict[str, Tensor]) -> StepOutput:
        out = self.model(**batch)
        return StepOutput(out.loss, out.logits, batch["labels"])


@pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`:UserWarning")
@both
def test_lightning_trains_as_by_hand(method: str, tmp_path: Path) -> None:
    expected = by_hand(adapted(method, "bert"), "bert", accumulate=2)
    task = Adapted(method)
    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[BiasBalancing(BIAS_RATE)] if method == "smora" else [],
    )
    trainer.fit(task, DataLoader(Rows("bert"), batch_size=2), DataLoader(Rows("bert"), batch_size=2))
    torch.testing.assert_close(trained(task), expected, atol=1e-5, rtol=1e-4)
    assert trainer.callback_metrics["train_load_balancing_loss"] > 0


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Losses, gradients and biases under DistributedDataParallel, with padding and two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 2, 3, 6, dtype=torch.long)
    # As many real positions in every share: a mean over processes is then the mean over all.
    mask[0, 0, 0, 4:] = mask[0, 1, 2, 4:] = 0
    batches = {"input_ids": torch.randint(0, 40, (2, 2, 3, 6), generator=generator), "attention_mask": mask}
    torch.save(batches, tmp_path / "batches.pt")
    run_ranks(Path(__file__).with_name("two_adapters.py"), tmp_path)
    one = train_share(adapted_encoder(), {name: value.flatten(1, 2) for name, value in batches.items()})
    assert len(one) == 1 + 12 * 4
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, one[name], msg=name, atol=1e-5, rtol=1e-4)


@both
def test_networks_compile(method: str) -> None:
    """The whole network in eval mode without a break, and one layer in training with all it records."""
    model, inputs = adapted(method, "bert", target_modules=["query"]), make_inputs("bert")
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, inputs), output(model, inputs))
    layer = model.train().base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 7, 16)
    results = []
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = forward(x)
        losses = collect_aux_losses(layer)
        (out.square().mean() + losses.total).backward()
        results.append((out, losses.values, {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}))
        layer.zero_grad()
    torch.testing.assert_close(*results)
