"""What there is, and whether it works here: `ftd recipes`, `clip`, `bench`, `doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ftdpp.commands.shared import (
    FAILED,
    USAGE,
    AsJson,
    Cache,
    Data,
    Device,
    Preset,
    Sets,
    Threads,
    Version,
    built_in_world,
    cache_folder,
    chosen_device,
    chosen_preset,
    chosen_threads,
    fail,
    known_domain,
    known_roots,
    print_choices,
    require_writable,
)

# ---- clip --------------------------------------------------------------------------------------


def clip(
    domain: Annotated[
        str, typer.Option(help="Whose frames are labelled, e.g. singapore.")
    ] = "singapore",
    name: Annotated[
        str, typer.Option("--clip", help="street, a folder, or a name on the hub.")
    ] = "street",
    data: Data = None,
    data_version: Version = None,
    split: Annotated[str | None, typer.Option(help="Default: test, or val.")] = None,
    preset: Preset = None,
    set_: Sets = None,
    as_json: AsJson = False,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """What a frozen CLIP knows without any training: label frames by its texts of the classes.
    The built-in street CLIP is trained first where it is missing."""
    from ftdpp import evaluate as protocol
    from ftdpp import runs, screen, systems
    from ftdpp.systems.clip import make_ready
    from ftdpp.systems.clip2uda import ZeroShot

    console, row = screen.messages(), known_domain("--domain", domain)
    dev, dev_why = chosen_device(device)
    preset, preset_why = chosen_preset(preset, dev, data is None)
    # Of this method only class set, image size and batch: all data sets have it.
    r = systems.recipe(f"{domain}-{domain}", "target-only", preset, overrides=set_ or [])
    built_in = known_roots(domain, domain, (data, data))
    folder, thread_choice = cache_folder(cache)[0], chosen_threads(threads)
    chosen = {"preset": (preset, preset_why), "device": (dev, dev_why), "threads": thread_choice}
    print_choices(console, chosen, [])
    root = data
    if built_in:
        root = built_in_world(domain, domain, folder, int(thread_choice[0]), console)[0]
    assert root is not None
    split = split or ("test" if "test" in row.splits else "val")
    if split not in row.splits:
        raise fail(f"--split {split}: {domain} has {', '.join(row.splits)}", USAGE)
    with screen.bar(console) as tell:
        looker = make_ready(name, tell)
        index = runs.Origin(domain, root.resolve(), data_version).index(split, r, folder, tell)
        score = protocol.evaluate(ZeroShot(r, looker), index, f"CLIP {name}", dev, tell)
    if as_json:
        print(json.dumps({**score.as_dict(), "clip": name}))
    else:
        screen.show(screen.output(), screen.score_table(score, "zero-shot"))


# ---- recipes, data -----------------------------------------------------------------------------


def recipes(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: scenario -> method -> recipe.")
    ] = False,
    scenario: Annotated[
        str | None, typer.Option(help="Only this one; SRC-TGT of any pair, -ssda behind it.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    preset: Annotated[str, typer.Option(help="paper or small.")] = "paper",
    second: Annotated[
        bool, typer.Option("--pseudo", help="The second stage, on pseudo-labels.")
    ] = False,
) -> None:
    """Show every scenario and method, with the settings in which they differ."""
    import dataclasses

    from ftdpp import screen, systems

    known = systems.known_scenarios()
    made: dict[str, list[Any]] = {}
    for name in [scenario] if scenario else known:
        methods = systems.methods_for(name, second) or list(systems.METHODS)[:1]  # which refuses
        if method and (scenario or method in methods or method not in systems.METHODS):
            methods = [method]  # asked for by name: what is wrong with it is said
        elif method:
            continue
        made[name] = [systems.recipe(name, m, preset, second) for m in methods]
    if as_json:
        table = {
            name: {r.method: dataclasses.asdict(r) for r in rows} for name, rows in made.items()
        }
        print(json.dumps(table))
        return
    console = screen.output()
    for name, rows in made.items():
        console.print(screen.recipes_table(rows, f"{name}, {preset} preset"))
    screen.messages().print(
        f"{preset} preset; every setting: ftd recipes --json; override one: ftd train ... --set "
        "NAME=VALUE",
        soft_wrap=True,
    )


# ---- bench, doctor -----------------------------------------------------------------------------


def bench(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="CSV to append the rows to.")] = None,
    scan: Annotated[
        list[Path] | None,
        typer.Option(
            help="A SemanticKITTI scan (.bin) to time too; repeatable.", exists=True, dir_okay=False
        ),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Time maps, sparse U-Net, data loading and the training step on this machine, beside what it
    can do at best."""
    from ftdpp import machine, screen
    from ftdpp.kernels import check

    try:
        from ftdpp.bench import speed
    except ModuleNotFoundError as error:
        if error.name != "ftdpp.bench":
            raise
        raise fail(
            "the benchmarks are part of the repository, not of the installed package; clone it and "
            "run: make setup",
            USAGE,
        ) from None
    if out is not None:
        require_writable(out)
        speed.check_columns(out)
    folder = cache_folder(cache)[0]
    dev, _ = chosen_device(device)
    chosen_threads(threads)
    wrong = [c for c in check.run(dev) if not c.ok]
    if wrong:
        raise fail(
            f"{wrong[0].what} ({wrong[0].dtype}) is wrong on this machine, so its time means "
            "nothing: ftd doctor",
            FAILED,
        )
    console = screen.messages()
    root, _ = built_in_world("usa", "singapore", folder, machine.allowed_cores(), console)
    with screen.bar(console) as tell:
        rows = speed.run(root, folder, rounds, dev, scans=scan or [], progress=tell)
    screen.show(screen.output(), screen.plain_table(rows, machine.describe(dev)))
    if out is not None:
        speed.append(out, rows, dev)


def doctor(device: Device = None, as_json: AsJson = False) -> None:
    """Versions, device, and every sparse operation checked on this machine: paste it into a bug
    report."""
    import importlib.metadata
    import platform

    from ftdpp import kernels, machine, screen
    from ftdpp.kernels import check

    dev, dev_why = chosen_device(device)
    system = f"{platform.system()} {platform.release()}"
    rows = [
        ("python", platform.python_version(), sys.executable),
        ("machine", machine.describe(dev), system),
    ]
    for package in ("ftdpp", "torch", "triton", "torch_scatter", "numpy", "safetensors"):
        try:
            rows.append((package, importlib.metadata.version(package), ""))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed", ""))
    rows += [("device", str(dev), dev_why), ("kernels", *kernels.backend(dev))]
    console = screen.output()
    if not as_json:
        screen.facts(console, rows)
    checks = check.run(dev)
    table = [
        {
            "operation": c.what,
            "dtype": c.dtype,
            "deviation": f"{c.deviation:.1e}",
            "allowed": f"{check.ALLOWED[c.dtype]:.0e}",
            "repeats": "yes" if c.repeats else "NO",
            "result": "ok" if c.ok else "WRONG",
        }
        for c in checks
    ]
    if as_json:
        found = {what: {"value": value, "about": about} for what, value, about in rows}
        print(json.dumps({"machine": found, "checks": table, "ok": all(c.ok for c in checks)}))
    heading = "largest deviation from dense float64, as a share of the largest value"
    if not as_json:
        screen.show(console, screen.plain_table(table, heading))
    if not all(c.ok for c in checks):
        raise fail(
            "a sparse operation is wrong on this machine; FTD_KERNELS=torch avoids Triton; please "
            "report this",
            FAILED,
        )
