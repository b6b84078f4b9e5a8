"""Lightning task of many tasks at once: train an adapter, score it task by task, label a user's texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import nn

from tasks.multitask.data import MultitaskDataModule, count_repeated
from tasks.multitask.encode import UNKNOWN, Batch, TaskDataset, pad, padding_of
from tasks.multitask.evaluate import (
    MAJORITY,
    Labels,
    Report,
    ScoredTask,
    confusion,
    normalise_loads,
    score,
)
from tasks.multitask.model import MultitaskModel
from tasks.multitask.plots import plot_dependence, plot_experts, plot_scores
from zoo import hub
from zoo.base_models import random_tokens
from zoo.callbacks import BiasBalancing
from zoo.moe import expert_loads, expert_shares, group_dependence, routed_modules
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput, check_network

OURS = "ours"
# Predictions of a file, and characters of a text, that a person is shown; and experts of an example.
SHOWN, SHOWN_CHARACTERS, SPEAKERS = 10, 60, 3
# Examples whose output a checkpoint keeps.
GOLDEN = 4


@dataclass(slots=True)
class Answers:
    """What a model says of the examples of a dataset, and who did the work.

    Attributes:
        answers: In words, in the order of the dataset; None where it was not asked.
        probabilities: Of each answer among the options; NaN where it is free text.
        losses: Cross entropy of the right option; NaN where there is none or it is not known.
        loads: By module, `(examples, E)` of `expert_loads`.
    """

    answers: list[str | None]
    probabilities: list[float]
    losses: list[float]
    loads: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: TaskDataset) -> "Answers":
        """Room for all examples."""
        nothing = [float("nan")] * len(dataset)
        return cls([None] * len(dataset), nothing, nothing.copy())

    def add(
        self, places: Sequence[int], answers: Sequence[str], probabilities: Sequence[float], losses: Sequence[float]
    ) -> None:
        """Keep those of a batch."""
        for place, *of in zip(places, answers, probabilities, losses, strict=True):
            self.answers[place], self.probabilities[place], self.losses[place] = of

    def add_loads(self, places: Sequence[int], loads: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep who worked for those of a batch."""
        for module, load in loads.items():
            if module not in self.loads:
                self.loads[module] = np.zeros((len(self.answers), load.shape[1]), dtype=np.float32)
            self.loads[module][list(places)] = load

    @property
    def asked(self) -> list[int]:
        """Examples with an answer: all, but in a run that is limited to a few batches."""
        return [place for place, answer in enumerate(self.answers) if answer is not None]


