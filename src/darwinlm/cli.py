"""Command line: parse the arguments, call the library, and turn failures into one line and an exit code."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from darwinlm.config.exports import listed
from darwinlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from darwinlm.run.finished import Run

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Prune a Hugging Face language model to a given size.",
)

_INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""
_KEPT = "Interrupted; progress is saved. Run the same command again to resume."

Quiet = Annotated[bool, typer.Option("--quiet", help="Plain log lines instead of progress bars.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; repeatable.")
]

Steps = Annotated[
    int | None,
    typer.Option(help="Number of rounds of pruning and recovery on the way to the target; for large reductions."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from darwinlm._version import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("demo-run"),
    data: Annotated[str, typer.Option(help="Source of the text, as for `prune`.")] = "self",
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Prune SmolLM2-135M-Instruct (from the `demo` extra) to 60% of its parameters, in minutes, on any machine."""
    _run("demo", {"data.source": data, **_overrides(settings)}, out, quiet)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Local folder, Hub model id, or smollm2.")],
    target: Annotated[
        str, typer.Option(help="Parameters to keep (0.5 or 2.7B), limits (params=0.5,latency=0.6), or sizes (0.8,0.6).")
    ],
    out: Annotated[Path, typer.Option(help="Run directory: new, or an earlier run to resume.")],
    recipe: Annotated[str, typer.Option(help="YAML file, or one of quick, paper, demo.")] = "quick",
    data: Annotated[
        str | None,
        typer.Option(help="Hub dataset id, a text, JSON, CSV or Parquet file or folder, or self."),
    ] = None,
    steps: Steps = None,
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL to the target size; run the same command again to resume."""
    overrides: dict[str, Any] = {"model": model, "target": target}
    if steps is not None:
        overrides["steps"] = steps
    if data is not None:
        overrides["data.source"] = data
    _run(recipe, overrides | _overrides(settings), out, quiet)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Model, as for `prune`; only its config is needed.")],
    target: Annotated[str, typer.Option(help="Parameters to keep: 0.5 or 2.7B.")],
    recipe: Annotated[str, typer.Option(help="Recipe, as for `prune`.")] = "quick",
    steps: Steps = None,
    settings: Setting = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="h100, h200, a100, l40s or rtx4090; default: this machine.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory per GPU, if it differs from the default: 40GB.")
    ] = None,
) -> None:
    """Estimate the cost of a run before it starts: parameters, disk space, and time and memory of each stage."""
    _silence_libraries()

    from rich.console import Console

    from darwinlm.commands.plan import plan_run
    from darwinlm.config.loading import load_recipe
    from darwinlm.report.summary import show_costs

    asked = {"model": model, "target": target} | ({} if steps is None else {"steps": steps})
    checked = load_recipe(recipe, asked | _overrides(settings))
    machine, costs = plan_run(checked, gpus, gpu, gpu_memory)
    show_costs(costs, machine, Console() if sys.stdout.isatty() else Console(width=120))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Model, as for `prune`.")],
    quiet: Quiet = False,
) -> None:
    """Check on a few layers of MODEL that pruning, running, training, saving and exporting it work correctly."""
    from darwinlm.runtime.progress import set_up

    set_up(quiet=quiet)
    _silence_libraries()

    from darwinlm.commands.doctor import examine
    from darwinlm.report.checks import show_checks

    examination = examine(model)
    show_checks(examination, _console())
    if not examination.passed:
        raise typer.Exit(1)


@app.command()
def recover(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Train the pruned model of RUN again with other settings (--set recovery.tokens=1B), or resume its training."""
    overrides = _overrides(settings)
    _start(quiet)

    from darwinlm.commands.recover import recover_again

    _finish(recover_again(run, overrides))


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="A finished run, or the folder of a pruned model.")
    ],
    to: Annotated[
        str,
        typer.Option(help=f"{listed()}; or hf: the same folder with this version's modelling file."),
    ],
    out: Annotated[Path | None, typer.Option(help="File or folder to write; default: next to the model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="gguf: f32, f16, bf16, q8_0, q4_k_m, q5_k_m, q6_k; default: the model's dtype.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="vllm: tensor-parallel size.")] = 1,
) -> None:
    """Export a pruned model for another engine, and compare its logits there with the original logits."""
    from darwinlm.export.targets import export_model

    _silence_libraries()
    for line in export_model(source, to, out, dtype, tensor_parallel).lines():
        typer.echo(line)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    watch: Annotated[bool, typer.Option("--watch", help="Update the report until the run ends.")] = False,
) -> None:
    """Write RUN/report/index.html: layer sizes, the course of the search, quality and speed of the result."""
    from darwinlm.report.page import watch_report, write_report

    page = run / "report" / "index.html"
    if watch:
        print(f"watching the run, report in {page}; Ctrl-C stops watching, not the run", file=sys.stderr)
        watch_report(run)
    else:
        write_report(run)
    print(f"report: {page}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a model folder, or a Hub model id.")],
) -> None:
    """Show the size of every layer compared with the dense model; for a model, from its config only."""
    from darwinlm.commands.inspect import inspect, show_layers

    for entry in inspect(source):
        show_layers(entry, _console())


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A finished run, a model folder, or a Hub model id.")
    ],
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, separated by commas, or paper.")] = "",
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Folder of JSONL files, one per task, for machines without access to the Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N items of each task.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure prefill and decode speed in transformers, llama.cpp and vLLM.")
    ] = False,
    batches: Annotated[str, typer.Option(help="For --speed: batch sizes.")] = "1,4",
    lengths: Annotated[str, typer.Option(help="For --speed: prompt lengths in tokens.")] = "128,512",
    vllm: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="For --speed: Python interpreter of vLLM's environment, if it is not this one."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate the dense and the pruned model of a run, or a single model, on zero-shot tasks; optionally measure
    speed."""
    import os

    # Hide lm-eval's progress bars; ours shows the progress.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from darwinlm.runtime.progress import set_up

    set_up(quiet=quiet)
    _silence_libraries()
    if speed:
        from darwinlm.commands.speed import measure_speeds
        from darwinlm.report.summary import show_speeds

        sizes = _numbers("--batches", batches), _numbers("--lengths", lengths)
        show_speeds(measure_speeds(source, *sizes, vllm), _console())
        if not tasks and tasks_dir is None:
            return

    from darwinlm.commands.evaluate import evaluate
    from darwinlm.report.summary import show_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    show_tasks(evaluate(source, names, tasks_dir=tasks_dir, limit=limit), _console())


def _numbers(option: str, text: str) -> list[int]:
    """Parse comma-separated whole numbers such as `1,4`. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) <= 2**20 for word in words):
        raise UserError(f"{option} {text!r}: expected whole numbers >= 1 separated by commas, such as 1,4")
    return [int(word) for word in words]


