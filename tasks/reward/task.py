"""Lightning task of reward models: train them phase by phase, compare them pair by pair, score a user's answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from tasks.reward.backbone import Backbone, Inputs, pool_states
from tasks.reward.baselines import LoraEnsemble, ObjectiveModel
from tasks.reward.data import (
    HELD_BACK,
    CandidateDataset,
    PairDataset,
    RewardDataModule,
    TextDataset,
    number_prompts,
)
from tasks.reward.evaluate import (
    PERCENT,
    Report,
    confusion_matrix,
    length_differences,
)
from tasks.reward.groups import HARMLESS
from tasks.reward.model import DMoERM, category_numbers
from tasks.reward.plots import plot_consistency, plot_routes
from tasks.reward.texts import Batch, StateStore, fingerprint, pad
from zoo import hub
from zoo.base_models import random_tokens
from zoo.errors import UnknownNameError
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput, check_network, warmup_cosine

MODELS: dict[str, type[Backbone]] = {"dmoerm": DMoERM, "ensemble": LoraEnsemble, "objectives": ObjectiveModel}
OURS, ORACLE, RANDOM, LONGER = "ours", "oracle", "random", "longer"
MEMORY = "memory"
# Prompts that are routed at a time.
ROUTED = 64
# Answers that a person is shown.
SHOWN = 20
DIFFERENCE_KEYS = {"": "mean", "/low": "low", "/high": "high"}


class RewardTask(MoETask):
    """Train a reward model, one phase after another, or compare it with others, or score answers.

    The trainer's epochs are those of all phases together. A phase touches no parameter but its own.
    """

    model: Backbone

    def __init__(
        self,
        kind: str = "dmoerm",
        network: dict[str, Any] | None = None,
        pretrained: str | None = None,
        epochs: dict[str, int] | None = None,
        rivals: dict[str, str] | None = None,
        cache: str | None = None,
        lr: float = 1e-3,
        phase_lr: dict[str, float] | None = None,
        head_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
    ) -> None:
        """Build the model.

        Args:
            kind: `dmoerm`, or a baseline: `ensemble` or `objectives`; see `tasks.reward.model` and `.baselines`.
            network: Arguments of that class that differ from its defaults.
            pretrained: Name of a zoo checkpoint, or a folder written by `zoo.save`, in place of a new network.
            epochs: Of each phase that is trained, see the class's `phases`; their order is that of the phases.
            rivals: Checkpoints of other reward models on the same base, by a name, that `test` compares with.
            cache: Where to keep what the frozen layers make of each text: `memory`, or a folder that later runs find
                it in; about 0.2 MB a text. None computes it anew in every epoch.
            lr: Peak learning rate of AdamW, reached anew in each phase.
            phase_lr: Other rates for some phases.
            head_lr: That of the heads of LoRAs in all phases; that of the LoRAs if left out.
            weight_decay: Its weight decay.
            warmup: Share of a phase's steps in which the rate rises.

        Raises:
            UnknownNameError: There is no such kind, argument of the network, or phase.
            ValueError: Both a new network and a checkpoint are asked for, or a rival has a name that means another.
        """
        if kind not in MODELS:
            raise UnknownNameError("kind of reward model", kind, MODELS)
        check_network(MODELS[kind], network, pretrained)
        self.kind = kind
        self.network = network or {}
        self.pretrained = pretrained
        self.epochs = epochs or {}
        self.rival_names = rivals or {}
        if taken := sorted({*self.rival_names} & {OURS, ORACLE, RANDOM, LONGER}):
            raise ValueError(f"rivals: {', '.join(taken)} is what tables call something else; choose another name.")
        self.phase_lr = phase_lr or {}
        self.head_lr = head_lr
        # Plain mappings, so that Lightning saves none of them.
        self.rivals: dict[str, Backbone] = {}
        self.store = StateStore(None if cache == MEMORY else Path(cache)) if cache else None
        # Names of what is kept, by the base's weights, the layer that is entered (of prompts, depths), and the texts.
        self.state_names: dict[tuple[str, int | tuple[int, ...], TextDataset], list[str]] = {}
        # Of the current phase, by text and inner model.
        self.digests: dict[tuple[int, int], Tensor] = {}
        # Of a test, by the model's name: `(2, n)` rewards of chosen and rejected answers.
        self.rewards: dict[str, NDArray[np.float64]] = {}
        self.routes: NDArray[np.intp] = np.zeros(0, np.intp)
        self.scores: list[dict[str, float]] = []
        super().__init__(lr, weight_decay, warmup)
        for name in {**self.epochs, **self.phase_lr}:
            if name not in self.model.phases:
                raise UnknownNameError(f"phase of {type(self.model).__name__}", name, self.model.phases)
        self.plan = [phase for phase in self.model.phases for _ in range(self.epochs.get(phase, 0))]

    def configure_models(self) -> None:
        """Load the checkpoint, or build a new network."""
        if self.pretrained:
            self.model = hub.load_as(self.pretrained, *MODELS.values())  # type: ignore[type-abstract]
        else:
            self.model = MODELS[self.kind](**self.network)
        self.model.train()

    @property
    def data(self) -> RewardDataModule:
        """Where the texts come from."""
        data: RewardDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    # --- phases ---------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """What the current epoch trains; outside of fitting, the last phase, or the last that the model has."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self.plan[-1] if self.plan else [p for p in self.model.phases if self.model.phase_parameters(p)][-1]
        return self.plan[min(self.trainer.current_epoch, len(self.plan) - 1)]

    def setup(self, stage: str) -> None:
        """Compare the model with the data and the trainer.

        Raises:
            ValueError: They have different bases, the trainer's epochs are not those of the phases, or it has several
                processes.
            UnknownNameError: A category of the training pairs, or of answers to be scored, belongs to no inner model.
        """
        if self.data.base != self.model.base:
            raise ValueError(
                f"The reward model is built on {self.model.base!r}, the data are cut by the tokenizer of "
                f"{self.data.base!r}: set --data.base to the model's."
            )
        self.require_one_process("Phases, in which most of the model is frozen, are for one.")
        if stage == "fit":
            self.check_plan()
        if stage == "predict":
            self.check_categories(self.data.predict_set)
        if stage not in ("fit", "validate"):
            return
        labelled = self.model.labelled_phase in (self.plan or [self.phase])
        self.data.label(self.model.capability_names if labelled else [])
        if stage == "fit" and not {*self.plan} & {*HELD_BACK}:
            # Nobody would learn from what is held back.
            self.data.train_set.held_back[:] = False  # type: ignore[union-attr]
        if len(self.model.groups) > 1:
            for dataset in (self.data.train_set, self.data.val_set):
                if dataset is not None and self.pretrained is not None:
                    self.name_categories(dataset)
                self.check_categories(dataset, needed=True)

    def check_categories(self, dataset: TextDataset | None, needed: bool = False) -> None:
        """Refuse a category of some texts that belongs to no inner model.

        Args:
            dataset: The texts; None has none.
            needed: Whether each has to have one, and the router cannot say.
        """
        if len(self.model.groups) > 1:
            for name in dict.fromkeys(dataset.categories if dataset else ()):
                if (name or needed) and name not in self.model.group_of:
                    raise UnknownNameError(
                        "category without an inner model", name, self.model.group_of, "See network.groups."
                    )

    @torch.no_grad()
    def name_categories(self, dataset: PairDataset) -> None:
        """Let the router of a trained model say to which inner model pairs belong that name no category.

        Args:
            dataset: Changed in place: such a pair gets the first category of that inner model.
        """
        nameless = [row for row, name in enumerate(dataset.categories) if not name]
        # One pair of each prompt.
        rows = list({int(dataset.prompt_of[row]): row for row in nameless}.values())
        first = [(*categories, "")[0] for categories in self.model.groups.values()]
        found: dict[int, str] = {}
        for start in range(0, len(rows), ROUTED):
            batch = dataset.collate(rows[start : start + ROUTED])
            routes = self.model.route(self.prompt_states(self.model, batch, dataset)).argmax(1)  # type: ignore[operator]
            found |= zip(batch.prompts, [first[route] for route in routes.tolist()], strict=True)
        for row in nameless:
            dataset.categories[row] = found[int(dataset.prompt_of[row])]
        if nameless:
            names = dict(zip(first, self.model.groups, strict=True))
            counts = Counter(names[dataset.categories[row]] for row in nameless)
            sent = ", ".join(f"{name} {count}" for name, count in counts.most_common())
            print(f"{len(nameless)} pairs name no category; the router sends them to: {sent}.")

    def check_plan(self) -> None:
        """Refuse a trainer whose epochs are not those of the phases, and phases that the model has no use for."""
        if not self.plan:
            raise ValueError(f"epochs={self.epochs}: nothing is trained; phases are {', '.join(self.model.phases)}.")
        for phase in dict.fromkeys(self.plan):
            if not self.model.phase_parameters(phase):
                raise ValueError(f"epochs={self.epochs}: this {type(self.model).__name__} has nothing for {phase!r}.")
        if self.trainer.max_epochs != len(self.plan):
            raise ValueError(
                f"trainer.max_epochs={self.trainer.max_epochs}: has to be {len(self.plan)}, the sum of epochs="
                f"{self.epochs}."
            )
        if self.trainer.reload_dataloaders_every_n_epochs != 1:
            raise ValueError("Phases learn from other pairs: set trainer.reload_dataloaders_every_n_epochs to 1.")
        self.model.check_plan(self.plan, self.pretrained)

    def configure_optimizers(self) -> Any:
        """AdamW over all that any phase trains; what a phase does not train gets no gradient, and is not touched."""
        trained = {p for phase in self.plan for p in self.model.phase_parameters(phase)}
        heads = set(self.model.head_parameters())
        groups = [
            {"params": [p for p in self.model.parameters() if p in trained & heads], "head_lr": self.head_lr},
            {"params": [p for p in self.model.parameters() if p in trained - heads], "head_lr": None},
        ]
        used = [group for group in groups if group["params"]]
        return torch.optim.AdamW(used, lr=self.lr, weight_decay=self.weight_decay)

    def on_train_epoch_start(self) -> None:
        """Begin a phase, or go on with it; a trained model goes on from what it has."""
        if self.plan.index(self.phase) == self.trainer.current_epoch:
            if self.pretrained is None:
                self.model.begin(self.phase)
            # A phase may train on what an earlier one has trained: it begins without that one's momentum.
            self.optimizers().state.clear()  # type: ignore[union-attr]
            self.digests.clear()
        self.model.apply_phase(self.phase)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the rate: it rises, then falls as a cosine, over each phase anew."""
        batches = int(self.trainer.num_training_batches)
        step = (self.trainer.current_epoch - self.plan.index(self.phase)) * batches + batch_idx
        peak = self.phase_lr.get(self.phase, self.lr)
        factor = warmup_cosine(step, self.plan.count(self.phase) * batches, self.warmup)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = (peak if group["head_lr"] is None else group["head_lr"]) * factor

    def step(self, batch: Batch) -> StepOutput:
        """The phase's loss on training pairs, and which decisions were right."""
        loss, right = self.model.phase_loss(self.phase, self.learned_inputs(batch), batch.preferences)
        return StepOutput(loss, right, right)

    def learned_inputs(self, batch: Batch) -> Inputs:
        """What the phase reads of training pairs; a text that it does not change is digested once."""
        dataset = self.data.require("train_set")
        categories = [dataset.categories[row] for row in batch.rows]  # type: ignore[attr-defined]
        groups = category_numbers(self.model.group_of, categories).repeat(2).tolist()
        keys = list(zip(batch.texts, groups, strict=True))
        if all(key in self.digests for key in keys):
            return self.inputs(self.model, batch, dataset, torch.stack([self.digests[key] for key in keys]))
        inputs = self.inputs(self.model, batch, dataset)
        if self.plan.count(self.phase) > 1:
            inputs.digest = self.model.digest(self.phase, inputs)
        if inputs.digest is not None:
            self.digests |= zip(keys, inputs.digest, strict=True)
        return inputs

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the phase's loss and the share of right decisions on validation pairs."""
        inputs = self.inputs(self.model, batch, self.data.require("val_set"))
        loss, right = self.model.phase_loss(self.phase, inputs, batch.preferences)
        if len(right):
            self.log("val_loss", loss, batch_size=len(right))
            self.log(f"val_{self.phase}", PERCENT * right.float().mean(), prog_bar=True, batch_size=len(right))

    # --- texts ----------------------------------------------------------------------------------------------------

    def inputs(self, model: Backbone, batch: Batch, dataset: Any, digest: Tensor | None = None) -> Inputs:
        """What a model reads of a batch; what is frozen is computed once where it is kept.

        Args:
            model: Which.
            batch: B texts.
            dataset: Where they are from.
            digest: What stands in their place, if anything does.
        """
        categories = [dataset.categories[row] for row in batch.rows]
        groups = category_numbers(model.group_of, categories, -1 if len(model.groups) > 1 else 0).to(batch.mask.device)
        copies = len(batch.texts) // len(batch.rows)
        groups = groups.repeat(copies)
        if digest is not None:
            nothing = digest.new_zeros(len(digest), 0)
            return Inputs(nothing[..., None], nothing.bool(), nothing, nothing, groups, digest)
        hidden = self.states(model, batch, dataset)
        if model.reads_prompts:
            prompts = self.prompt_states(model, batch, dataset).repeat(copies, 1)
        else:
            prompts = hidden.new_zeros(len(batch.texts), model.prompt_width)
        return Inputs(hidden, batch.mask, pool_states(hidden, batch.mask, batch.type_ids), prompts, groups)

    def states(self, model: Backbone, batch: Batch, dataset: TextDataset) -> Tensor:
        """What enters the first adapted layer, `(B, L, D)`."""
        if self.store is None:
            return model.prefix(batch.input_ids, batch.mask, batch.type_ids)
        names = self.kept(self.store, model, dataset, batch.texts)
        lengths = [len(dataset.texts[text].ids) for text in batch.texts]
        return self.store.get(names, lengths, model.dim).to(batch.mask.device)

    def prompt_states(self, model: Backbone, batch: Batch, dataset: TextDataset) -> Tensor:
        """What a router reads of P prompts, see `Backbone.read_prompts`."""
        if self.store is None:
            return model.read_prompts(batch.prompt_ids, batch.prompt_mask)
        names = self.kept(self.store, model, dataset, batch.prompts, of_prompts=True)
        return self.store.get(names, [1] * len(names), model.prompt_width)[:, 0].to(batch.mask.device)

    @torch.no_grad()
    def kept(
        self, store: StateStore, model: Backbone, dataset: TextDataset, places: Sequence[int], of_prompts: bool = False
    ) -> list[str]:
        """Under which names states of some texts are kept; what is not there yet is computed.

        Args:
            store: Where.
            model: Whose base reads them.
            dataset: Where the texts are from.
            places: Theirs there.
            of_prompts: Whether prompts are meant, of which one state each is kept.
        """
        tokens, depth = (dataset.prompts, model.prompt_depths) if of_prompts else (dataset.texts, model.first)
        key = (model.base_sha256, depth, dataset)
        if key not in self.state_names:
            self.state_names[key] = [fingerprint(model.base_sha256, depth, one.ids, one.types) for one in tokens]
        names = self.state_names[key]
        if missing := [place for place in dict.fromkeys(places) if not store.has(names[place])]:
            device = next(model.parameters()).device
            ids, mask, types = (part.to(device) for part in pad([tokens[place] for place in missing], dataset.pad_id))
            found = model.read_prompts(ids, mask)[:, None] if of_prompts else model.prefix(ids, mask, types)
            lengths = [1 if of_prompts else len(tokens[place].ids) for place in missing]
            store.put([names[place] for place in missing], lengths, found)
        return [names[place] for place in places]

    # --- after fitting --------------------------------------------------------------------------------------------

    def on_fit_end(self) -> None:
        """Save the model as a checkpoint in the run folder; all that was trained is what is saved."""
        self.model.requires_grad_(False)
        batch = self.data.require("val_set").collate([0])  # type: ignore[attr-defined]
        vocabulary = self.model.encoder.config.vocab_size
        golden = [random_tokens(batch.input_ids, vocabulary), batch.mask, batch.type_ids]
        golden += [random_tokens(batch.prompt_ids, vocabulary).repeat(2, 1), batch.prompt_mask.repeat(2, 1)]
        config = self.data_config(self.data, RewardDataModule, "runs/reward/test")
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        card = reward_card(self.model, self.data, self.epochs)
        hub.save(self.model.cpu().eval(), folder, card=card, golden_input=golden, config=config)
        print(f"Checkpoint: {folder}")

    # --- testing --------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Load the rivals and begin new results.

        Raises:
            ValueError: A rival has another base: it would read tokens that are not its own.
        """
        self.rivals = {
            name: hub.load_as(path, *MODELS.values()).to(self.device).eval()  # type: ignore[type-abstract]
            for name, path in self.rival_names.items()
        }
        self.model.require_same_base(self.rivals)
        count = len(self.data.require("test_set"))  # type: ignore[arg-type]
        names = [OURS, *([ORACLE, RANDOM] if len(self.model.groups) > 1 else []), *self.rivals]
        self.rewards = {name: np.full((2, count), np.nan) for name in names}
        self.routes = np.full(count, -1, dtype=np.intp)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of pairs by the model and its rivals."""
        dataset = self.data.require("test_set")
        inputs = self.inputs(self.model, batch, dataset)
        reading = self.model.read(inputs)
        self.keep(OURS, batch, reading.reward)
        self.routes[batch.rows] = reading.route[: len(batch.rows)].cpu().numpy()
        if ORACLE in self.rewards:
            self.keep(ORACLE, batch, self.model.read(inputs, oracle=True).reward)
            self.keep(RANDOM, batch, self.model.read(astray(self.model, inputs, batch), oracle=True).reward)
        for name, rival in self.rivals.items():
            self.keep(name, batch, rival.read(self.inputs(rival, batch, dataset)).reward)

    def keep(self, name: str, batch: Batch, rewards: Tensor) -> None:
        """Keep the rewards `(2P,)` of a batch's pairs."""
        self.rewards[name][:, batch.rows] = rewards.double().cpu().numpy().reshape(2, -1)

    def report(self, folder: Path) -> dict[str, float]:
        """Print the tables; write `metrics.json`, `predictions.parquet` and the figures."""
        dataset: PairDataset = self.data.require("test_set")  # type: ignore[assignment]
        read = np.flatnonzero(self.routes >= 0)
        pairs = [dataset.pairs[place] for place in read]
        lengths = length_differences(pairs)
        differences = {name: (of[0] - of[1])[read] for name, of in self.rewards.items()} | {LONGER: lengths}
        categories = [pair.category for pair in pairs]
        report = Report.of(categories, number_prompts(pairs), lengths, differences, goals_of(categories))
        print_table(f"Consistency on {len(pairs)} pairs, percent", report.rows())
        print_table("Ours with 95 % intervals over prompts", report.interval_rows(OURS))
        metrics = report.all_metrics(OURS)
        own = {name: metrics[name] for name in report.main_names()}
        metrics |= self.report_recorded(self.pretrained, own, differences)
        for rival in differences:
            if rival != OURS:
                rows = report.difference_rows(OURS, rival)
                print_table(f"Ours minus {rival}, 95 % intervals over prompts", rows)
                for row in rows:
                    metrics |= {f"minus_{rival}/{row['metric']}{end}": row[key] for end, key in DIFFERENCE_KEYS.items()}
        pictures = [plot_consistency(report, folder / "consistency.png")]
        pictures += self.report_routes(pairs, read, folder, metrics)
        print(f"Pictures: {', '.join(map(str, pictures))}")
        write_metrics(folder, metrics)
        write_predictions(folder, self.pair_rows(pairs, read))
        return metrics

    def report_routes(self, pairs: Any, read: NDArray[np.intp], folder: Path, metrics: dict[str, float]) -> list[Path]:
        """Print and draw where the router sends the prompts of each group, each prompt once."""
        names = list(self.model.groups)
        wanted = [self.model.group_of.get(pair.category, -1) for pair in pairs]
        first = np.unique(number_prompts(pairs), return_index=True)[1]
        known = [place for place in first.tolist() if wanted[place] >= 0]
        if len(names) < 2 or not known:
            return []
        matrix = confusion_matrix([wanted[p] for p in known], self.routes[read][known].tolist(), len(names))
        metrics["router_acc"] = PERCENT * float(np.trace(matrix) / matrix.sum())
        metrics["router_acc_largest_group"] = PERCENT * float(matrix.sum(axis=1).max() / matrix.sum())
        rows = [
            {"prompts of": name, **dict(zip(names, row.tolist(), strict=True))}
            for name, row in zip(names, matrix, strict=True)
        ]
        print_table(f"Outer router: {metrics['router_acc']:.1f} % of {matrix.sum()} prompts right; sent to", rows)
        return [plot_routes(matrix, names, folder / "router.png")]

    def pair_rows(self, pairs: Any, read: NDArray[np.intp]) -> list[dict[str, Any]]:
        """One row per pair."""
        names = list(self.model.groups)
        rows = []
        for place, pair in zip(read, pairs, strict=True):
            row: dict[str, Any] = {"id": pair.id, "category": pair.category, "target": "chosen"}
            row["inner model"] = names[self.routes[place]]
            for name, (chosen, rejected) in ((name, of[:, place]) for name, of in self.rewards.items()):
                row |= {f"{name}: chosen": chosen, f"{name}: rejected": rejected}
            ours = self.rewards[OURS][:, place]
            row["prediction"] = "chosen" if ours[0] > ours[1] else "rejected" if ours[0] < ours[1] else "tie"
            rows.append(row)
        return rows

    # --- prediction -----------------------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        """Begin new results."""
        self.prediction_rows = []

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score a batch of answers; a category that is named says which inner model reads them."""
        dataset: CandidateDataset = self.data.require("predict_set")  # type: ignore[assignment]
        inputs = self.inputs(self.model, batch, dataset)
        reading = self.model.read(inputs, oracle=True)
        routes = torch.where(inputs.groups >= 0, inputs.groups, reading.route).tolist()
        names = list(self.model.groups)
        for number, (row, route) in enumerate(zip(batch.rows, routes, strict=True)):
            one = dataset.candidates[row]
            scores = zip(self.model.score_names(route), reading.scores[number].tolist(), strict=True)
            found = {"prompt": one.prompt, "answer": one.answer, "reward": float(reading.reward[number])}
            self.prediction_rows.append(found | {"inner model": names[route]} | dict(scores))
        return reading.reward

    def report_predictions(self, folder: Path) -> None:
        """Print answers with their reward and rank, 1 for the best of a prompt, and write `predictions.parquet`."""
        rows: list[dict[str, Any]] = [dict(row) for row in self.prediction_rows]
        rewards: dict[str, list[float]] = {}
        for row in rows:
            rewards.setdefault(row["prompt"], []).append(row["reward"])
        for row in rows:
            row["rank"] = 1 + sum(reward > row["reward"] for reward in rewards[row["prompt"]])
        self.prediction_rows = rows
        first = ["answer", "rank", "reward", "inner model"]
        scores = list(dict.fromkeys(name for row in rows for name in row if name not in (*first, "prompt")))
        shown = [row | {"answer": shorten(row["answer"])} for row in rows[:SHOWN]]
        print_table(f"{len(shown)} of {len(rows)} answers", shown, [*first, *scores])
        super().report_predictions(folder)


def astray(model: Backbone, inputs: Inputs, batch: Batch) -> Inputs:
    """The same texts with an inner model for each prompt that is drawn at random: what the router is worth.

    Args:
        model: Whose inner models.
        inputs: Of the batch.
        batch: Pairs.
    """
    drawn = [np.random.default_rng(prompt).integers(len(model.groups)) for prompt in batch.prompts]
    groups = torch.tensor(drawn, device=inputs.groups.device).repeat(len(inputs.groups) // len(drawn))
    return replace(inputs, groups=groups)


GOALS = ("helpful", "harmless")


def goals_of(categories: list[str]) -> dict[str, list[str]]:
    """The two goals of the development data, where both are there."""
    harmless = [name for name in dict.fromkeys(categories) if name in HARMLESS]
    helpful = [name for name in dict.fromkeys(categories) if name not in HARMLESS]
    return dict(zip(GOALS, (helpful, harmless), strict=True)) if harmless and helpful else {}


def shorten(text: str, length: int = 60) -> str:
    """The beginning of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def reward_card(model: Backbone, data: RewardDataModule, epochs: dict[str, int]) -> hub.Card:
    """What a trained reward model says about itself."""
    whats = {
        DMoERM: "Double-layer mixture of LoRA experts",
        LoraEnsemble: "LoRA ensemble",
        ObjectiveModel: "Several objectives on one LoRA",
    }
    single = isinstance(model, DMoERM) and len(model.groups) == 1 and not model.capability_names
    what = "Single LoRA" if single else whats[type(model)]
    phases = ", ".join(f"{phase} {count}" for phase, count in epochs.items())
    return hub.Card(
        title=f"{what} as a reward model",
        task="reward modelling: which of two answers to a prompt people prefer",
        description=(
            f"Scores answers to prompts. Holds what was trained alone and needs the base {model.base}. Rewards compare "
            "answers to the same prompt; across prompts they mean nothing."
        ),
        data=f"{data.describe(bool(model.capability_names))}; epochs by phase: {phases}.",
        data_terms="its trainer's to say",
        weights_licence="its trainer's to say",
        preprocessing={"base": model.base, "max_length": data.max_length, "least_prompt": data.least_prompt},
    )
