"""The command line. Each command imports what it needs when it runs, so that ``--help`` does not wait for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nmforge.console import err, guarded, out

__all__ = ["app", "main"]

app = typer.Typer(
    name="nmforge",
    help="From a PyTorch network to N:M sparse silicon: train, compress, compile, simulate bit-exactly, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong use or bad input. NMFORGE_DEBUG=1 shows tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point."""
    app()


def _examples(*lines: str) -> str:
    """The end of a command's help."""
    return "[bold]Examples[/]\n\n" + "\n\n".join(f"[cyan]nmforge {line}[/]" for line in lines)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from nmforge import __version__

        print(__version__)
        raise typer.Exit


# -- options that several commands have -------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress stays on stderr.")]
ArchName = Annotated[str, typer.Option("--arch", metavar="PRESET", help="tiny, ecp5, sta256, sta1024, sta4096.")]
PatternText = Annotated[
    str,
    typer.Option(
        "--pattern", "-p", metavar="N:M",
        help='N:M of every layer, or a mix by layer name: "*.attention.*=2:4,*.up=1:8"; layers not named stay dense.',
    ),
]  # fmt: skip
HeldOut = Annotated[int, typer.Option("--held-out", min=1, help="Sentences on which accuracy is measured.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what earlier runs left in the folder.")]
Quick = Annotated[bool, typer.Option("--quick", help="Train on a fifth of the sentences: minutes less, points less.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is random.")]
Length = Annotated[int, typer.Option("--length", min=1, help="Tokens that each sentence is padded to.")]
Calibration = Annotated[int, typer.Option("--calibration", min=1, help="Sentences from which scales are chosen.")]
Stalls = Annotated[float, typer.Option("--stalls", metavar="P", help="Probability that a memory channel pauses.")]
Latency = Annotated[int, typer.Option("--latency", help="Cycles from an address to its first data.")]
Bandwidth = Annotated[
    int | None, typer.Option("--bandwidth", help="Bytes a cycle, reads and writes; by default the bus width.")
]

# -- demo -------------------------------------------------------------------------------------------------------------

DemoFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of checkpoints, programs and report.")]
Sentences = Annotated[int, typer.Option("--sentences", min=1, help="Sentences simulated at once.")]


