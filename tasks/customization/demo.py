"""The demo: a shipped model meets a hand it has never seen, and learns it while you watch."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import Progress

from tasks.customization.characters import merge
from tasks.customization.customizer import Recipe, customize
from tasks.customization.data import UserDataModule, UserSamples, to_float
from tasks.customization.evaluate import accuracy, both_experts, overhead, plot_repairs
from tasks.customization.model import CustomizedLeNet
from tasks.customization.profile import default_folder
from tasks.customization.web.server import serve
from tasks.customization.web.studio import CHECKPOINT, generic_images
from zoo import hub
from zoo.data import ENVIRONMENT_VARIABLE
from zoo.errors import DataNotFoundError
from zoo.report import print_table, run_folder

OUT = "runs/customization/demo"
HOST, PORT = "127.0.0.1", 7860
SYNTHETIC_USER, REAL_USER = "synthetic-4", "apa-04"


def main(args: Sequence[str] | None = None) -> None:
    """Customise for a synthetic user and, where there is data, for a real writer; or serve a page for your own hand.

    Args:
        args: Command line after `moe-zoo demo customization`.
    """
    parser = argparse.ArgumentParser("moe-zoo demo customization", description=__doc__)
    parser.add_argument("--user", help=f"writer of unipen.npz, {REAL_USER} by default; needs {ENVIRONMENT_VARIABLE}")
    parser.add_argument("--out", help=f"folder of the figures, {OUT} by default")
    parser.add_argument("--web", action="store_true", help="a page to teach the model your own handwriting")
    parser.add_argument("--profiles", help="folder of the page's profiles; a folder of your user data by default")
    parser.add_argument("--host", help=f"address that the page listens on; {HOST}, this computer only, by default")
    parser.add_argument("--port", type=int, help=f"port of the page, {PORT} by default; 0 takes any free one")
    options = parser.parse_args(args)
    check_options(options)
    if options.web:
        root = Path(options.profiles) if options.profiles else default_folder()
        serve(root, options.host or HOST, PORT if options.port is None else options.port)
    else:
        teach_shipped_writers(options)


def check_options(options: argparse.Namespace) -> None:
    """Raise a `ValueError` for options that the chosen demo would ignore."""
    ignored = ("user", "out") if options.web else ("profiles", "host", "port")
    given = [f"--{name}" for name in ignored if getattr(options, name) is not None]
    if given:
        where = "without" if options.web else "with"
        raise ValueError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for the demo {where} --web.")


def teach_shipped_writers(options: argparse.Namespace) -> None:
    """Customise for writers whose samples are there already, and print what changed."""
    folder = run_folder(options.out or OUT)
    model = cast(CustomizedLeNet, hub.load(CHECKPOINT))
    has_data = bool(os.environ.get(ENVIRONMENT_VARIABLE))
    if options.user and not has_data:
        raise DataNotFoundError(f"the writer {options.user}", [], f"Set {ENVIRONMENT_VARIABLE} to the data folder.")
    modules = [UserDataModule(source="synthetic", user=SYNTHETIC_USER, generic="none", seed=0)]
    if has_data:
        modules.append(UserDataModule(user=options.user or REAL_USER))
    generic = generic_images() if has_data else None
    rows = []
    for module in modules:
        module.setup()
        rows.append(teach(model, module.users[0], generic, folder))
    print_table("What the global expert and the customised model make of samples neither was taught (%)", rows)
    print_cost(model)
    print_next_steps(has_data)


def teach(
    model: CustomizedLeNet, user: UserSamples, generic: tuple[torch.Tensor, torch.Tensor] | None, folder: Path
) -> dict[str, Any]:
    """Customise for a user with a progress bar and draw what was repaired; one row of the table."""
    images = to_float(torch.cat([user.train.images, user.val.images]))
    labels = merge(torch.cat([user.train.labels, user.val.labels]))
    name = f"{user.user} (synthetic)" if user.synthetic else user.user
    start = time.perf_counter()
    with Progress(transient=True) as progress:
        bars = {phase: progress.add_task(f"{name}: {phase}") for phase in ("local expert", "gate")}
        customised = customize(
            model,
            images,
            labels,
            recipe=Recipe(),
            progress=lambda phase, step, steps: progress.update(bars[phase], completed=step, total=steps),
        )
    seconds = time.perf_counter() - start
    test_images, test_labels = to_float(user.test.images), merge(user.test.labels)
    with torch.no_grad():
        features = model.features(test_images)
        _, mixed, routing = both_experts(customised, features)
        figure = plot_repairs(
            user.test.images,
            test_labels,
            features.logits.argmax(1),
            mixed.argmax(1),
            f"{name}: wrong before, right after {len(labels)} samples",
            folder / f"{user.user}.png",
        )
        row = {
            "user": name,
            "samples": len(labels),
            "before": accuracy(features.logits, test_labels),
            "after": accuracy(mixed, test_labels),
            "asked the local expert": 100 * (routing.expert_index == 1).float().mean().item(),
            "seconds": seconds,
        }
        if generic:
            row["others before"] = accuracy(model(generic[0]), generic[1])
            row["others after"] = accuracy(customised(generic[0]), generic[1])
    print(f"{name}: {figure}")
    return row


def print_cost(model: CustomizedLeNet) -> None:
    """What local expert and gate add to the global expert."""
    cost = overhead(model)
    rows = [
        {
            "per image": name,
            "parameters": int(values["parameters"]),
            "multiply-accumulates": int(values["macs"]),
            "energy (nJ)": values["picojoule"] / 1000,
        }
        for name, values in (("global expert", cost["global"]), ("local expert and gate", cost["added"]))
    ]
    print_table("What it costs", rows)


def print_next_steps(has_data: bool) -> None:
    """What to try next."""
    print("Try next:")
    if not has_data:
        print(f"  {ENVIRONMENT_VARIABLE}=DIR moe-zoo demo customization")
        print("      a real writer, and what it costs everybody else")
    print("  moe-zoo demo customization --web")
    print("      your own hand, in a browser: write, customise, take the model with you")
    print("  moe-zoo fit -c configs/customization/user.yaml --data.source folder --data.folder DIR")
    print("      your own hand, from files: DIR/<you>/<digit_0 | upper_A | lower_a>/*.png, 28 x 28, white on black")
    print(f"  moe-zoo info {CHECKPOINT}")


if __name__ == "__main__":
    main()
