"""What reward models are worth to a real policy: best-of-n against a gold reward, and a policy that learns from picks.

    python -m studies.reward.policy                            run what is missing, then write the tables and the figure
    python -m studies.reward.policy --proxies dmoerm single ensemble/worst --seeds 0
    python -m studies.reward.policy --only table

Needs the networks that `studies.reward.study` leaves in `runs/`, those of the method `gold` among them. Answers are
drawn once and kept in `runs/answers/`; the rewards that a (proxy, seed) gives them, and every (proxy, seed) of the
distillation, are JSON files in `results/`.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from studies.options import check_names
from studies.release import find_run
from studies.reward.methods import GOLD, METHODS, PROXIES
from studies.reward.study import FOLDER, SEEDS, Run, StudyData, checkpoint, line, load_network, numbers
from studies.rows import Row, is_done, write_whole
from tasks.reward.backbone import Backbone
from tasks.reward.baselines import REDUCTIONS
from tasks.reward.best_of_n import Curve, best_of_n_curve, mean_over_prompts, picked
from tasks.reward.data import limit_pairs
from tasks.reward.examples import Candidate, Pair
from tasks.reward.plots import plot_best_of_n
from tasks.reward.policy import Answered, Policy, rate
from tasks.reward.texts import SPEAKER, fingerprint
from zoo import hub
from zoo.base_models import MINILM, SMOLLM2, load_tokenizer
from zoo.comparison import Array
from zoo.report import print_table

# Picks that need no reward model.
RANDOM, LONGER = "random", "longer"
TURN = re.compile(r"\n(?:user|assistant|human): ?", re.IGNORECASE)
# Characters of a prompt that the policy is asked.
LONGEST = 300
# Answers that are drawn at once.
TOGETHER = 32


def single_turns(pairs: Sequence[Pair], count: int) -> dict[str, str]:
    """Categories of short prompts of one turn, drawn from all over the pairs.

    Args:
        pairs: Where from.
        count: At most so many.
    """
    fitting = [pair for pair in pairs if len(pair.prompt) <= LONGEST and not TURN.search(pair.prompt)]
    # One pair of each prompt.
    different = list({pair.prompt: pair for pair in fitting}.values())
    return {pair.prompt: pair.category for pair in limit_pairs(different, count)}


def spoken(prompt: str) -> str:
    """What the policy is asked: a prompt without its speaker."""
    return SPEAKER.sub("", prompt, count=1)


# --- rewards ---------------------------------------------------------------------------------------------------------


class Rater:
    """Reward models of the study, or a pick that needs none, as a function of prompts and answers."""

    def __init__(
        self,
        options: argparse.Namespace,
        method: str,
        seeds: Sequence[int],
        categories: Mapping[str, str] | None = None,
    ) -> None:
        """Load the networks of a method.

        Args:
            options: The command line.
            method: What they are.
            seeds: Of which runs; several are one reward, their mean.
            categories: By prompt, where the networks are told them.

        Raises:
            DataNotFoundError: One has not been run.
        """
        self.method = method
        self.categories = categories or {}
        self.random = np.random.default_rng(seeds[0])
        self.models: list[Backbone] = []
        if method not in (RANDOM, LONGER):
            self.models = [load_proxy(options, method, seed) for seed in seeds]
            self.tokenizer = load_tokenizer(options.base)

    def __call__(self, prompt: str, answers: Sequence[str]) -> Array:
        """Rewards of answers to a prompt."""
        if self.method == RANDOM:
            return self.random.random(len(answers))
        if self.method == LONGER:
            return np.array([len(answer) for answer in answers], dtype=np.float64)
        found: Array = rate(self.models, self.tokenizer, candidates_of(prompt, answers, self.categories)).mean(axis=0)
        return found


def load_proxy(options: argparse.Namespace, name: str, seed: int) -> Backbone:
    """The network of a proxy; what follows a slash is how an ensemble is read.

    Raises:
        DataNotFoundError: It has not been run.
    """
    method, _, reduce = name.partition("/")
    model = load_network(options, Run(method, seed))
    if reduce:
        model.reduce = reduce
    return model


def candidates_of(prompt: str, answers: Sequence[str], categories: Mapping[str, str]) -> list[Candidate]:
    """Answers as they are rated, with the category of their prompt where it is told."""
    return [Candidate(prompt, answer, categories.get(prompt, "")) for answer in answers]


# --- best of n -------------------------------------------------------------------------------------------------------


def draw_answers(options: argparse.Namespace) -> dict[str, list[str]]:
    """The policy's answers to held-out prompts, drawn where they are not there yet."""
    policy: Policy | None = None
    found: dict[str, list[str]] = {}
    for number, prompt in enumerate(prompts_of(options, "test", options.prompts)):
        path = options.folder / "runs" / "answers" / f"{options.source}.{number}.json"
        about = {"prompt": prompt, **{name: getattr(options, name) for name in ("policy", "answers", "tokens")}}
        if not is_done(path, about):
            policy = policy or Policy(options.policy)
            (drawn,) = policy.sample([spoken(prompt)], options.answers, options.tokens, number)
            write_whole(path, {**about, "drawn": [one.answer for one in drawn]})
        found[prompt] = json.loads(path.read_text())["drawn"]
    return found


