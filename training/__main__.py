"""`python -m training COMMAND --recipe FILE`, and `unpack`, which has none: argument parsing, nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from models import BundleError, UnknownDefense
from models.bundle_files import read_manifest
from models.manifest import Strict
from training.budgets import BUDGETS
from training.config import (
    AidRecipe,
    ClassifierRecipe,
    EvaluateRecipe,
    ExportRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    Recipe,
    RecipeError,
)
from training.data import DataError
from training.precision import PRECISIONS, computes_bfloat16
from training.reading import neighbors, read_recipe, recipe_of
from training.runs import RunError

RECIPES: dict[str, type[Strict]] = {
    "train-classifier": ClassifierRecipe,
    "pretrain-purifier": PretrainRecipe,
    "finetune-atop": FinetuneRecipe,
    "train-aid": AidRecipe,
    "evaluate": EvaluateRecipe,
    "export": ExportRecipe,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    It is 2 for a recipe, a run, data or a bundle that cannot be used, and 1 for a bundle that `--fail-below` refuses.
    """
    options = parse(arguments)
    try:
        if options.command == "unpack":
            from training.unpack import unpack

            print(*unpack(options.bundle, options.runs), sep="\n")
            return 0
        if options.command == "evaluate" and options.recipe is None and options.transfer_from is None:
            options.transfer_from = [str(path) for path in neighbors(options.bundle)]
        fields = ("budget", "defenses", "transfer_from", "votes", "precision")
        instead = {name: getattr(options, name, None) for name in fields}
        if instead["defenses"]:
            instead["grey_box_only"] = ()
        recipe = recipe_for(options, instead)
        if said := recipe.model_dump_json(indent=2) if options.dry_run else run_command(recipe, options):
            print(said)
    except GateError as error:
        print(error, file=sys.stderr)
        return 1
    except (RecipeError, RunError, DataError, BundleError, UnknownDefense) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def recipe_for(options: argparse.Namespace, instead: dict[str, Any]) -> Strict:
    """The recipe's file, or for `evaluate` without one what the bundle says of itself.

    Raises RecipeError, and BundleError for a bundle that cannot be read.
    """
    if options.recipe is not None:
        return read_recipe(options.recipe, RECIPES[options.command], data_source=options.data, **instead)
    if options.data is None:
        raise RecipeError("evaluate needs --recipe FILE, or --data FOLDER for every defense of the bundle")
    return recipe_of(read_manifest(options.bundle), options.data, **instead)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command and its options; a command takes no option that would change nothing."""
    parser = argparse.ArgumentParser(prog="python -m training", description="Train, measure and export defenses.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, recipe in RECIPES.items():
        summary = (recipe.__doc__ or "").replace("`", "")
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        optional = "; without one, every defense of the bundle on --data" if name == "evaluate" else ""
        help_text = f"a TOML file, see training/recipes/{optional}"
        command.add_argument("--recipe", type=Path, required=name != "evaluate", help=help_text)
        command.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
        command.set_defaults(data=None)
        command.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories are")
        if name != "export":
            command.add_argument("--data", help="a folder or hub name, instead of the recipe's data.source")
            command.add_argument("--device", type=device, default=default_device(), help="cpu, cuda or cuda:N")
        if issubclass(recipe, Recipe):
            command.add_argument("--precision", choices=PRECISIONS, help="instead of the recipe's")
        if name == "evaluate":
            command.add_argument(
                "--bundle", type=Path, default=Path("models/bundles/cifar10/1"), help="what to evaluate"
            )
            command.add_argument("--budget", choices=list(BUDGETS), help="instead of the recipe's")
            command.add_argument(
                "--defense", action="append", dest="defenses", help="instead of the recipe's; repeatable"
            )
            command.add_argument(
                "--transfer-from",
                action="append",
                metavar="BUNDLE",
                help="another bundle on disk, whose classifier's adversarial images are tried too; repeatable; without "
                "it and without a recipe the others beside it that have the same classes and size of images",
            )
            command.add_argument(
                "--votes", type=int, help="draws that an answer of a random defense averages; needs --keep-report"
            )
            command.add_argument("--keep-report", action="store_true", help="leave the bundle's report.json as it is")
            command.add_argument(
                "--fail-below",
                type=share,
                metavar="ACCURACY",
                help="exit with 1 if a defense's worst case is lower, or not credible",
            )
        if name == "export":
            command.add_argument("--repository", type=Path, default=Path("models/bundles"), help="where to export to")
    summary = (
        "The runs that a bundle was exported from, as far as it has their weights, so that others can build on them."
    )
    command = commands.add_parser(
        "unpack", help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("--bundle", type=Path, default=Path("models/bundles/cifar10/1"), help="what to unpack")
    command.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories are")
    return parser.parse_args(arguments)


class GateError(Exception):
    """A bundle that is not what `--fail-below` asks for; the message has a line for every defense that is not."""


def share(text: str) -> float:
    """An accuracy in [0, 1]; raises ValueError, which argparse answers."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def device(name: str) -> torch.device:
    """Raises ValueError, which argparse answers, for what torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(name) from None


def default_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_command(recipe: Strict, options: argparse.Namespace) -> str:
    """Run the command that a recipe is for; returns what to print. Imports only what that command needs."""
    match recipe:
        case ExportRecipe():
            from training.export import export

            return str(export(recipe, options.runs, options.repository))
        case EvaluateRecipe():
            from training.evaluate import evaluate
            from training.report import below, table

            report = evaluate(
                recipe,
                options.bundle,
                options.device,
                options.runs,
                keep_report=options.keep_report,
                command=typed(options),
            )
            if options.fail_below is not None and (failures := below(report, options.fail_below)):
                print(table(report))
                raise GateError("\n".join(failures))
            return table(report)
        case _:
            if isinstance(recipe, Recipe) and recipe.precision == "bfloat16" and not computes_bfloat16(options.device):
                print("This CPU emulates bfloat16, many times slower than --precision float32.", file=sys.stderr)
            from training.parallel import group, joined

            with joined(options.device) as device:
                summary = train(recipe, options.runs, device)
                return json.dumps(summary, indent=2) if group().is_first else ""


def typed(options: argparse.Namespace) -> str:
    """The `evaluate` command with these options, for a report that others read: without this machine's folders."""
    paths = {"--recipe": options.recipe, "--bundle": options.bundle}
    parts = [f"{name} {folderless(path)}" for name, path in paths.items() if path is not None]
    parts += ["--data FOLDER"] if options.data is not None else []
    parts += [f"--budget {options.budget}"] if options.budget is not None else []
    parts += [f"--defense {defense}" for defense in options.defenses or ()]
    parts += [f"--transfer-from {folderless(Path(bundle))}" for bundle in options.transfer_from or ()]
    parts += [f"--votes {options.votes}"] if options.votes is not None else []
    parts += ["--keep-report"] if options.keep_report else []
    return " ".join(["python -m training evaluate", *parts])


def folderless(path: Path) -> str:
    """The path as it was typed if it is relative, else its name."""
    return path.name if path.is_absolute() else str(path)


def train(recipe: Strict, runs: Path, device: torch.device) -> dict[str, Any]:
    """Run the training command that a recipe is for; returns the run's summary."""
    match recipe:
        case ClassifierRecipe():
            from training.train_classifier import train_classifier

            return train_classifier(recipe, runs, device)
        case PretrainRecipe():
            from training.train_purifier import pretrain_purifier

            return pretrain_purifier(recipe, runs, device)
        case FinetuneRecipe():
            from training.train_purifier import finetune_atop

            return finetune_atop(recipe, runs, device)
        case AidRecipe():
            from training.train_aid import train_aid

            return train_aid(recipe, runs, device)
    raise TypeError(f"no command for {type(recipe).__name__}")


if __name__ == "__main__":
    sys.exit(main())
