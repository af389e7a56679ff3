"""The command line: parse, call, and turn every failure into one line and an exit code."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from darwinlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from darwinlm.pipeline import Run

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

Steps = Annotated[
    int | None, typer.Option(help="Prune and recover so many times on the way to the target, for deep cuts.")
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
        typer.Option(help="A Hub data set id, a text, JSON, CSV or Parquet file or folder, or self."),
    ] = None,
    steps: Steps = None,
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL to the target size; the same command goes on after an interruption."""
    overrides: dict[str, Any] = {"model": model, "target": target}
    if steps is not None:
        overrides["steps"] = steps
    if data is not None:
        overrides["data.source"] = data
    _run(recipe, overrides | _overrides(settings), out, quiet)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="As for `prune`; its config is enough.")],
    target: Annotated[str, typer.Option(help="Parameters to keep: 0.5, or 2.7B.")],
    recipe: Annotated[str, typer.Option(help="As for `prune`.")] = "quick",
    steps: Steps = None,
    settings: Setting = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there will be.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="h100, h200, a100, l40s or rtx4090; by default this machine.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Of each, if it is another size: 40GB.")] = None,
) -> None:
    """Say what a run would cost before it starts: parameters, time and memory by stage, disk."""
    _silence_libraries()

    from rich.console import Console

    from darwinlm.costs import plan_run
    from darwinlm.report.summary import show_costs
    from darwinlm.settings import load_recipe

    asked = {"model": model, "target": target} | ({} if steps is None else {"steps": steps})
    checked = load_recipe(recipe, asked | _overrides(settings))
    machine, costs = plan_run(checked, gpus, gpu, gpu_memory)
    show_costs(costs, machine, Console() if sys.stdout.isatty() else Console(width=120))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="As for `prune`.")],
    quiet: Quiet = False,
) -> None:
    """Check on a few layers of MODEL that it is cut, run, trained, saved and exported rightly, before any long work."""
    from darwinlm.progress import set_up

    set_up(quiet=quiet)
    _silence_libraries()

    from darwinlm.doctor import examine
    from darwinlm.report.checks import show_checks

    examination = examine(model)
    show_checks(examination, _console())
    if not examination.passed:
        raise typer.Exit(1)


