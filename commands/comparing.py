"""Many runs: `ftd compare`, `ftd table`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ftdpp.commands.shared import (
    FAILED,
    SSDA,
    USAGE,
    Cache,
    Clip,
    Data,
    Device,
    Preset,
    Pretrained,
    Sets,
    SrcData,
    Steps,
    TgtData,
    Version,
    built_in_world,
    cache_folder,
    chosen_device,
    chosen_preset,
    chosen_threads,
    clip_setting,
    fail,
    imagenet_weights,
    known_domain,
    known_roots,
    print_choices,
    require_writable,
    weights_fact,
)

# ---- compare -----------------------------------------------------------------------------------


def compare(
    context: typer.Context,
    src: Annotated[
        str, typer.Option(help="Origin domain; several with commas, each with its --tgt.")
    ] = "usa",
    tgt: Annotated[str, typer.Option(help="Target domain, or several.")] = "singapore",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; NAME[setting=value,...] is a variant, NAME+pl both stages; "
            "paper and ablations are lists. Default: source-only,ftdpp; on images without points "
            "source-only,target-only."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE,...", help="Run with each of these values; repeatable."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, a process each.", min=1)] = 1,
    preset: Preset = None,
    data: Data = None,
    src_data: SrcData = None,
    tgt_data: TgtData = None,
    data_version: Version = None,
    steps: Steps = None,
    set_: Sets = None,
    ssda: SSDA = False,
    pretrained: Pretrained = None,
    clip: Clip = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs; finished ones are not trained again.")
    ] = Path("runs"),
    results: Annotated[
        Path | None, typer.Option(help="File of every number; default OUT/compare.json.")
    ] = None,
    device: Device = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a run; default: the free ones, by --jobs.", min=1),
    ] = None,
    cache: Cache = None,
) -> None:
    """Train several methods with several seeds, select on val, and compare them on test in one
    table. Goes on where it was interrupted, and takes the runs that are there."""
    from ftdpp import compare as comparison
    from ftdpp import kernels, machine, runs, screen
    from ftdpp import results as figures
    from ftdpp.readers import plural

    console = screen.messages()
    pairs = _pairs(src, tgt)
    dev, dev_why = chosen_device(device)
    roots = src_data or data, tgt_data or data
    preset, preset_why = chosen_preset(preset, dev, None in roots)
    overrides = [*(set_ or []), *([f"steps={steps}"] if steps else [])]
    overrides += clip_setting(clip)
    plans = {}
    for pair in pairs:
        scenario = "-".join(pair) + ("-ssda" if ssda else "")
        chosen = comparison.listed(methods, scenario)
        plans[scenario] = comparison.plan(
            scenario, chosen, seeds, preset, overrides, out, sweep or []
        )
        if "val" not in known_domain("--tgt", pair[1]).splits:
            raise fail(f"--tgt {pair[1]}: has no val split to select on; use ftd train", USAGE)
    planned = [job for plan in plans.values() for job in plan]
    require_writable(out, folder=True)
    results = results or out / "compare.json"
    require_writable(results)
    if results.exists():  # one of ours is replaced
        figures.read(results)
    weights = imagenet_weights(pretrained, *(job.recipe for job in planned))
    built_in = [known_roots(*pair, roots) for pair in pairs][-1]  # each is looked at
    folder, folder_why = cache_folder(cache)
    thread_choice = chosen_threads(threads)
    jobs, workers = min(jobs, len(planned)), None
    if jobs > 1:
        cores = machine.allowed_cores()
        workers = min(8, cores // (2 * jobs)) if cores > 4 * jobs else 0
        if threads is None and dev.type == "cpu":
            thread_choice = chosen_threads(1)[0], f"one a run, of {jobs} at once"
    places = {}
    for scenario, pair in zip(plans, pairs, strict=True):
        if built_in:
            where = built_in_world(*pair, folder, machine.allowed_cores(), console)
        else:
            where = Path(roots[0] or "").resolve(), Path(roots[1] or "").resolve()
        sides = {"src": (pair[0], where[0]), "tgt": (pair[1], where[1]), "val": (pair[1], where[1])}
        origins = {side: runs.Origin(*place, data_version) for side, place in sides.items()}
        places[scenario] = runs.Places(origins, folder, built_in)
    work = comparison.Comparison(planned, places, dev, int(thread_choice[0]), weights, workers)
    with screen.bar(console) as tell:
        left, facts = work.prepare(tell)
    choices = {
        "runs": (len(planned), f"seeds {seeds}"),
        "preset": (preset, preset_why),
        "device": (dev, dev_why),
        "kernels": kernels.backend(dev),
        "jobs": (jobs, "--jobs" if jobs > 1 else "one run at a time"),
        "threads": thread_choice,
        "cache": (folder, folder_why),
    }
    print_choices(console, choices, [weights_fact(pretrained), *facts])
    with screen.Display(console, left, several=jobs > 1) as display:
        rows = work.run(display) if jobs == 1 else work.run_parallel(jobs, display)
    if rows:
        for table in figures.tables(rows):
            screen.show(screen.output(), screen.results_table(table))
        here = f"{machine.describe(dev)}, {plural(jobs, 'run')} at a time"
        figures.write(results, rows, _typed(context), here, preset, runs.git_hash())
        console.print(f"every number: {results}", soft_wrap=True)
    work.report()


def _pairs(src: str, tgt: str) -> list[tuple[str, str]]:
    """Sources and targets of --src and --tgt, one to one."""
    sources, targets = src.split(","), tgt.split(",")
    for option, names in (("--src", sources), ("--tgt", targets)):
        for name in names:
            known_domain(option, name)
    if len(sources) != len(targets) or len(set(zip(sources, targets, strict=True))) < len(sources):
        raise fail(
            f"--src {src}, --tgt {tgt}: {len(sources)} and {len(targets)} domains; name a target "
            "for each source, in the same order, and each pair once",
            USAGE,
        )
    return list(zip(sources, targets, strict=True))


def _typed(context: typer.Context) -> str:
    """The command with the options that the user gave; folders, which differ, by their kind."""
    words = ["ftd", str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        given = context.get_parameter_source(name)
        if given is None or given.name != "COMMANDLINE":
            continue
        for part in value if isinstance(value, list | tuple) else [value]:
            text = name.upper() if isinstance(part, Path) else quote(str(part))
            words += [parameter.opts[0], *([] if part is True else [text])]
    return " ".join(words)


class Format(StrEnum):
    text = "text"
    md = "md"
    latex = "latex"
    csv = "csv"
    json = "json"


def table(
    places: Annotated[
        list[Path], typer.Argument(help="Run folders, and files of ftd compare (compare.json).")
    ],
    form: Annotated[Format, typer.Option("--format", help="Of the table.")] = Format.text,
    classes: Annotated[
        bool, typer.Option("--classes", help="IoU of every class instead of mIoU of every head.")
    ] = False,
    head: Annotated[
        str | None, typer.Option(help="With --classes: 2d, 3d or 2d+3d; default: the last.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split; default: test, or val.")
    ] = None,
) -> None:
    """One table from runs: mean and deviation over seeds, beside what the papers report.
    Runs that were evaluated (ftd eval, ftd compare) hold their figures."""
    from ftdpp import results, screen

    if head is not None and not classes:
        raise fail("--head chooses whose classes are shown; add --classes", USAGE)
    rows = results.collect(places, split)
    if not rows:
        what = f"no figure of the split {split}" if split else "no figure in these files"
        raise fail(f"{what}; evaluate the runs first: ftd eval RUN", FAILED)
    made = results.tables(rows, classes, head)
    if form is Format.csv:
        print(results.as_csv(made), end="")
    if form is Format.json:
        print(results.as_json(made))
    for one in made if form not in (Format.csv, Format.json) else []:
        if form is Format.text:
            screen.show(screen.output(), screen.results_table(one))
        elif form is Format.md:
            print(f"{one.title}\n\n{results.markdown(one)}")
        else:
            print(f"% {one.title}\n{results.latex(one)}")