@app.command(
    epilog=_examples(
        "demo", "demo --pattern 1:4 --out out/demo-1of4", 'demo -p "*.attention.*=2:4,*=1:4"', "demo --fresh --json"
    )
)
@guarded
def demo(
    pattern: PatternText = "2:4",
    folder: DemoFolder = Path("out/demo"),
    arch: ArchName = "sta1024",
    sentences: Sentences = 8,
    length: Length = 32,
    held_out: HeldOut = 2000,
    calibration: Calibration = 128,
    stalls: Stalls = 0.0,
    latency: Latency = 64,
    bandwidth: Bandwidth = None,
    seed: Seed = 0,
    quick: Quick = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Train a real transformer sparse, compile it, simulate it, and prove every byte.

    MiniLM-L6 with its published weights learns the sentiment of movie
    sentences, is pruned to N:M, quantised, compiled and simulated in Verilator
    beside the dense network. Ends with a table, summary.json and report.html.
    A second run reuses what has not changed; Ctrl-C loses at most one epoch.
    """
    from nmforge.arguments import parse_arch, parse_pattern

    chosen, table = parse_arch(arch), parse_pattern(pattern)
    from nmforge.demo import DemoConfig, run_demo
    from nmforge.errors import CheckFailedError
    from nmforge.sentiment import SentimentConfig
    from nmforge.tables import print_summary
    from sim.memory import MemoryModel

    config = DemoConfig(
        pattern=table, arch=chosen, out=folder, batch=sentences, length=length, test_size=held_out, seed=seed,
        calibration=calibration, training=SentimentConfig(sentences=1000) if quick else SentimentConfig(),
        memory=MemoryModel(latency=latency, bytes_per_cycle=bandwidth, stall_probability=stalls, seed=seed),
    )  # fmt: skip
    summary = run_demo(config, fresh=fresh)
    if not as_json:
        print_summary(summary)
    if not summary["bit_exact"]:
        raise CheckFailedError(f"not bit-exact: see the mismatches in {summary['files']['summary']}", summary)
    return summary


# -- models and train -------------------------------------------------------------------------------------------------


ModelFilter = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Part of the names, or a glob; by default all.")]
Family = Annotated[str | None, typer.Option("--family", "-f", help="Only models of this family, such as ResNet or LLaMA.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="The page docs/counts.md: counts beside published figures.")]


@app.command(epilog=_examples("models", "models resnet", "models --family DeiT --json", "models --markdown > docs/counts.md"))
@guarded
def models(name: ModelFilter = None, family: Family = None, markdown: Markdown = False, as_json: Json = False) -> dict[str, Any]:
    """List the registered models: family, parameters, MACs, activations, input shape, paper.

    The first listing counts them on the meta device, later ones recall it.
    """
    from nmforge.catalogue import catalogue, counts_page
    from nmforge.tables import print_models

    rows = catalogue(name, family=family)
    if markdown and not as_json:
        print(counts_page(row["name"] for row in rows), end="")
    elif not as_json:
        print_models(rows)
    return {"models": rows}


TrainFolder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the checkpoints; by default out/train or what the config says.")
]
DenseEpochs = Annotated[int | None, typer.Option("--dense-epochs", min=1, help="Epochs of dense fine-tuning.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Epochs of each pruning level.")]
PerEpoch = Annotated[int | None, typer.Option("--sentences", min=1, help="Sentences per epoch.")]
TrainPattern = Annotated[
    str | None,
    typer.Option("--pattern", "-p", metavar="N:M", help="N:M of every layer, or a mix by layer name; 2:4 if nothing says else."),
]
ConfigFiles = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", metavar="YAML", help="File, or name of a ready one; several are laid over each other."),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the config.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, by the config that it keeps.")]
ListConfigs = Annotated[bool, typer.Option("--list", help="List the ready configs, tasks and methods, and stop.")]


@app.command(
    epilog=_examples(
        "train --pattern 2:4 --out out/train",
        "train -p 1:8 --epochs 2",
        "train --config mnist5k --out out/mnist",
        "train --config r8 --config methods/idp --pattern 1:4 --set train.lr=1e-4",
        "train --config my.yaml --set run.save_every=50 --json",
        "train --resume --out out/mnist",
        "train --list",
    )
    + "\n\nSeveral processes: [cyan]torchrun --nproc-per-node 2 -m nmforge train --config mnist5k[/]"
)
@guarded
def train(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    resume: Resume = False,
    pattern: TrainPattern = None,
    folder: TrainFolder = None,
    dense_epochs: DenseEpochs = None,
    epochs: Epochs = None,
    sentences: PerEpoch = None,
    held_out: HeldOut = 2000,
    seed: Seed = 0,
    quick: Quick = False,
    fresh: Fresh = False,
    listing: ListConfigs = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Train a network N:M sparse.

    With --config: any task and method, see docs/training.md. Without: MiniLM-L6
    on the sentiment of movie sentences, pruned level by level, as in the demo.

    A run that was stopped or killed goes on by the same command. The sparse
    model is in OUT/.../sparse; nmforge compile takes the folder of movies.
    """
    if listing:
        return _list_training(as_json)
    if config or resume or overrides:
        from nmforge.errors import BadInputError

        other = {"--dense-epochs": dense_epochs, "--epochs": epochs, "--sentences": sentences, "--quick": quick or None}
        other |= {"--held-out": None if held_out == 2000 else held_out, "--seed": seed or None}
        given = [name for name, value in other.items() if value is not None]
        if given:
            raise BadInputError(f"{given[0]} does not go with --config: use --set, such as --set train.epochs=3 or --set seed=1")
        if not (config or resume):
            raise BadInputError("--set overrides a config: name one with --config (nmforge train --list shows the ready ones)")
        return _train_config(config or [], overrides or [], resume, pattern, folder, fresh, as_json)
    from nmforge.arguments import parse_pattern

    table = parse_pattern(pattern or "2:4")
    from nmforge.commands import run_training

    result = run_training(
        table, folder or Path("out/train"), dense_epochs=dense_epochs, epochs=epochs,
        sentences=1000 if quick else sentences, held_out=held_out, seed=seed, fresh=fresh,
    )  # fmt: skip
    if not as_json:
        for stage in result["stages"]:
            out().print(f"{stage['name']:<12} accuracy {stage['accuracy']:.1%}   {stage['folder']}", soft_wrap=True)
        out().print(f"sparse model: {result['sparse']}", soft_wrap=True)
    return result


def _train_config(
    sources: list[str], overrides: list[str], resume: bool, pattern: str | None, folder: Path | None, fresh: bool, as_json: bool
) -> dict[str, Any]:
    from nmforge.training import configuration, run_config

    chosen = configuration(sources, overrides, pattern=pattern, out=folder, resume=resume)
    result = run_config(chosen, fresh=fresh)
    if not as_json:
        for stage, accuracy in result["accuracy"].items():
            out().print(f"{stage:<12} accuracy {accuracy:.1%}", soft_wrap=True)
        out().print(f"model: {result['sparse']}\ncurves: {result['log']}", soft_wrap=True)
    return result


def _list_training(as_json: bool) -> dict[str, Any]:
    from nmforge.tasks import list_tasks
    from nmforge.training import methods, ready_configs

    found = {"configs": ready_configs(), "tasks": list_tasks(), "methods": methods()}
    if not as_json:
        for what, names in found.items():
            out().print(f"[bold]{what:<8}[/] {', '.join(names)}")
    return found


# -- verify ----------------------------------------------------------------------------------------------------------

Checkpoint = Annotated[
    Path, typer.Argument(help="A .safetensors, .pt, .pth or .bin file, a folder of shards, or a folder of nmforge.")
]
CheckPattern = Annotated[
    str | None,
    typer.Option("--pattern", "-p", metavar="N:M", help="Of all weights but embeddings and heads, or globs; else as recorded."),
]


@app.command(
    epilog=_examples(
        "verify out/demo/sparse", "verify model.safetensors -p 2:4", 'verify shards/ -p "*.mlp.*=1:8,*=dense" --json'
    )
)
@guarded
def verify(checkpoint: Checkpoint, pattern: CheckPattern = None, as_json: Json = False) -> dict[str, Any]:
    """Check the weights of any checkpoint against N:M patterns: violations by weight, row and group.

    Exit code 1 if there are any. Embeddings and output heads are left out unless
    a glob names them.
    """
    from nmforge.checking import check, print_check
    from nmforge.errors import CheckFailedError

    result = check(checkpoint, pattern)
    if not as_json:
        print_check(result)
    if not result["ok"]:
        raise CheckFailedError(f"{result['violations']} groups in {checkpoint} break their pattern", result)
    return result


# -- compile ----------------------------------------------------------------------------------------------------------

SourceName = Annotated[str, typer.Argument(help="Folder that train or demo left, name of a registered model, or ONNX file.")]
ProgramFile = Annotated[Path, typer.Option("--output", "-o", help="Program file to write.")]
Choice = Annotated[
    str | None,
    typer.Option(
        "--pattern", "-p", metavar="N:M",
        help="Which model of a folder (dense: before pruning); or how to prune a registered one, by magnitude.",
    ),
]  # fmt: skip
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences in one run.")]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Published weights of a registered model; else random ones.")
]
Whole = Annotated[
    bool, typer.Option("--whole", help="The whole network, token numbers or images in; else the encoder of a sentence model.")
]
HostWork = Annotated[
    str, typer.Option("--host", help="allow: what the accelerator cannot do runs on the host. forbid: it is an error.")
]
ObserverName = Annotated[
    str,
    typer.Option("--observer", help="How 8-bit ranges are chosen: mse, minmax, entropy, percentile, or percentile:99.9."),
]
Smooth = Annotated[
    float | None,
    typer.Option("--smooth", metavar="ALPHA", help="Move outliers of activations into weights (SmoothQuant), 0 to 1."),
]
BiasCorrection = Annotated[
    bool, typer.Option("--bias-correction/--no-bias-correction", help="Let biases take up what rounding weights does to means.")
]
Bits16 = Annotated[
    list[str] | None,
    typer.Option("--bits16", metavar="PATTERN", help="Tensors with 16 bits, by glob of layer names; again for more; or auto."),
]
ResidualBits = Annotated[int, typer.Option("--residual-bits", help="8 or 16, of normalised tensors that are residuals.")]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic", metavar="NAME=VALUES",
        help="What a dimension may be: length=16,32,64 or batch=1,8; of ONNX files by their own names; or INPUT:NUMBER=VALUES.",
    ),
]  # fmt: skip
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=VALUE", help="Of a program for several shapes: which, as length=32; else the largest."),
]
Listing = Annotated[Path | None, typer.Option("--listing", help="Also write the program as text.")]