def draw_all(
    policy: Policy, prompts: Sequence[str], count: int, options: argparse.Namespace, seed: int
) -> dict[str, list[Answered]]:
    """A policy's answers to prompts, several prompts at once."""
    found: dict[str, list[Answered]] = {}
    size = max(1, TOGETHER // count)
    for start in range(0, len(prompts), size):
        asked = prompts[start : start + size]
        drawn = policy.sample([spoken(prompt) for prompt in asked], count, options.tokens, seed + start)
        found |= dict(zip(asked, drawn, strict=True))
    return found


def prompts_of(options: argparse.Namespace, part: str, count: int) -> dict[str, str]:
    """Categories of some prompts of a part, by prompt."""
    data = StudyData(source=options.source, base=options.base)
    return single_turns(data.read(part), count)  # type: ignore[arg-type]


def rate_missing(options: argparse.Namespace, answers: Mapping[str, Sequence[str]]) -> None:
    """Write the rewards that every network gives to the answers, where they are not there yet."""
    rate_runs(options, list(product(options.proxies, options.seeds)), answers, {})
    rate_runs(options, [(GOLD, seed) for seed in options.gold], answers, prompts_of(options, "test", options.prompts))


def rate_runs(
    options: argparse.Namespace,
    wanted: Sequence[tuple[str, int]],
    answers: Mapping[str, Sequence[str]],
    categories: Mapping[str, str],
) -> None:
    """Write what is missing of some runs, all of them at once.

    Args:
        options: The command line.
        wanted: Methods and seeds.
        answers: By prompt.
        categories: Likewise, where the networks are told them.
    """
    abouts = {one: describe_rated(options, *one, answers) for one in wanted}
    missing = {one: about for one, about in abouts.items() if not is_done(row_path(options, "picks", *one), about)}
    if not missing:
        return
    models = [load_proxy(options, *one) for one in missing]
    tokenizer = load_tokenizer(options.base)
    found = [rate(models, tokenizer, candidates_of(prompt, of, categories)) for prompt, of in answers.items()]
    for number, (one, about) in enumerate(missing.items()):
        rewards = [line(of[number].tolist()) for of in found]
        write_whole(row_path(options, "picks", *one), {**about, "rewards": rewards})


def row_path(options: argparse.Namespace, what: str, proxy: str, seed: int) -> Path:
    """Where a row is: `picks` or `distil`."""
    return Path(options.folder) / "results" / f"{options.source}.{what}-{proxy.replace('/', '-')}.seed{seed}.json"


def weights_of(options: argparse.Namespace, proxy: str, seed: int) -> str:
    """The hash of a proxy's network; nothing of a pick that needs none.

    Raises:
        DataNotFoundError: It has not been run.
    """
    if proxy in (RANDOM, LONGER):
        return ""
    method = proxy.partition("/")[0]
    return hub.info(find_run(checkpoint(options, Run(method, seed)), method, seed)).sha256


def describe_rated(options: argparse.Namespace, proxy: str, seed: int, answers: Mapping[str, Sequence[str]]) -> Row:
    """What rewards are about; those of another network, or of other answers, are not the proxy's."""
    names = ("source", "base", "policy", "prompts", "answers", "tokens")
    return {
        **{name: getattr(options, name) for name in names},
        "proxy": proxy,
        "seed": seed,
        "weights": weights_of(options, proxy, seed),
        "drawn": fingerprint(answers),
    }


def rated(options: argparse.Namespace, proxy: str, seeds: Sequence[int]) -> list[Array]:
    """Rewards `(seeds, N)` of each prompt's answers."""
    rows = [json.loads(row_path(options, "picks", proxy, seed).read_text())["rewards"] for seed in seeds]
    return [np.stack([numbers(of) for of in prompt]) for prompt in zip(*rows, strict=True)]


def in_units(rewards: Sequence[Array]) -> list[Array]:
    """Rewards `(seeds, N)` of each prompt's answers above their mean, in units by which those of a prompt vary."""
    scale = np.mean([of.std(axis=1, keepdims=True) for of in rewards], axis=0)
    return [(of - of.mean(axis=1, keepdims=True)) / scale for of in rewards]


def compare_picks(options: argparse.Namespace, answers: Mapping[str, Sequence[str]], gold: list[Array]) -> Row:
    """Best-of-n of all proxies on the same answers: a line per n, and how much the first is above the others."""
    sizes = [2**power for power in range(options.answers.bit_length()) if 2**power <= options.answers]
    rewards = {name: in_units(rated(options, name, options.seeds)) for name in options.proxies}
    for name in (LONGER, RANDOM):
        rater = Rater(options, name, [0])
        rewards[name] = in_units([rater(prompt, of)[None] for prompt, of in answers.items()])
    curves = {name: best_of_n_curve(of, gold, sizes) for name, of in rewards.items()}
    plot_best_of_n(curves, options.folder / "best_of_n.png")
    most = [sizes[-1]]
    picks = {
        name: np.concatenate(
            [picked(by, np.broadcast_to(of, by.shape), most) for by, of in zip(values, gold, strict=True)]
        )
        for name, values in rewards.items()
    }
    ours, *others = rewards
    return {
        "curves": [entry for name, curve in curves.items() for entry in curve_rows(name, curve)],
        "differences": [
            {"compared": f"{ours} - {other}", "n": most[0], **mean_over_prompts(picks[ours] - picks[other])._asdict()}
            for other in others
        ],
    }


def curve_rows(name: str, curve: Curve) -> list[Row]:
    """A line per n."""
    columns = {field: getattr(curve, field).tolist() for field in Curve._fields}
    return [{"model": name} | dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# --- a policy that learns from picks ---------------------------------------------------------------------------------


def distil(options: argparse.Namespace, proxy: str, seed: int, first: dict[str, list[Answered]]) -> Row:
    """Rounds of best-of-n distillation by a proxy; after the last, new answers to the held-out prompts.

    Args:
        options: The command line.
        proxy: What picks.
        seed: Of what is drawn, and of the proxy.
        first: What the policy answers before it is taught, which is the same for all proxies; filled in.
    """
    asked = list(prompts_of(options, "train", options.teach_prompts))
    held_out = prompts_of(options, "test", options.prompts)
    policy, rater = Policy(options.policy), Rater(options, proxy, [seed])
    gold = Rater(options, GOLD, options.gold, held_out)
    torch.manual_seed(seed)
    losses = []
    # Of what is drawn, so that no two draws are alike.
    starts = [(1 + seed * (options.rounds + 1) + number) * 10_000 for number in range(options.rounds + 1)]
    for number, start in enumerate(starts[:-1]):
        drawn = {} if number else first
        drawn |= draw_all(policy, [p for p in asked if p not in drawn], options.picked_from, options, start)
        lessons = [best(rater, prompt, of) for prompt, of in drawn.items()]
        losses.append(policy.teach(lessons, options.teach_epochs, options.teach_lr))
    given = draw_all(policy, list(held_out), options.judged, options, starts[-1])
    texts = {prompt: [one.answer for one in of] for prompt, of in given.items()}
    return {
        "losses": losses,
        "kl": policy.kl([one for of in given.values() for one in of]),
        "words": float(np.mean([len(text.split()) for of in texts.values() for text in of])),
        "gold_rewards": line([float(gold(prompt, of).mean()) for prompt, of in texts.items()]),
        "proxy_rewards": line([float(rater(prompt, of).mean()) for prompt, of in texts.items()]),
    }


def best(rater: Rater, prompt: str, drawn: Sequence[Answered]) -> Answered:
    """The answer to a prompt that a proxy picks."""
    return drawn[int(rater(prompt, [one.answer for one in drawn]).argmax())]


def distil_missing(options: argparse.Namespace) -> None:
    """Run every distillation without a row."""
    for seed in options.teach_seeds:
        first: dict[str, list[Answered]] = {}
        for proxy in (*options.taught, RANDOM):
            path, about = row_path(options, "distil", proxy, seed), describe(options, proxy, seed)
            if is_done(path, about):
                continue
            print(f"{options.source}, distillation by {proxy}, seed {seed}", flush=True)
            start = time.perf_counter()
            row = distil(options, proxy, seed, first)
            write_whole(path, {**about, "seconds": round(time.perf_counter() - start, 1), **row})


def describe(options: argparse.Namespace, proxy: str, seed: int) -> Row:
    """What a row is about; one about anything else is not that of the run."""
    names = (
        "source",
        "base",
        "policy",
        "gold",
        "prompts",
        "tokens",
        "rounds",
        "teach_prompts",
        "teach_epochs",
        "teach_lr",
        "picked_from",
        "judged",
    )
    return {
        **{name: getattr(options, name) for name in names},
        "together": TOGETHER,
        "proxy": proxy,
        "seed": seed,
        "weights": weights_of(options, proxy, seed),
        "gold_weights": [weights_of(options, GOLD, number) for number in options.gold],
    }


def distil_table(options: argparse.Namespace, before: Array, scale: float) -> list[Row]:
    """A line per proxy: how far the policy moved, and how much the gold reward rose, with its interval."""
    lines = []
    for proxy in (*options.taught, RANDOM):
        paths = {seed: row_path(options, "distil", proxy, seed) for seed in options.teach_seeds}
        done = [path for seed, path in paths.items() if is_done(path, describe(options, proxy, seed))]
        rows = [json.loads(path.read_text()) for path in done]
        if rows:
            rise = np.mean([numbers(of["gold_rewards"]) for of in rows], axis=0) / scale - before
            means = {key: float(np.mean([of[key] for of in rows])) for key in ("kl", "words")}
            lines.append({"proxy": proxy, "seeds": len(rows), **means, **mean_over_prompts(rise)._asdict()})
    return lines


# --- the command -----------------------------------------------------------------------------------------------------


def write_tables(options: argparse.Namespace) -> None:
    """Print and write the tables, and draw the figure."""
    answers = draw_answers(options)
    rate_missing(options, answers)
    raw = [of.mean(axis=0) for of in rated(options, GOLD, options.gold)]
    scale = float(np.mean([of.std() for of in raw]))
    results = compare_picks(options, answers, [of[0] for of in in_units([of[None] for of in raw])])
    results["distillation"] = distil_table(options, np.array([of.mean() for of in raw]) / scale, scale)
    print_table("Best of n: gold reward of the pick", results["curves"])
    print_table(f"Best of {options.answers}: differences of gold rewards", results["differences"])
    print_table("Distillation: rise of the gold reward", results["distillation"])
    write_whole(options.folder / "policy.json", results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", nargs="+", metavar="METHOD", default=list(PROXIES), help="ours first")
    parser.add_argument("--taught", nargs="+", metavar="METHOD", help="proxies that teach; the first two by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--gold", nargs="+", type=int, default=[0, 1], help="seeds of the gold reward, a mean")
    parser.add_argument("--teach-seeds", nargs="+", type=int, default=[0], help="of the distillation")
    parser.add_argument("--source", default="preference", choices=["preference", "generated"])
    parser.add_argument("--base", default=MINILM, help="of the reward models")
    parser.add_argument("--policy", default=SMOLLM2, help="the causal model that answers")
    parser.add_argument("--prompts", type=int, default=80, help="held-out prompts")
    parser.add_argument("--answers", type=int, default=64, help="to each of them: the largest n")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--rounds", type=int, default=1, help="of distillation")
    parser.add_argument("--teach-prompts", type=int, default=40, help="training prompts of a round")
    parser.add_argument("--teach-epochs", type=int, default=4, help="of a round")
    parser.add_argument("--teach-lr", type=float, default=1e-3, help="of a round")
    parser.add_argument("--picked-from", type=int, default=8, help="answers to each of them")
    parser.add_argument("--judged", type=int, default=4, help="answers to each held-out prompt after the last")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results/ and runs/ are")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", choices=["table"], help="teach nothing")
    options = parser.parse_args(arguments)
    options.taught = options.taught or options.proxies[:2]
    readings = [f"{name}/{reduce}" for name, of in METHODS.items() if of.kind == "ensemble" for reduce in REDUCTIONS]
    check_names([*options.proxies, *options.taught], [*METHODS, *readings])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw answers, teach policies where it is missing, and write the results."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if not options.only:
        distil_missing(options)
    write_tables(options)


if __name__ == "__main__":
    main()