@app.command()
def recover(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    settings: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Train the model that RUN has found once more, with other settings (--set recovery.tokens=1B), or go on."""
    overrides = _overrides(settings)
    _start(quiet)

    from darwinlm.pipeline import recover_again

    _finish(recover_again(run, overrides))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A finished run, or a pruned model's folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp and all that is built on it), vllm, hf-native (layers of one size), mlx or onnx; "
            "or hf: the folder itself again, with the modelling file of this version."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The file or folder to write; by default beside the model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="gguf: f32, f16, bf16, q8_0, q4_k_m, q5_k_m, q6_k; by default the model's.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="vllm: devices that share out each layer.")] = 1,
) -> None:
    """Write a pruned model for another engine, and compare its logits there with the model's."""
    from darwinlm.export.targets import export_model

    _silence_libraries()
    for line in export_model(source, to, out, dtype, tensor_parallel).lines():
        typer.echo(line)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    watch: Annotated[bool, typer.Option("--watch", help="Write it again as the run goes on, until it ends.")] = False,
) -> None:
    """Write RUN/report/index.html: what was cut where, how the search went, how good and how fast the result is."""
    from darwinlm.report.page import watch_report, write_report

    page = run / "report" / "index.html"
    if watch:
        print(f"following the run in {page}; Ctrl-C stops this, not the run", file=sys.stderr)
        watch_report(run)
    else:
        write_report(run)
    print(f"the report: {page}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a model's folder, or a Hub model id.")],
) -> None:
    """Show the size of every layer, against the dense model; of a model, from its config alone."""
    from darwinlm.report.layers import inspect, show_layers

    for entry in inspect(source):
        show_layers(entry, _console())


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A finished run, a model's folder, or a Hub id.")
    ],
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks with commas between, or paper.")] = "",
    tasks_dir: Annotated[
        Path | None, typer.Option(help="A folder of JSONL files, each a task, for machines without the Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each task.")] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time prompts and new tokens, in transformers, llama.cpp and vLLM.")
    ] = False,
    batches: Annotated[str, typer.Option(help="For --speed: requests at the same time.")] = "1,4",
    lengths: Annotated[str, typer.Option(help="For --speed: tokens of a prompt.")] = "128,512",
    vllm: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="For --speed: the Python of vLLM's environment, if it is not this one."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run zero-shot tasks with the dense and the pruned model of a run, on the same items; time them; or one model."""
    import os

    # lm-eval's many bars; ours shows how far it has come.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from darwinlm.progress import set_up

    set_up(quiet=quiet)
    _silence_libraries()
    if speed:
        from darwinlm.report.summary import show_speeds
        from darwinlm.speeds import measure_speeds

        sizes = _numbers("--batches", batches), _numbers("--lengths", lengths)
        show_speeds(measure_speeds(source, *sizes, vllm), _console())
        if not tasks and tasks_dir is None:
            return

    from darwinlm.judging import evaluate
    from darwinlm.report.summary import show_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    show_tasks(evaluate(source, names, tasks_dir=tasks_dir, limit=limit), _console())


def _numbers(option: str, text: str) -> list[int]:
    """`1,4` as numbers. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) <= 2**20 for word in words):
        raise UserError(f"{option} {text!r}: write whole numbers from 1 on with commas between, such as 1,4")
    return [int(word) for word in words]


def main() -> None:
    """Run the command line and exit: 0 done, 1 our fault, 2 the user's mistake, 130 interrupted."""
    try:
        code = _exit_code(sys.argv[1:])
    except KeyboardInterrupt:  # a signal while an error is being told, as when torchrun ends all ranks
        code = _INTERRUPTED
    sys.exit(code)


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
    except ImportError as error:
        if error.name != "transformers":  # which our modelling file does not work with
            raise
        return _fail(str(error))
    except MemoryError:  # outside of the stages, which name themselves
        return _fail("the memory of this process does not suffice; free some, or raise its limit (ulimit -v)")
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
    from darwinlm.settings import load_recipe

    checked = load_recipe(recipe, overrides)
    _start(quiet)

    from darwinlm.pipeline import run_recipe

    _finish(run_recipe(checked, out))


def _start(quiet: bool) -> None:
    """What comes before long work."""
    from darwinlm import dist
    from darwinlm.progress import set_up

    dist.start()
    if dist.rank() > 0:
        # They keep no state, and often wait for rank 0 where Python does not come to look at signals.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    set_up(quiet=quiet, silent=dist.rank() > 0)
    _silence_libraries()


def _finish(run: "Run") -> None:
    """Leave the other ranks, and show what came of it."""
    from darwinlm import dist
    from darwinlm.report.summary import show

    main_rank = dist.rank() == 0
    dist.stop()
    if not main_rank:
        return
    console = _console()
    show(run.metrics, console)
    console.print(f"the pruned model: {run.model_path}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"the report: {run.path / 'report' / 'index.html'}", highlight=False, soft_wrap=True, markup=False)


def _console() -> "Console":
    from rich.console import Console

    # Not a terminal: as wide as it needs to be, so that a log holds whole rows.
    return Console() if sys.stdout.isatty() else Console(width=120)


def _silence_libraries() -> None:
    """Their advice is about code that the user did not write; errors still come through."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _overrides(settings: list[str] | None) -> dict[str, Any]:
    from darwinlm.settings import parse_override

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

    if "WORLD_SIZE" in os.environ:  # else a mistake is told without loading PyTorch
        from darwinlm import dist

        if not dist.first_to_say(message):
            return 2
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2