@app.command(
    "compile",
    epilog=_examples(
        "compile out/train -o x.nmf",
        "compile minilm_l6 --pattern 1:4 --pretrained -o x.nmf",
        "compile minilm_l6 --whole --pretrained -o x.nmf",
        "compile model.onnx --host forbid -o x.nmf",
        "compile minilm_l6 --pretrained --dynamic length=16,32,64 --dynamic batch=1,8 -o x.nmf",
        "compile tinybert_4 --batch 2 --length 128 --listing x.txt -o x.nmf",
        "compile minilm_l6 --pretrained --observer percentile:99.9 --smooth 0.5 -o x.nmf",
        'compile minilm_l6 --pretrained --bits16 "layers.5.*" --residual-bits 16 -o x.nmf',
    ),
)
@guarded
def compile_command(
    source: SourceName,
    output: ProgramFile,
    pattern: Choice = None,
    arch: ArchName = "sta1024",
    batch: Batch = 8,
    length: Length = 32,
    pretrained: Pretrained = False,
    calibration: Calibration = 128,
    listing: Listing = None,
    whole: Whole = False,
    host: HostWork = "allow",
    dynamic: Dynamic = None,
    observer: ObserverName = "mse",
    smooth: Smooth = None,
    bias_correction: BiasCorrection = True,
    bits16: Bits16 = None,
    residual_bits: ResidualBits = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Quantise a network and compile it to one program file.

    Of a sentence model, the encoder: it takes embedded tokens (batch, length,
    channels) and a padding mask. With --whole, and of ONNX files, all of it;
    what the accelerator cannot do runs on the host, and nmforge report says
    what and why. With --dynamic, one file for several lengths or batch sizes.
    """
    from nmforge.arguments import parse_arch, parse_dynamic, parse_pattern

    shapes = parse_dynamic(dynamic or [])
    chosen = parse_arch(arch)
    table = None if pattern is None else parse_pattern(pattern)
    from nmforge.commands import build_program, quantisation_options

    quantisation = quantisation_options(
        observer=observer, smooth=smooth, bias_correction=bias_correction, bits16=bits16 or [], residual_bits=residual_bits
    )
    result = build_program(
        source, output, pattern=table, arch=chosen, batch=batch, length=length, pretrained=pretrained,
        calibration=calibration, listing=listing, seed=seed, whole=whole, host=host,  # type: ignore[arg-type]
        quantisation=quantisation, dynamic=shapes,
    )  # fmt: skip
    if not as_json:
        before, after = result["weight_bytes_dense"] / 1e6, result["weight_bytes"] / 1e6
        out().print(
            f"{output}: {result['operators']} operators, {result['instructions']:,} instructions for {result['arch']}, "
            f"weights {before:.2f} MB as int8, {after:.2f} MB stored, at least {result['bound_cycles']:,} cycles",
            soft_wrap=True,
        )
        if result["variants"]:
            count = len(result["variants"])
            out().print(f"{count} shapes, the figures are of the largest: nmforge report {output}", soft_wrap=True)
        if result["host_operators"]:
            out().print(
                f"{result['host_operators']} operators with {result['macs_host']:,} MACs on the host: nmforge report {output}",
                soft_wrap=True,
            )
    return result


# -- compare ----------------------------------------------------------------------------------------------------------

PlotFile = Annotated[Path | None, typer.Option("--output", "-o", help="Plot of every layer, .png or .svg, the worst named.")]
WorstCount = Annotated[int, typer.Option("--worst", min=1, help="Layers to name.")]


@app.command(
    epilog=_examples(
        "compare minilm_l6 --pretrained -o layers.png",
        "compare out/train --smooth 0.5 --worst 8",
        "compare model.onnx --observer entropy --json",
    )
)
@guarded
def compare(
    source: SourceName,
    output: PlotFile = None,
    worst: WorstCount = 5,
    pattern: Choice = None,
    arch: ArchName = "sta1024",
    batch: Batch = 8,
    length: Length = 32,
    pretrained: Pretrained = False,
    calibration: Calibration = 128,
    whole: Whole = False,
    host: HostWork = "allow",
    observer: ObserverName = "mse",
    smooth: Smooth = None,
    bias_correction: BiasCorrection = True,
    bits16: Bits16 = None,
    residual_bits: ResidualBits = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> dict[str, Any]:
    """Compile a network and show what its integers lose, layer by layer: SQNR and cosine to float.

    Takes what nmforge compile takes. The integers are those of the reference,
    which the accelerator equals; the inputs are the first calibration batch.
    """
    from nmforge.arguments import parse_arch, parse_pattern
    from nmforge.commands import compare_layers, quantisation_options

    result = compare_layers(
        source, output, count=worst, pattern=None if pattern is None else parse_pattern(pattern), arch=parse_arch(arch),
        batch=batch, length=length, pretrained=pretrained, calibration=calibration, seed=seed, whole=whole, host=host,
        quantisation=quantisation_options(
            observer=observer, smooth=smooth, bias_correction=bias_correction, bits16=bits16 or [], residual_bits=residual_bits
        ),
    )  # fmt: skip
    table = result.pop("table")
    if not as_json:
        print(table)
        for layer in result["worst"]:
            name = layer["source"] or layer["name"]
            out().print(f"worst: {name} ({layer['operator']}), {layer['sqnr']:.1f} dB", soft_wrap=True)
    return result


# -- simulate ---------------------------------------------------------------------------------------------------------

Program = Annotated[Path, typer.Argument(help="Program file.")]
OnlyArch = Annotated[
    str | None, typer.Option("--arch", metavar="PRESET", help="Refuse a program that was compiled for another.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="verilator: the RTL. isa: functional. cycle: the RTL's cycles, without data.")
]
Inputs = Annotated[
    Path | None, typer.Option("--inputs", help="The model's inputs by name, .npz or .safetensors; else random ones.")
]
Outputs = Annotated[Path | None, typer.Option("--outputs", help="Write the model's outputs: .npz or .safetensors.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Compare every byte with the integer reference.")]
TraceFile = Annotated[Path | None, typer.Option("--trace", help="FST file of waveforms.")]
First = Annotated[int, typer.Option("--from", min=0, help="First cycle of the trace.")]
Last = Annotated[int | None, typer.Option("--to", help="Cycle before which the trace ends.")]


@app.command(
    epilog=_examples(
        "simulate x.nmf",
        "simulate x.nmf --engine isa --inputs in.npz --outputs out.npz",
        "simulate x.nmf --stalls 0.2 --seed 7 --latency 100 --json",
        "simulate x.nmf --engine cycle --latency 200",
        "simulate x.nmf --shape length=32 --shape batch=1",
        "simulate x.nmf --trace x.fst --from 1000 --to 2000",
    )
)
@guarded
def simulate(
    program: Program,
    arch: OnlyArch = None,
    engine: EngineName = "verilator",
    inputs: Inputs = None,
    outputs: Outputs = None,
    check: Check = True,
    stalls: Stalls = 0.0,
    latency: Latency = 64,
    bandwidth: Bandwidth = None,
    seed: Seed = 0,
    shape: Shape = None,
    trace: TraceFile = None,
    first: First = 0,
    last: Last = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Run a program on the simulated accelerator and check every byte that it writes."""
    from nmforge.arguments import parse_arch, parse_sizes

    wanted = None if arch is None else parse_arch(arch)
    from nmforge.commands import run_program
    from nmforge.errors import CheckFailedError
    from nmforge.tables import print_run
    from sim.memory import MemoryModel
    from sim.report import run_record
    from sim.trace import Trace

    memory = MemoryModel(latency=latency, bytes_per_cycle=bandwidth, stall_probability=stalls, seed=seed)
    loaded, run = run_program(
        program, arch=wanted, engine=engine, inputs=inputs, outputs=outputs, check=check, memory=memory,
        trace=None if trace is None else Trace(trace, first, last), seed=seed, shape=parse_sizes(shape or []),
    )  # fmt: skip
    record = {"program_file": str(program), **run_record(loaded, run)}
    if not as_json:
        print_run(run)
    if run.bit_exact is False:
        raise CheckFailedError("not bit-exact: " + "; ".join(map(str, run.mismatches)), record)
    return record


# -- report and verilog -----------------------------------------------------------------------------------------------

ReportSource = Annotated[
    Path | None, typer.Argument(help="Folder of the demo, its summary.json, what simulate --json printed, or a program file.")
]
ReportFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="HTML file; by default report.html beside the source.")
]
MemoryFile = Annotated[
    Path | None, typer.Option("--memory", metavar="PNG", help="Of a program: picture of what lies where in memory, and when.")
]
Zoo = Annotated[bool, typer.Option("--zoo", help="The co-design table of all seed systems; goes on where it was stopped.")]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="MODEL", help="Of the table: these networks alone.")]
Cache = Annotated[Path | None, typer.Option("--cache", help="Of the table: folder of its measurements.")]
TableText = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
TablePlot = Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the table.")]
Rtl = Annotated[bool, typer.Option("--rtl", help="Of the table: also run the RTL and compare every byte; needs --only.")]
Again = Annotated[bool, typer.Option("--fresh", help="Of the table: measure again what earlier sources gave.")]


