"""The command line: parse, call, and turn every failure into one line and an exit code."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from darwinlm.errors import UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Prune a Hugging Face language model to the size you ask for.",
)

_INTERRUPTED = 130
"""The exit code after Ctrl-C or SIGTERM."""
_KEPT = "interrupted; what was done is kept, the same command goes on from there"

Quiet = Annotated[bool, typer.Option("--quiet", help="Plain log lines in place of progress bars.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable.")
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from darwinlm import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run directory.")] = Path("demo-run"),
    data: Annotated[str, typer.Option(help="As for `prune`.")] = "self",
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Prune SmolLM2-135M-Instruct (from the `demo` extra) to 60% of its parameters, in minutes, on any machine."""
    _run("demo", {"data.source": data, **_overrides(settings)}, out, quiet)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A local folder, a Hub model id, or smollm2.")],
    target: Annotated[
        str, typer.Option(help="Parameters to keep (0.5 or 2.7B), limits (params=0.5,latency=0.6), or sizes (0.8,0.6).")
    ],
    out: Annotated[Path, typer.Option(help="The run directory: new, or an earlier run to go on with.")],
    recipe: Annotated[str, typer.Option(help="A YAML file, or one of quick, paper, demo.")] = "quick",
    data: Annotated[
        str | None,
        typer.Option(help="A Hub data set id, a text, JSONL or Parquet file or folder, or self."),
    ] = None,
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL to the target size; the same command goes on after an interruption."""
    overrides: dict[str, Any] = {"model": model, "target": target}
    if data is not None:
        overrides["data.source"] = data
    _run(recipe, overrides | _overrides(settings), out, quiet)


def main() -> None:
    """Run the command line and exit: 0 done, 1 our fault, 2 the user's mistake, 130 interrupted."""
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(arguments: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as of a job that a shell without job control sent away
            signal.signal(number, _interrupt)
    try:
        result = app(arguments, prog_name="darwinlm", standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # older versions of typer let it through; newer ones return 130
        result = _INTERRUPTED
    except Exception as error:
        # A usage error; its class is click's or, in newer versions, typer's own copy of it, which has no public name.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            return _fail(f"{error.format_message()} (see {context.command_path if context else 'darwinlm'} --help)")
        raise
    if result == _INTERRUPTED:
        print(f"\n{_KEPT}", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _run(recipe: str, overrides: dict[str, Any], out: Path, quiet: bool) -> None:
    from darwinlm.recipe import load_recipe

    checked = load_recipe(recipe, overrides)

    from darwinlm import dist
    from darwinlm.progress import set_up

    dist.start()
    if dist.rank() > 0:
        # They keep no state, and often wait for rank 0 where Python does not come to look at signals.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    set_up(quiet=quiet, silent=dist.rank() > 0)
    _silence_libraries()

    from rich.console import Console

    from darwinlm.pipeline import run_recipe
    from darwinlm.report.summary import show

    run = run_recipe(checked, out)
    main_rank = dist.rank() == 0
    dist.stop()
    if not main_rank:
        return
    # Not a terminal: as wide as it needs to be, so that a log holds whole rows.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    show(run.metrics, console)
    console.print(f"the pruned model: {run.model_path}", highlight=False, soft_wrap=True, markup=False)


def _silence_libraries() -> None:
    """Their advice is about code that the user did not write; errors still come through."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _overrides(settings: list[str] | None) -> dict[str, Any]:
    from darwinlm.recipe import parse_override

    return dict(parse_override(setting) for setting in settings or [])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End with what was done so far in order; told so once more, at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing on the disk is ever half-written, so nothing needs to be put in order.
    os.write(2, f"\n{_KEPT}\n".encode())
    os._exit(_INTERRUPTED)


def _fail(message: str) -> int:
    from darwinlm.progress import printable

    print(f"error: {printable(message)}", file=sys.stderr)
    return 2
