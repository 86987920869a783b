"""The commands and their options. What each does is in a module of its own."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import torchq
from torchq.command_line.console import FAILED, guarded, print_json

app = typer.Typer(
    name="torchq",
    help="Real int8 speed for PyTorch models on a CPU.\n\n"
    "Exit codes: 0 fine, 1 a check failed, 2 wrong usage or input, 3 an error of torchq's own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Scheme = Literal["auto", "static", "dynamic"]
Rounding = Literal["auto", "nearest", "gptq"]
Smoothing = Literal["auto", "none"]
Tables = Literal["auto", "int8", "float"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
Directory = Annotated[Path, typer.Argument(metavar="OUT", help="A directory that `torchq convert` wrote.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"torchq {torchq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def env(as_json: Json = False) -> None:
    """What this machine has: CPU features, each kernel and why it can or cannot run, threads, versions.

    Add it to a bug report.
    """
    from torchq.command_line import environment

    found = environment.facts()
    print_json(found) if as_json else environment.show(found)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The float model: what save_pretrained wrote.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write. It must not exist.")],
    calib: Annotated[
        Path | None, typer.Option(help="Typical texts, one in each line; a hundred or more. Without, no data is used.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a batch of calibration.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text, at most; the model's own limit without.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Texts to use, at most.")] = 256,
    activation: Annotated[Scheme, typer.Option(help="How inputs are quantized.")] = "auto",
    rounding: Annotated[Rounding, typer.Option(help="How weights are rounded.")] = "auto",
    smoothing: Annotated[Smoothing, typer.Option(help="Whether outliers move from inputs into weights.")] = "auto",
    embeddings: Annotated[Tables, typer.Option(help="Whether embeddings get int8 tables.")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, float32, bfloat16, int8_bfloat16, int8, or none.")] = "auto",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers to leave in float, a pattern of names; may be repeated.")
    ] = None,
) -> None:
    """Convert a directory of a Hugging Face model, or of a SentenceTransformer, to int8.

    OUT has everything that DIR has, with int8 weights. Load it as before, after `import torchq.hf`.
    """
    from torchq import QConfig
    from torchq.command_line.convert import convert as convert_directory

    config = QConfig(
        activation=activation,
        rounding=rounding,
        smoothing=smoothing,
        embeddings=embeddings != "float" and embeddings,
        attention=attention,
        exclude=tuple(exclude or ()),
    )
    convert_directory(source, target, calib, config=config, batch_size=batch_size, max_length=max_length, limit=limit)


@app.command()
def report(
    directory: Directory,
    page: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to write the page; report.html by default.")
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Write a page instead of printing.")] = False,
    times: Annotated[bool, typer.Option("--times", help="Time each layer in float and int8.")] = False,
    as_json: Json = False,
) -> None:
    """What each layer became: scheme, bytes, accuracy, and why."""
    from torchq.command_line import look

    if page is None and html:
        page = Path("report.html")
    look.report(directory, page=page, times=times, as_json=as_json)


@app.command()
def verify(
    directory: Directory,
    texts: Annotated[Path | None, typer.Option(help="Texts to run, one in each line. Without, random tokens.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="How many texts.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens each.")] = 32,
    as_json: Json = False,
) -> None:
    """Check every kernel of this CPU on the model's own shapes.

    Each kernel against the reference, and int8 against the simulated path. Exits with 1 if any is wrong.
    """
    from torchq.command_line import look

    if not look.verify(directory, texts, batch=batch, tokens=tokens, as_json=as_json):
        raise typer.Exit(FAILED)


@app.command()
def bench(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A model, in float or int8. Without, single layers.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="BATCHxTOKENS of a model, or ROWSxINxOUT of a layer; may be repeated.", metavar="SHAPE"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="The best of so many rounds counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Time int8 against float on this machine.

    Contestants take turns, so quote the ratios.
    """
    import torch

    from torchq.command_line import bench as benchmark

    if threads is not None:
        torch.set_num_threads(threads)
    if directory is None:
        layers = benchmark.bench_layers(benchmark.layer_shapes(shape), rounds)
        print_json(layers) if as_json else benchmark.show_layers(layers)
    else:
        model = benchmark.bench_model(directory, benchmark.model_shapes(shape), rounds)
        print_json(model) if as_json else benchmark.show_model(model)


def run() -> None:
    """The command of `sys.argv`."""

    def command() -> int:
        try:
            app(prog_name="torchq")
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
        return 0

    sys.exit(guarded(command, show_traceback="--traceback" in sys.argv))