class MultitaskTask(MoETask):
    """Train a transformer on many tasks at once, score it, or label a user's texts."""

    model: MultitaskModel
    monitor = "val_average"
    monitor_mode = "max"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        pretrained: str | None = None,
        bias_rate: float = 1e-3,
        new_tokens: int = 16,
        lr: float = 1e-3,
        head_lr: float | None = None,
        router_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the network; it learns of its tasks from the data.

        Args:
            network: Arguments of `tasks.multitask.model.MultitaskModel` that differ from its defaults.
            pretrained: Name of a zoo checkpoint, or a folder written by `zoo.save`, in place of a new network. What it
                does not know of the tasks that are learned from gets heads of its own.
            bias_rate: Step by which the selection biases of SMoRA are moved once per optimiser step.
            new_tokens: Longest answer in free text.
            lr: Peak learning rate of AdamW.
            head_lr: That of the heads, `lr` if left out.
            router_lr: That of the adapters' routers, `lr` if left out. At rates that LoRA takes, a step of Adam moves a
                router's logits by as much as these differ.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.
            gradient_checkpointing: Whether the base's layers are computed again in the backward pass, which takes more
                time, in place of keeping what they made, which takes more memory.

        Raises:
            UnknownNameError: There is no such argument of the network.
            ValueError: Both a new network and a checkpoint are asked for.
        """
        check_network(MultitaskModel, network, pretrained)
        self.network = network or {}
        self.pretrained = pretrained
        self.bias_rate = bias_rate
        self.new_tokens = new_tokens
        self.head_lr = head_lr
        self.router_lr = router_lr
        self.gradient_checkpointing = gradient_checkpointing
        # Of a validation, test or prediction.
        self.answers: Answers | None = None
        super().__init__(lr, weight_decay, warmup)

    def configure_models(self) -> None:
        """Load the checkpoint, or build a new network."""
        if self.pretrained:
            self.model = hub.load_as(self.pretrained, MultitaskModel)
        else:
            self.model = MultitaskModel(**self.network)
        if self.gradient_checkpointing:
            base = self.model.transformer
            # The second name is that of transformers before 5.24.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        # A base comes in eval mode, in which Lightning would leave it.
        self.model.train()

    def configure_callbacks(self) -> list[pl.Callback]:
        """Selection biases that nobody moves would balance nothing."""
        biased = any(module.biased_router is not None for module in routed_modules(self.model).values())
        return [BiasBalancing(self.bias_rate)] if biased else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Heads, which are new to the base in another way than adapters are; routers; and all else that is trained."""
        routers = [parameter for of in routed_modules(self.model).values() for parameter in of.router.parameters()]
        own: list[tuple[list[nn.Parameter], float | None]] = [
            ([*self.model.heads.parameters()], self.head_lr),
            (routers, self.router_lr),
        ]
        known = {parameter for parameters, _ in own for parameter in parameters}
        rest = [parameter for parameter in self.parameters() if parameter.requires_grad and parameter not in known]
        groups = [
            {"params": parameters, "lr": self.lr if rate is None else rate} for parameters, rate in [*own, (rest, None)]
        ]
        return [group for group in groups if group["params"]]

    def setup(self, stage: str) -> None:
        """Bring network and data together: new tasks are added to the network, examples are cut as it reads them.

        Raises:
            ValueError: The network knows a task of this name with other classes, or does not know a task to score, or
                the trainer has several processes.
        """
        self.require_one_process("Scores need all examples of a task, which several would divide among them.")
        if stage == "fit":
            self.model.add_tasks(self.data.learned)
        self.data.encode(self.model.form)

    @property
    def data(self) -> MultitaskDataModule:
        """Where the examples come from."""
        data: MultitaskDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def step(self, batch: Batch) -> StepOutput:
        """Read a batch; the loss is the cross entropy of the right class or option, or of the tokens of the answer."""
        scores = self.model(*batch.inputs)
        if self.model.causal:
            # Its rows are the right answers alone.
            return StepOutput(-scores[:, 0].mean(), scores, batch.labels)
        return StepOutput(nn.functional.cross_entropy(scores, batch.labels), scores, batch.labels)

    # --- answers -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(self, dataset: TaskDataset, batch: Batch, answers: Answers, watch: bool = False) -> None:
        """Keep a batch's answers.

        Args:
            dataset: Where it is from.
            batch: What to read.
            answers: Where they are kept.
            watch: Whether to keep who did the work, too.
        """
        with self.model.watched() as routing:
            scores = self.model(*batch.inputs)
            if watch:
                answers.add_loads(batch.places, expert_loads(routing, batch.owners, len(batch.places)))
        probabilities = scores.softmax(1)
        best = scores.argmax(1).tolist()
        losses = nn.functional.cross_entropy(scores, batch.labels, ignore_index=UNKNOWN, reduction="none")
        losses[batch.labels == UNKNOWN] = float("nan")
        named = []
        for row, place in enumerate(batch.places):
            options = dataset.options[place]
            named.append((options[best[row]], float(probabilities[row, best[row]])) if options else ("", float("nan")))
        free = [row for row, place in enumerate(batch.places) if not dataset.options[place]]
        for row, text in zip(free, self.generate(dataset, [batch.places[row] for row in free]), strict=True):
            named[row] = (text, float("nan"))
            losses[row] = float("nan")
        answers.add(batch.places, *zip(*named, strict=True), losses.tolist())

    def generate(self, dataset: TaskDataset, places: Sequence[int]) -> list[str]:
        """Answers in free text.

        Args:
            dataset: Where the examples are from.
            places: Which of them.
        """
        if not places:
            return []
        rows = [dataset.encoded[place].rows[0] for place in places]
        asked = [row.ids[: len(row.ids) - row.scored] for row in rows]
        longest, pad_id = max(map(len, asked)), padding_of(self.data.tokenizer)
        mask = pad([[1] * len(ids) for ids in asked], longest, 0, left=True).bool()
        ids = pad(asked, longest, pad_id, left=True)
        new = self.model.generate(ids.to(self.device), mask.to(self.device), self.new_tokens, pad_id)
        return [text.strip() for text in self.data.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def judged(
        self, dataset: TaskDataset, answers: Answers, data: MultitaskDataModule | None = None
    ) -> tuple[list[ScoredTask], dict[str, Labels]]:
        """What is right, and what was answered, as numbers by task.

        Args:
            dataset: The examples.
            answers: To them.
            data: Whose metrics are meant; the trainer's by default.
        """
        of_tasks: dict[str, list[int]] = {}
        for place in answers.asked:
            of_tasks.setdefault(dataset.examples[place].task, []).append(place)
        tasks, predictions = [], {}
        for name, places in of_tasks.items():
            metric, positive = (data or self.data).metric_of(name, dataset.form.tasks[name])
            targets, predictions[name] = numbered(dataset, places, [answers.answers[place] or "" for place in places])
            tasks.append(ScoredTask(name, metric, targets, positive))
        return tasks, predictions

    # --- validation, test, prediction --------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Begin new answers."""
        self.answers = Answers.of(self.dataset("val_set"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Answer a batch."""
        self.answer(self.dataset("val_set"), batch, self.kept)

    def on_validation_epoch_end(self) -> None:
        """Log each task's main metric, and their mean."""
        if self.trainer.sanity_checking:
            return
        tasks, predictions = self.judged(self.dataset("val_set"), self.kept)
        found = {
            f"val_{task.name}": float(
                score(confusion(task.targets, predictions[task.name], task.metric), task.metric, task.positive)
            )
            for task in tasks
        }
        self.log_dict(found)
        self.log("val_average", float(np.mean(list(found.values()))), prog_bar=True)

    def on_fit_end(self) -> None:
        """Save the network of the best epoch as a checkpoint in the run folder."""
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        self.load_best()
        golden = self.data.collate(self.dataset("val_set"), range(min(GOLDEN, len(self.dataset("val_set")))))
        tokens = random_tokens(golden.input_ids, self.model.transformer.config.vocab_size)
        per_step = self.data.batch_size * self.trainer.accumulate_grad_batches
        card = adapter_card(self.model, self.data, f"{self.trainer.global_step} steps of {per_step} examples")
        self.model.cpu().eval()
        config = self.data_config(self.data, MultitaskDataModule, "runs/multitask/test")
        hub.save(self.model, folder, card=card, golden_input=[tokens, *golden.inputs[1:]], config=config)
        print(f"Checkpoint: {folder}")

    def on_test_start(self) -> None:
        """Begin new answers."""
        self.answers = Answers.of(self.dataset("test_set"))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Answer a batch, and see who does the work."""
        self.answer(self.dataset("test_set"), batch, self.kept, watch=self.model.routed)

    def report(self, folder: Path) -> dict[str, float]:
        """Print the tables; write `metrics.json`, `predictions.parquet`, `scores.png` and figures of the experts."""
        dataset, answers = self.dataset("test_set"), self.kept
        tasks, predictions = self.judged(dataset, answers)
        report = Report.of(tasks, {OURS: [predictions]})
        asked = [dataset.examples[place] for place in answers.asked]
        title = f"{len(asked)} examples, percent, with 95 % intervals; {MAJORITY}: the best constant answer"
        print_table(title, report.task_rows(OURS))
        if repeated := count_repeated(asked):
            print(f"{repeated} of them repeat a text of the training part: dup_of_train in predictions.parquet.")
        metrics = report.metrics(OURS) | {f"{task.name}/n": float(len(task.targets)) for task in tasks}
        metrics |= {f"{MAJORITY}/{key}": value for key, value in report.metrics(MAJORITY).items()}
        own = {key: report.metrics(OURS)[key] for key in report.main_names()}
        metrics |= self.report_recorded(self.pretrained, own, [MAJORITY])
        pictures = [plot_scores(report, folder / "scores.png")]
        if answers.loads:
            pictures += self.report_experts(dataset, answers, folder, metrics)
        print(f"Pictures: {', '.join(map(str, pictures))}")
        write_metrics(folder, metrics)
        rows = self.answer_rows(dataset, answers)
        for row, example in zip(rows, asked, strict=True):
            row |= {"target": example.label, "dup_of_train": example.in_training}
        write_predictions(folder, rows)
        return metrics

    def report_experts(
        self, dataset: TaskDataset, answers: Answers, folder: Path, metrics: dict[str, float]
    ) -> list[Path]:
        """Draw which experts work for which task, and add how much the task explains of routing to the metrics."""
        loads = normalise_loads({module: load[answers.asked] for module, load in answers.loads.items()})
        tasks = [dataset.examples[place].task for place in answers.asked]
        if len(set(tasks)) == 1:
            dependence = group_dependence(loads, tasks, permutations=1)
            return [plot_experts(expert_shares(loads, tasks), dependence, folder / "experts.png")]
        dependence = group_dependence(loads, tasks)
        for module, found in dependence.items():
            key = f"task_dependence/{module}"
            metrics |= {key: found.explained, f"{key}/chance": found.chance}
        metrics["task_dependence"] = float(np.mean([found.explained for found in dependence.values()]))
        metrics["task_dependence/chance"] = float(np.mean([found.chance for found in dependence.values()]))
        return [
            plot_experts(expert_shares(loads, tasks), dependence, folder / "experts.png"),
            plot_dependence(dependence, folder / "dependence.png"),
        ]

    def answer_rows(self, dataset: TaskDataset, answers: Answers) -> list[dict[str, Any]]:
        """One row per example: the answer, its probability, and its experts in each module."""
        rows = []
        for place in answers.asked:
            example = dataset.examples[place]
            row: dict[str, Any] = {"id": example.id, "task": example.task, "text": example.text}
            row |= {"prediction": answers.answers[place], "probability": answers.probabilities[place]}
            for module, load in answers.loads.items():
                row[f"experts, {module}"] = shares_in_words(load[place])
            rows.append(row)
        return rows

    def on_predict_start(self) -> None:
        """Begin new answers."""
        self.answers = Answers.of(self.dataset("predict_set"))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str | None]:
        """Answer a batch."""
        self.answer(self.dataset("predict_set"), batch, self.kept, watch=self.model.routed)
        return [self.kept.answers[place] for place in batch.places]

    def report_predictions(self, folder: Path) -> None:
        """Print labels with their probability and experts, and write `predictions.parquet`."""
        rows = self.answer_rows(self.dataset("predict_set"), self.kept)
        self.prediction_rows = list(rows)
        last = [f"experts, {module}" for module in self.kept.loads][-1:]
        shown = [row | {"text": shortened(row["text"])} for row in rows[:SHOWN]]
        title = f"{len(shown)} of {len(rows)} answers"
        print_table(title, shown, ["task", "text", "prediction", "probability", *last])
        super().report_predictions(folder)

    @property
    def kept(self) -> Answers:
        """The answers of this stage."""
        if self.answers is None:
            raise ValueError("There are no answers yet: run validation, test or prediction first.")
        return self.answers

    def dataset(self, name: str) -> TaskDataset:
        """A part of the data."""
        dataset: TaskDataset = self.data.require(name)  # type: ignore[assignment]
        return dataset


def numbered(dataset: TaskDataset, places: Sequence[int], answers: Sequence[str]) -> tuple[Labels, Labels]:
    """Numbers of the right answers and of the given ones: places of options; free texts are alike where `plain` is.

    Args:
        dataset: The examples.
        places: Those of one task.
        answers: To these.
    """
    texts: dict[str, int] = {}
    pairs = []
    for place, answer in zip(places, answers, strict=True):
        options, right = dataset.options[place], dataset.examples[place].label or ""
        if options:
            pairs.append((options.index(right), options.index(answer)))
        else:
            first, second = (texts.setdefault(plain(text), len(texts)) for text in (right, answer))
            pairs.append((first, second))
    targets, given = np.array(pairs, dtype=np.int64).T
    return targets, given


def plain(text: str) -> str:
    """A text as free answers are compared: lower case, single spaces."""
    return " ".join(text.lower().split())


def shortened(text: str) -> str:
    """The beginning of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."


def shares_in_words(load: NDArray[np.float32]) -> str:
    """The experts that read most of an example, the first one first.

    Args:
        load: `(E,)` sums of weights.
    """
    shares = load / load.sum()
    order = np.argsort(-shares, kind="stable")[:SPEAKERS]
    return ", ".join(f"{expert} ({shares[expert]:.0%})" for expert in order)


def contents(model: MultitaskModel) -> str:
    """What a checkpoint of a network holds, in words."""
    parts = ["adapters"] * (model.method != "none") + ["heads"] * (len(model.heads) > 0)
    if model.borrowed == "base":
        return f"{' and '.join(parts)} alone".capitalize()
    of_the_base = {"embeddings": "the base's trained layers", "nothing": "the base's trained weights"}[model.borrowed]
    return " and ".join(filter(None, [", ".join(parts), of_the_base])).capitalize()


def adapter_card(model: MultitaskModel, data: MultitaskDataModule, steps: str) -> hub.Card:
    """What a trained network says about itself."""
    names = {"none": "Heads", "lora": "LoRA", "smora": "SMoRA", "mola": "MoLA"}
    return hub.Card(
        title=f"{names[model.method]} for {len(model.tasks)} tasks on {model.base}",
        task="classification and multiple choice of several tasks by one network",
        description=(
            f"{contents(model)}; it needs the base {model.base}. Tasks: {', '.join(model.tasks)}. See the "
            "majority class beside each score."
        ),
        data=f"{data.describe()}; {steps}.",
        data_terms="its trainer's to say",
        weights_licence="its trainer's to say",
        preprocessing={"base": model.base, "max_length": data.max_length},
    )
