"""Lightning task of question answering: train a reader, score it domain by domain, answer a user's questions."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tasks.qa.data import QADataModule, WindowDataset
from tasks.qa.decode import Answer, decode
from tasks.qa.evaluate import (
    Array,
    Report,
    domain_dependence,
    overlap_answers,
    score_answers,
)
from tasks.qa.model import QAReader
from tasks.qa.plots import plot_scores, plot_shares
from tasks.qa.windows import Batch
from zoo import hub
from zoo.base_models import random_tokens
from zoo.errors import UnknownNameError
from zoo.moe import expert_loads, expert_shares
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput, check_network

OURS = "ours"
OVERLAP = "overlap"
# Answers to one question, and questions of a file, that a person is shown.
SHOWN_ANSWERS = 5
SHOWN_QUESTIONS = 10
# Characters of text around an answer that a person is shown.
AROUND = 60
# Arguments of the data that may name a user's own files, or do not go together with another stage.
TRAINING_ALONE = ("augment", "replay")


@dataclass(slots=True)
class Logits:
    """What a reader said of the windows of a dataset, and who did the work.

    Attributes:
        starts: Per window, `(length,)`, in the order of the dataset.
        ends: The same.
        loads: By layer, `(examples, E)` of `expert_loads`.
    """

    starts: list[Any]
    ends: list[Any]
    loads: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: WindowDataset) -> "Logits":
        """Room for all windows."""
        return cls([None] * len(dataset), [None] * len(dataset))

    def add(self, dataset: WindowDataset, batch: Batch, starts: Tensor, ends: Tensor) -> None:
        """Keep a batch's `(B, L)`, without padding."""
        for row, place in enumerate(batch.windows):
            length = len(dataset.windows[place].input_ids)
            self.starts[place] = starts[row, :length].float().cpu().numpy()
            self.ends[place] = ends[row, :length].float().cpu().numpy()