@app.command(
    epilog=_examples(
        "report out/demo", "report x.nmf", "report x.nmf --memory memory.png", "report --zoo --plot zoo.png",
        "report --zoo --only deit_tiny --rtl", "simulate x.nmf --json > run.json && nmforge report run.json -o run.html",
    )
)  # fmt: skip
@guarded
def report(
    source: ReportSource = None,
    output: ReportFile = None,
    memory: MemoryFile = None,
    shape: Shape = None,
    zoo: Zoo = False,
    only: Only = None,
    arch: ArchName = "sta1024",
    cache: Cache = None,
    markdown: TableText = False,
    plot: TablePlot = None,
    rtl: Rtl = False,
    fresh: Again = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a self-contained HTML report of a demo or of one simulation; of a program, list what runs where.

    With --zoo: the co-design table of the seed systems (parameters, MACs,
    patterns, storage, cycles, utilisation, what the host does).
    """
    from nmforge.errors import BadInputError

    if zoo:
        if source is not None or output is not None or memory is not None:
            raise BadInputError("--zoo measures its own networks: give neither a source nor --output nor --memory with it")
        if rtl and not only:
            raise BadInputError("--rtl takes minutes to hours a network: say which with --only")
        from nmforge.arguments import parse_arch
        from nmforge.reports import zoo_report

        return zoo_report(
            only or [], parse_arch(arch), cache, as_markdown=markdown, plot=plot, rtl=rtl, fresh=fresh, quiet=as_json
        )
    if source is None:
        raise BadInputError("name what to report on: a folder, a file, or --zoo")
    if only or cache or markdown or plot or rtl or fresh:
        raise BadInputError("--only, --cache, --markdown, --plot, --rtl and --fresh go with --zoo")
    if source.suffix == ".nmf":
        if output is not None:
            raise BadInputError("a program's report is text, --memory draws its memory: give --output with a summary of a run")
        from nmforge.arguments import parse_sizes
        from nmforge.reports import program_report

        return program_report(source, memory, shape=parse_sizes(shape or []), quiet=as_json)
    if shape:
        raise BadInputError("--shape goes with a program file")
    if memory is not None:
        raise BadInputError(f"--memory draws a program, and {source} is none: give the .nmf file")
    from algo.checkpoint import read_json
    from sim.report import write_report

    file = source / "summary.json" if source.is_dir() else source
    if not file.is_file():
        raise BadInputError(f"no summary at {file}: run nmforge demo, or nmforge simulate --json > run.json")
    target = output or file.parent / "report.html"
    write_report(read_json(file), target)
    size = target.stat().st_size
    if not as_json:
        out().print(f"{target}: {size:,} bytes", soft_wrap=True)
    return {"report": str(target), "source": str(file), "bytes": size}


Preset = Annotated[str, typer.Argument(help="tiny, ecp5, sta256, sta1024, sta4096.")]
VerilogFile = Annotated[Path | None, typer.Option("--output", "-o", help="File; by default stdout.")]


@app.command(epilog=_examples("verilog sta1024 -o sta1024.v", "verilog tiny | less"))
@guarded
def verilog(preset: Preset, output: VerilogFile = None, as_json: Json = False) -> dict[str, Any]:
    """Write the whole accelerator as one Verilog-2001 file."""
    from nmforge.arguments import parse_arch
    from nmforge.errors import BadInputError

    arch = parse_arch(preset)
    if as_json and output is None:
        raise BadInputError("--json needs --output: stdout has room for one of them")
    from nmforge.hardware import write_verilog

    with err().status(f"generating {arch.name}"):
        text, facts = write_verilog(arch, output)
    if output is None:
        print(text, end="")
    elif not as_json:
        out().print(f"{output}: {facts['lines']:,} lines, module {facts['top']}, {facts['seconds']} s", soft_wrap=True)
    return facts


TargetName = Annotated[
    str,
    typer.Option("--target", "-t", help="xcup: UltraScale+. xc7: 7 series. intel: Cyclone V. ecp5: Lattice ECP5."),
]  # fmt: skip
PlaceAndRoute = Annotated[
    bool, typer.Option("--place-and-route", help="Also place and route, with nextpnr; ecp5 only, minutes.")
]
Limit = Annotated[float | None, typer.Option("--timeout", metavar="S", help="Give up after so many seconds.")]


@app.command(
    epilog=_examples("synth sta1024", "synth ecp5 --target ecp5 --place-and-route", "synth sta256 -t xcup --json > sta256.json")
)
@guarded
def synth(
    preset: Preset,
    target: TargetName = "xcup",
    place: PlaceAndRoute = False,
    timeout: Limit = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Map the accelerator to an FPGA family by open tools: resources, share of its device, logic levels by module.

    Modules are mapped one by one with Yosys, each once, and kept: a second run
    takes seconds. The counts are before place and route. With
    --place-and-route, nextpnr gives clock frequency and critical path.
    """
    from nmforge.arguments import parse_arch

    arch = parse_arch(preset)
    from nmforge.silicon import measure, print_synth

    result = measure(arch, target, place=place, timeout_s=timeout, progress=lambda line: err().print(line, style="dim"))
    if not as_json:
        print_synth(result)
    return result