def main() -> None:
    """Run the command line and exit: 0 success, 1 internal error, 2 user error, 130 interrupted."""
    try:
        code = exit_code(sys.argv[1:])
    except KeyboardInterrupt:  # a signal while an error is reported, as when torchrun ends all ranks
        code = _INTERRUPTED
    sys.exit(code)


def exit_code(arguments: list[str]) -> int:
    """Run the command line with `arguments` and return its exit code, as `main` does; errors are printed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # Ignored in background jobs of a shell without job control.
            signal.signal(number, _interrupt)
    try:
        result = app(arguments, prog_name="darwinlm", standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # Older versions of typer raise it; newer ones return 130.
        result = _INTERRUPTED
    except ImportError as error:
        if error.name != "transformers":  # Only the modelling file's version check is a user error.
            raise
        return _fail(str(error))
    except MemoryError:  # Stages report their own.
        return _fail("out of memory; free some, or raise the limit (ulimit -v)")
    except Exception as error:
        # A usage error. Its class is click's or, in newer versions of typer, a private copy without a public name.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            return _fail(f"{error.format_message()} (see {context.command_path if context else 'darwinlm'} --help)")
        raise
    if result == _INTERRUPTED:
        print(f"\n{_KEPT}", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _run(recipe: str, overrides: dict[str, Any], out: Path, quiet: bool) -> None:
    from darwinlm.config.loading import load_recipe

    checked = load_recipe(recipe, overrides)
    _start(quiet)

    from darwinlm.pipeline import run_recipe

    _finish(run_recipe(checked, out))


def _start(quiet: bool) -> None:
    """Set up ranks, progress output and library logging before long work."""
    from darwinlm.runtime import dist
    from darwinlm.runtime.progress import set_up

    dist.start()
    if dist.rank() > 0:
        # Other ranks keep no state, and often wait for rank 0 in native code that does not return to Python's signal
        # handlers.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    set_up(quiet=quiet, silent=dist.rank() > 0)
    _silence_libraries()


def _finish(run: "Run") -> None:
    """Leave the process group and print the results."""
    from darwinlm.report.summary import show
    from darwinlm.runtime import dist

    main_rank = dist.rank() == 0
    dist.stop()
    if not main_rank:
        return
    console = _console()
    show(run.metrics, console)
    console.print(f"pruned model: {run.model_path}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {run.path / 'report' / 'index.html'}", highlight=False, soft_wrap=True, markup=False)


def _console() -> "Console":
    from rich.console import Console

    # Outside a terminal, use a fixed width so that logs contain whole rows.
    return Console() if sys.stdout.isatty() else Console(width=120)


def _silence_libraries() -> None:
    """Silence warnings and progress bars of libraries, which concern code that the user did not write; errors still
    show."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _overrides(settings: list[str] | None) -> dict[str, Any]:
    from darwinlm.config.loading import parse_override

    return dict(parse_override(setting) for setting in settings or [])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt so that progress is saved; a second signal exits at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    # Files are always written completely or not at all, so no cleanup is needed.
    os.write(2, f"\n{_KEPT}\n".encode())
    os._exit(_INTERRUPTED)


def _fail(message: str) -> int:
    from darwinlm.runtime.progress import printable

    if "WORLD_SIZE" in os.environ:  # Without ranks, report the error without importing PyTorch.
        from darwinlm.runtime import dist

        if not dist.should_report(message):
            return 2
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2