class QATask(MoETask):
    """Train a reader on windows, score its answers, or answer a user's questions."""

    model: QAReader
    monitor = "val_f1"
    monitor_mode = "max"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        pretrained: str | None = None,
        upcycle: str | None = None,
        freezing: dict[str, Any] | None = None,
        mixing: float = 1.0,
        twin: str | None = None,
        dense: str | None = None,
        n_best: int = 20,
        max_answer_tokens: int = 30,
        allow_no_answer: bool = False,
        threshold: float = 0.0,
        lr: float = 2e-4,
        weight_decay: float = 1e-2,
        warmup: float = 0.1,
    ) -> None:
        """Build the reader.

        Args:
            network: Arguments of `tasks.qa.model.QAReader` that differ from its defaults.
            pretrained: Name of a zoo checkpoint, or a folder written by `zoo.save`, in place of a new network.
            upcycle: The same of a reader without mixtures that a new network starts from, see `QAReader.start_from`.
            freezing: What to train of a pretrained reader from now on: arguments of `QAReader.refreeze`. None trains
                what was trained before.
            mixing: Share of what was learned in the average of weights that the fit ends with; the rest is the reader
                it came from: what either knows is kept (WiSE-FT, Wortsman et al. 2022, equation 1).
            twin: A checkpoint of the reader without mixtures, trained alike, that `test` compares with.
            dense: A checkpoint of the plain baseline that `test` compares with.
            n_best: Answers to a question that are kept.
            max_answer_tokens: Longest answer.
            allow_no_answer: Whether the reader may say that the text does not answer the question.
            threshold: By how much no answer has to be above the best answer; see `decode`.
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.

        Raises:
            UnknownNameError: There is no such argument of the network or of freezing.
            ValueError: Both a new network and a checkpoint are asked for, freezing or mixing without a checkpoint, or
                mixing is not in (0, 1]; a reader cannot be upcycled.
        """
        check_network(QAReader, network, pretrained)
        known = list(inspect.signature(QAReader.refreeze).parameters)[1:]
        for name in freezing or {}:
            if name not in known:
                raise UnknownNameError("argument of freezing", name, known)
        if freezing and not pretrained:
            raise ValueError(f"freezing={freezing}: is for a pretrained reader; a new one takes them in network.")
        if not 0 < mixing <= 1:
            raise ValueError(f"mixing={mixing}: must be in (0, 1]; 1 keeps what was learned alone.")
        if mixing < 1 and not (pretrained or upcycle):
            raise ValueError(f"mixing={mixing}: averages a reader with the pretrained one it came from; name that one.")
        if pretrained and upcycle:
            raise ValueError(f"pretrained={pretrained!r} and upcycle={upcycle!r}: name one of them.")
        self.network = network or {}
        self.pretrained = pretrained
        self.upcycle = upcycle
        self.freezing = freezing or {}
        self.mixing = mixing
        self.rival_names = {name: path for name, path in (("twin", twin), ("dense", dense)) if path}
        self.decoding: dict[str, Any] = {
            "n_best": n_best,
            "max_answer_tokens": max_answer_tokens,
            "allow_no_answer": allow_no_answer,
            "threshold": threshold,
        }
        # Of a validation, test or prediction, by the model's name.
        self.logits: dict[str, Logits] = {}
        # A plain mapping, so that Lightning does not save them.
        self.rivals: dict[str, QAReader] = {}
        super().__init__(lr, weight_decay, warmup)

    def configure_models(self) -> None:
        """Load the checkpoint, or build a new network."""
        if self.pretrained:
            self.model = hub.load_as(self.pretrained, QAReader)
            self.model.refreeze(**self.freezing)
        else:
            self.model = QAReader(**self.network)
        if self.upcycle:
            self.model.start_from(hub.load_as(self.upcycle, QAReader))
        # Frozen parameters stay bit-identical, and need no average.
        trained = self.model.named_parameters() if self.mixing < 1 else ()
        self.origin = {name: value.detach().clone() for name, value in trained if value.requires_grad}
        # A base comes in eval mode, in which Lightning would leave it.
        self.model.train()

    def setup(self, stage: str) -> None:
        """Compare the network with the data and the trainer.

        Raises:
            ValueError: They have different base models, or the trainer has several processes.
        """
        self.require_one_process("Answers need all windows of a text, which several would divide among them.")
        if self.data.base != self.model.base:
            raise ValueError(
                f"The reader is built on {self.model.base!r}, the data are cut by the tokenizer of {self.data.base!r}: "
                "set --data.base to the reader's."
            )

    @property
    def data(self) -> QADataModule:
        """Where the windows come from."""
        data: QADataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def step(self, batch: Batch) -> StepOutput:
        """Read a batch of windows; the loss is the mean of that of the starts and that of the ends."""
        starts, ends = self.model(batch.input_ids, batch.attention_mask, batch.type_ids)
        losses = [
            nn.functional.cross_entropy(logits, places)
            for logits, places in ((starts, batch.starts), (ends, batch.ends))
        ]
        return StepOutput(sum(losses) / 2, starts, batch.starts)

    def on_validation_start(self) -> None:
        """Begin new answers."""
        self.logits = {OURS: Logits.of(self.data.require("val_set"))}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep what a batch says; answers can be told once all windows of a text are read."""
        starts, ends = self.model(batch.input_ids, batch.attention_mask, batch.type_ids)
        self.logits[OURS].add(self.data.require("val_set"), batch, starts, ends)

    def on_validation_epoch_end(self) -> None:
        """Log F1 and EM, means over the domains."""
        if self.trainer.sanity_checking:
            return
        dataset: WindowDataset = self.data.require("val_set")
        answers = self.answer(dataset, self.logits[OURS])
        examples = [dataset.examples[place] for place in answers]
        scores = score_answers(examples, [best[0].text for best in answers.values()])
        domains = np.array([example.domain for example in examples])
        for name, values in scores._asdict().items():
            macro = float(np.mean([values[domains == domain].mean() for domain in np.unique(domains)]))
            self.log(f"val_{name}", macro, prog_bar=True)

    def answer(self, dataset: WindowDataset, logits: Logits) -> dict[int, list[Answer]]:
        """Answers, the best first, by the position of their question in the dataset.

        A run that is limited to a few batches answers those questions whose windows were all read.
        """
        unread = {
            window.example for window, starts in zip(dataset.windows, logits.starts, strict=True) if starts is None
        }
        read = [place for place, window in enumerate(dataset.windows) if window.example not in unread]
        answers = decode(
            dataset.examples,
            [dataset.windows[place] for place in read],
            [logits.starts[place] for place in read],
            [logits.ends[place] for place in read],
            **self.decoding,
        )
        return {place: found for place, found in enumerate(answers) if place not in unread}

    def on_fit_end(self) -> None:
        """Save the network of the best epoch, averaged where it is to be, as a checkpoint in the run folder."""
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        self.load_best()
        for name, value in self.origin.items():
            learned = self.model.get_parameter(name).data
            learned.lerp_(value.to(learned.device), 1 - self.mixing)
        dataset: WindowDataset = self.data.require("val_set")
        batch = next(iter(self.data.loader(WindowDataset(dataset.examples, dataset.windows[:2]))))
        tokens = random_tokens(batch.input_ids, self.model.encoder.config.vocab_size)
        golden = [tokens, batch.attention_mask, batch.type_ids]
        card = reader_card(self.model, self.data, self.trainer.current_epoch, self.mixing)
        hub.save(self.model.cpu().eval(), folder, card=card, golden_input=golden, config=self.test_config())
        print(f"Checkpoint: {folder}")

    def test_config(self) -> dict[str, Any]:
        """What `moe-zoo test` runs on the checkpoint: the data learned from, and how answers are chosen."""
        known = inspect.signature(QATask).parameters
        decoding = {name: value for name, value in self.decoding.items() if value != known[name].default}
        config = self.data_config(self.data, QADataModule, "runs/qa/test", decoding)
        for name in TRAINING_ALONE:
            config["data"]["init_args"].pop(name, None)
        return config

    def on_test_start(self) -> None:
        """Load the rivals and begin new results.

        Raises:
            ValueError: A rival has another base: it would read tokens that are not its own.
        """
        self.rivals = {
            name: hub.load_as(path, QAReader).to(self.device).eval() for name, path in self.rival_names.items()
        }
        self.model.require_same_base(self.rivals)
        self.logits = {name: Logits.of(self.data.require("test_set")) for name in (OURS, *self.rivals)}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Read a batch by the reader and its rivals."""
        dataset: WindowDataset = self.data.require("test_set")
        self.read(dataset, batch)
        for name, rival in self.rivals.items():
            self.logits[name].add(dataset, batch, *rival(batch.input_ids, batch.attention_mask, batch.type_ids))

    def read(self, dataset: WindowDataset, batch: Batch) -> None:
        """Read a batch, and add up who did the work."""
        reading = self.model.read(batch.input_ids, batch.attention_mask, batch.type_ids)
        own = self.logits[OURS]
        own.add(dataset, batch, reading.start_logits, reading.end_logits)
        owners = [dataset.windows[place].example for place in batch.windows]
        for layer, load in expert_loads(reading.routing, owners, len(dataset.examples)).items():
            own.loads[layer] = own.loads.get(layer, 0) + load

    def report(self, folder: Path) -> dict[str, float]:
        """Print the tables; write `metrics.json`, `predictions.parquet`, `scores.png` and a mixture's `experts.png`."""
        dataset: WindowDataset = self.data.require("test_set")
        answers = {name: self.answer(dataset, logits) for name, logits in self.logits.items()}
        examples = [dataset.examples[place] for place in answers[OURS]]
        texts = {name: [best[0].text for best in of.values()] for name, of in answers.items()}
        texts[OVERLAP] = overlap_answers(examples)
        scores = {name: [score_answers(examples, found)] for name, found in texts.items()}
        present = {example.domain for example in examples}
        report = Report.of(examples, scores, [name for name in self.data.ood_domains if name in present])
        macro = [key for key in report.metric_names() if "/" not in key]
        print_table(f"Answers to {len(examples)} questions, percent; macro over domains", report.rows(macro))
        print_table("Ours by domain, with 95 % intervals over documents", report.domain_rows(OURS))
        metrics = report.all_metrics(OURS)
        for rival in self.rivals:
            rows = report.difference_rows(OURS, rival, macro)
            print_table(f"Ours minus {rival}, 95 % intervals over documents", rows)
            for row in rows:
                metrics |= {f"minus_{rival}/{row['metric']}{end}": row[key] for end, key in DIFFERENCE_KEYS.items()}
        pictures = [plot_scores(report, folder / "scores.png")]
        if self.logits[OURS].loads:
            pictures.append(self.report_experts(dataset, list(answers[OURS]), folder, metrics))
        print(f"Pictures: {', '.join(map(str, pictures))}")
        write_metrics(folder, metrics)
        rows = self.answer_rows(dataset, answers[OURS])
        goods = zip(examples, *scores[OURS][0], strict=True)
        judged = [{"target": list(example.answers), "f1": f1, "em": em} for example, f1, em in goods]
        write_predictions(folder, [row | good for row, good in zip(rows, judged, strict=True)])
        return metrics

    def report_experts(
        self, dataset: WindowDataset, places: list[int], folder: Path, metrics: dict[str, float]
    ) -> Path:
        """Draw which experts work for which domain, and add whether routing follows domains to the metrics."""
        loads = {layer: load[places] for layer, load in self.logits[OURS].loads.items()}
        domains = [dataset.examples[place].domain for place in places]
        documents = [dataset.examples[place].document for place in places]
        dependence = domain_dependence(loads, domains, documents)
        for layer, found in dependence.items():
            key = f"domain_dependence/{layer}"
            metrics |= {key: found.explained, f"{key}/chance": found.chance}
        return plot_shares(expert_shares(loads, domains), folder / "experts.png", self.data.ood_domains, dependence)

    def answer_rows(self, dataset: WindowDataset, answers: dict[int, list[Answer]]) -> list[dict[str, Any]]:
        """One row per question: the best answer, its score and place, and the experts of its text."""
        rows = []
        for place, found in answers.items():
            example, best = dataset.examples[place], found[0]
            row = {"id": example.id, "domain": example.domain, "question": example.question, "answer": best.text}
            row |= {"score": best.score, "start": best.start, "end": best.end}
            for layer, load in self.logits[OURS].loads.items():
                row[f"experts, {layer}"] = shares_in_words(load[place])
            rows.append(row)
        return rows

    def on_predict_start(self) -> None:
        """Begin new answers."""
        self.prediction_rows = []
        self.logits = {OURS: Logits.of(self.data.require("predict_set"))}

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        """Read a batch, and say which windows it held; answers can be told once all windows of a text are read."""
        self.read(self.data.require("predict_set"), batch)
        return batch.windows

    def report_predictions(self, folder: Path) -> None:
        """Print answers with their place in the text, and write `predictions.parquet`."""
        dataset: WindowDataset = self.data.require("predict_set")
        answers = self.answer(dataset, self.logits[OURS])
        self.prediction_rows = rows = self.answer_rows(dataset, answers)
        layers = [f"experts, {layer}" for layer in self.logits[OURS].loads]
        if len(rows) == 1:
            ((place, found),) = answers.items()
            context = dataset.examples[place].context
            shown = [
                {"answer": one.text or "(none)", "score": one.score, "in the text": in_the_text(context, one)}
                for one in found[:SHOWN_ANSWERS]
            ]
            print_table(rows[0]["question"], shown)
            for layer in layers:
                print(f"{layer.capitalize()}: {rows[0][layer]}")
        else:
            title = f"{min(len(rows), SHOWN_QUESTIONS)} of {len(rows)} answers"
            print_table(title, rows[:SHOWN_QUESTIONS], ["question", "answer", "score", *layers])
        super().report_predictions(folder)


