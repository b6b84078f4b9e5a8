"""What customization is worth: baselines, controls, and accuracy against the number of samples.

    python -m studies.customization.study                  run what is missing, then write the table and the figure
    python -m studies.customization.study --only table     only write them

Every (method, seed) is one JSON file in `results/`; a method that has one is not run again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tasks.customization.characters import merge
from tasks.customization.customizer import augment, customize, one_thread
from tasks.customization.data import CharacterDataModule, Samples, UserDataModule, UserSamples, to_float
from tasks.customization.evaluate import accuracy, score_user
from tasks.customization.model import CustomizedLeNet, Features
from zoo import hub
from zoo.data import find
from zoo.report import PALETTE, plot_style, print_table, save_figure

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SEEDS = (0, 1, 2)
SIZES = (10, 25, 50, 100, 200, 400)
# Resamples of the writers for the 95 % intervals of the curve.
RESAMPLES = 10_000

Row = dict[str, Any]


class World:
    """The checkpoint, the users, and everybody else."""

    def __init__(self, checkpoint: str) -> None:
        self.model = cast(CustomizedLeNet, hub.load(checkpoint))
        characters = CharacterDataModule()
        characters.setup()
        train = characters.train_set.samples
        chosen = torch.randint(len(train), (1000,), generator=torch.Generator().manual_seed(0))
        self.replay = to_float(train.images[chosen]), train.labels[chosen]
        test = characters.test_set.samples
        self.generic_images, self.generic_labels = to_float(test.images), test.labels
        self.guest_images, self.guest_labels = self.other_writers(every=10)
        with torch.no_grad():
            self.generic = self.model.features(self.generic_images), self.generic_labels
            self.guests = self.model.features(self.guest_images), self.guest_labels

    def other_writers(self, every: int) -> tuple[Tensor, Tensor]:
        """Samples of single writers who are none of the users."""
        users = json.loads(find(None, "characters/unipen_users.json", "").read_text())["users"]
        with np.load(find(None, "characters/unipen.npz", "")) as file:
            names = [str(name) for name in file["writer_names"]]
            others = file["single_writer"][file["writers"]] & ~np.isin(file["writers"], [names.index(u) for u in users])
            index = np.flatnonzero(others)[::every]
            images, labels = file["images"][index], file["labels"][index].astype(np.int64)
        return to_float(torch.from_numpy(images)), merge(torch.from_numpy(labels))

    def users(self, seed: int, max_samples: int | None = None) -> list[UserSamples]:
        """All users, split by a seed."""
        module = UserDataModule(seeds=[seed], max_samples=max_samples)
        module.setup()
        return module.users


def own(user: UserSamples) -> tuple[Tensor, Tensor]:
    """The images and merged labels that a method may learn from."""
    samples = Samples(torch.cat([user.train.images, user.val.images]), torch.cat([user.train.labels, user.val.labels]))
    return to_float(samples.images), merge(samples.labels)


def mixture_row(world: World, model: CustomizedLeNet, user: UserSamples) -> Row:
    """Scores of a customised model on its user, on generic images and on other writers with the same kind of pen."""
    with torch.no_grad():
        features: Features = model.features(to_float(user.test.images))
        row = score_user(model, (features, merge(user.test.labels)), world.generic)
        guests = score_user(model, world.guests, world.guests)
    return {**row, "guests_before": guests["ge"], "guests": guests["moe"]}


def run_mixture(world: World, seed: int, max_samples: int | None = None, grey_levels: bool = True) -> list[Row]:
    """Our method, with so many samples."""
    model = world.model if grey_levels else without_grey_levels(world)
    rows = []
    for user in world.users(seed, max_samples):
        start = time.perf_counter()
        customised = customize(model, *own(user), seed=seed)
        seconds = time.perf_counter() - start
        scored = world if grey_levels else blind(world, model)
        samples = len(user.train) + len(user.val)
        rows.append(
            {"user": user.user, "samples": samples, **mixture_row(scored, customised, user), "seconds": seconds}
        )
    return rows


def without_grey_levels(world: World) -> CustomizedLeNet:
    """The same checkpoint with a gate that does not see the distribution of grey levels."""
    model = CustomizedLeNet(world.model.variant, grey_levels=False).eval()
    model.global_expert.load_state_dict(world.model.global_expert.state_dict())
    model.fill_replay(*world.replay)
    return model


def blind(world: World, model: CustomizedLeNet) -> World:
    """The world as that gate sees it."""
    seen = copy.copy(world)
    with torch.no_grad():
        seen.generic = model.features(world.generic_images), world.generic_labels
        seen.guests = model.features(world.guest_images), world.guest_labels
    return seen


def run_other_writers(world: World, seed: int) -> list[Row]:
    """Control: local expert and gate learned from 1,000 samples of other writers, so from the pen, not the person."""
    images, labels = world.other_writers(every=1)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:1000]
    customised = customize(world.model, images[chosen], labels[chosen], seed=seed)
    return [{"user": user.user, **mixture_row(world, customised, user)} for user in world.users(seed)]


def run_fine_tuning(world: World, seed: int, whole: bool, replay: bool) -> list[Row]:
    """Fine-tune the last layer or the whole global expert, with or without replay of 1,000 generic images."""
    rows = []
    for user in world.users(seed):
        start = time.perf_counter()
        expert = fine_tune(world, *own(user), seed, whole, replay)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            row = {
                "user": user.user,
                "ge": accuracy(world.model.global_expert(to_float(user.test.images)), merge(user.test.labels)),
                "moe": accuracy(expert(to_float(user.test.images)), merge(user.test.labels)),
                "generic_ge": accuracy(world.generic[0].logits, world.generic_labels),
                "generic_moe": accuracy(expert(world.generic_images), world.generic_labels),
                "guests_before": accuracy(world.guests[0].logits, world.guest_labels),
                "guests": accuracy(expert(world.guest_images), world.guest_labels),
                "seconds": seconds,
            }
        rows.append(row)
    return rows


def fine_tune(world: World, images: Tensor, labels: Tensor, seed: int, whole: bool, replay: bool) -> nn.Module:
    """SGD with momentum and a cosine, 64 augmented own and as many replayed images a step."""
    expert = copy.deepcopy(world.model.global_expert).requires_grad_(whole)
    expert.linears[-1].requires_grad_(True)
    random = torch.Generator().manual_seed(seed)
    steps, rate = (250, 0.01) if whole else (600, 0.03)
    optimizer = torch.optim.SGD([p for p in expert.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with one_thread(), torch.enable_grad():
        for _ in range(steps):
            index = torch.randint(len(labels), (64,), generator=random)
            batch, target = augment(images[index], random), labels[index]
            if replay:
                index = torch.randint(len(world.replay[1]), (64,), generator=random)
                batch, target = torch.cat([batch, world.replay[0][index]]), torch.cat([target, world.replay[1][index]])
            optimizer.zero_grad()
            nn.functional.cross_entropy(expert(batch), target).backward()
            optimizer.step()
            schedule.step()
    return expert


METHODS: dict[str, Callable[[World, int], list[Row]]] = {
    "mixture": run_mixture,
    **{f"mixture-{size}": lambda world, seed, size=size: run_mixture(world, seed, size) for size in SIZES},
    "mixture-no-grey-levels": lambda world, seed: run_mixture(world, seed, grey_levels=False),
    "other-writers": run_other_writers,
    "last-layer": lambda world, seed: run_fine_tuning(world, seed, whole=False, replay=False),
    "last-layer-replay": lambda world, seed: run_fine_tuning(world, seed, whole=False, replay=True),
    "whole-expert": lambda world, seed: run_fine_tuning(world, seed, whole=True, replay=False),
    "whole-expert-replay": lambda world, seed: run_fine_tuning(world, seed, whole=True, replay=True),
}


def rows_of(method: str) -> list[Row]:
    """All recorded rows of a method, over seeds and users."""
    return [row for path in sorted(RESULTS.glob(f"{method}.seed?.json")) for row in json.loads(path.read_text())]


def table() -> list[Row]:
    """One line per method: means, worst cases, and what others lose."""
    lines = []
    for method in METHODS:
        rows = rows_of(method)
        if not rows:
            continue
        gains = [row["moe"] - row["ge"] for row in rows]
        drops = [row["generic_ge"] - row["generic_moe"] for row in rows]
        line: Row = {
            "method": method,
            "user": mean(row["moe"] for row in rows),
            "gain": mean(gains),
            "std": float(np.std(gains)),
            "worst gain": min(gains),
            "generic drop": mean(drops),
            "worst drop": max(drops),
            "guests' change": mean(row["guests"] - row["guests_before"] for row in rows),
        }
        if "oracle" in rows[0]:
            line["oracle share"] = 100 * sum(gains) / sum(row["oracle"] - row["ge"] for row in rows)
        lines.append(line)
    return lines


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    return float(np.mean(list(values)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over writers (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: One number per writer.
    """
    random = np.random.default_rng(0)
    resampled = random.choice(np.array(values), (RESAMPLES, len(values))).mean(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def curve() -> list[Row]:
    """What to expect for so many samples: the gain, its interval and its range over writers, and closed gates."""
    points = []
    for method in (*(f"mixture-{size}" for size in SIZES), "mixture"):
        rows = rows_of(method)
        users = sorted({row["user"] for row in rows})
        gains = [mean(row["moe"] - row["ge"] for row in rows if row["user"] == user) for user in users]
        low, high = interval(gains)
        points.append(
            {
                "samples": mean(row["samples"] for row in rows),
                "gain": mean(gains),
                "low": low,
                "high": high,
                "least": min(gains),
                "most": max(gains),
                "gate closed": 100 * mean(row["route"] == 0 for row in rows),
            }
        )
    return points


def plot_samples(path: Path) -> Path:
    """Gain in accuracy against the number of a user's samples: mean with its interval, and the range of the users."""
    from matplotlib.figure import Figure

    points = curve()
    sizes, means, low, high, least, most = (
        [point[key] for point in points] for key in ("samples", "gain", "low", "high", "least", "most")
    )
    below, above = np.subtract(means, low), np.subtract(high, means)
    with plot_style():
        figure = Figure(figsize=(6.5, 4))
        axes = figure.add_subplot()
        axes.fill_between(sizes, least, most, color=PALETTE[0], alpha=0.15, label="all eleven writers")
        axes.errorbar(
            sizes, means, [below, above], color=PALETTE[0], marker="o", capsize=4, label="their mean, 95 % interval"
        )
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(round(size)) for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("the writer's own samples")
        axes.set_ylabel("gain over the global expert (points)")
        axes.legend(loc="lower right")
        return save_figure(figure, path)


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="customization/lenet5-emnist")
    parser.add_argument("--only", choices=["table"], help="run nothing")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    missing = [
        (method, seed) for seed in SEEDS for method in METHODS if not (RESULTS / f"{method}.seed{seed}.json").is_file()
    ]
    if missing and not options.only:
        torch.set_num_threads(1)
        world = World(options.checkpoint)
        for method, seed in missing:
            print(f"{method}, seed {seed}", flush=True)
            rows = METHODS[method](world, seed)
            (RESULTS / f"{method}.seed{seed}.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = table()
    print_table("Eleven writers, three seeds", lines)
    print_table("Gain against the number of samples: mean over writers, its 95 % interval, and their range", curve())
    (FOLDER / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
    print(plot_samples(FOLDER / "samples.png"))


if __name__ == "__main__":
    main()