DIFFERENCE_KEYS = {"": "mean", "/low": "low", "/high": "high"}


def shares_in_words(load: Array) -> str:
    """Which experts read a text, the one that read most first.

    Args:
        load: `(E,)` sums of weights.
    """
    shares = load / load.sum()
    order = [expert for expert in np.argsort(-shares, kind="stable") if shares[expert] >= 0.005]
    return ", ".join(f"{expert} ({shares[expert]:.0%})" for expert in order)


def in_the_text(context: str, answer: Answer) -> str:
    """An answer between the characters around it, and where it begins."""
    if answer.start < 0:
        return "-"
    before, after = context[max(answer.start - AROUND, 0) : answer.start], context[answer.end : answer.end + AROUND]
    around = " ".join(f"{before}[{answer.text}]{after}".split())
    return f"{answer.start}: {around}"


def reader_card(model: QAReader, data: QADataModule, epochs: int, mixing: float) -> hub.Card:
    """What a trained reader says about itself."""
    average = f" Weights are an average, {mixing:.0%} of this and the rest of the reader it came from." * (mixing < 1)
    what = "Mixture-of-Experts reader" if model.mixture else "Dense reader (the twin of a mixture)"
    return hub.Card(
        title=f"{what} for extractive question answering",
        task="extractive question answering, in and out of the domains learned from",
        description=(
            f"Finds the answer to a question in a text. Holds what was trained alone and needs the base {model.base}."
        ),
        data=f"{data.describe()}; {epochs} epoch{'s' * (epochs != 1)}.{average}",
        data_terms="its trainer's to say",
        weights_licence="its trainer's to say",
        preprocessing={"base": model.base, "max_length": data.max_length, "stride": data.stride},
    )
