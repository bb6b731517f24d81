"""A plan for people: tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def print_plan(figures: dict[str, Any], console: Console) -> None:
    """Prints what `jaxft.plan` found."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    chips = f"{figures['chips']} chip{'s' * (figures['chips'] > 1)}"
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    console.print(
        f"{figures['parameters']:,} parameters, {figures['adapter_parameters']:,} in adapters; "
        f"{figures['batch_size']} sequences of {figures['max_length']} a step\n"
        f"{slices}{figures['topology']}, {chips}, {mesh}; {_how(figures)}",
        highlight=False,
        soft_wrap=True,
    )
    _memory(figures, console)
    _time(figures, console)
    if figures.get("changes"):
        console.print("\nwhat would make it fit (by arithmetic from this plan, not compiled):", highlight=False)
        for change in figures["changes"]:
            needs = f"about {_gib(change['hbm_peak_bytes'])}, {change['step_seconds']:.2f} s a step"
            console.print(f"  {change['what']}: {needs}", highlight=False)
            console.print(f"    {change['paste']}", highlight=False, soft_wrap=True)
    console.print("\nnot known:", highlight=False)
    for line in figures["unknown"]:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def print_search(figures: dict[str, Any], console: Console) -> None:
    """Prints what a search found."""
    console.print(f"{figures['tried']:,} ways reckoned by arithmetic, {figures['fitting']:,} fit", highlight=False)
    for name in ("cheapest", "fastest"):
        plan = figures[name]
        console.print(f"\n[bold]{name}[/bold]")
        if plan is None:
            console.print("  none of those that were compiled fits; --compiles=N compiles more", highlight=False)
            continue
        console.print(f"  --topology={plan['topology']} {plan['overrides']}", highlight=False, soft_wrap=True)
        console.print(
            f"  {_gib(plan['hbm_peak_bytes'])} of {_gib(plan['hbm_limit_bytes'])}; {plan['step_seconds']:.2f} s, "
            f"{plan['tokens_per_second_per_chip']:,.0f} tokens a second and chip, MFU {plan['mfu']:.1%}; "
            f"{plan['steps']:,} steps: {plan['hours']:.2f} hours, USD {plan['usd']:,.2f} ({_how(plan)})",
            highlight=False,
            soft_wrap=True,
        )


def _how(figures: dict[str, Any]) -> str:
    if figures["refused"]:
        return f"refused by the compiler at level {figures['optimization_level']}: figures are by arithmetic"
    if not figures["compiled"]:
        return "not compiled: figures are by arithmetic"
    level = figures["optimization_level"]
    more = "; --level=default confirms that it fits" if level == "O1" else ""
    return f"compiled in {figures['compile_seconds']:.0f} s at level {level}{more}"


def _memory(figures: dict[str, Any], console: Console) -> None:
    table = Table(title="memory of one device", title_justify="left", box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    parts = figures["argument_parts"]
    names = {"weights": "weights", "adapters": "adapters", "optimizer": "optimizer", "batch": "batch"}
    rows = [(name, parts[key]) for key, name in names.items() if parts[key]]
    rows += [("temporaries", figures["temp_bytes"]), ("code", figures["code_bytes"])]
    largest = max(size for _, size in rows)
    for name, size in rows:
        table.add_row(name, _gib(size) + ("  <- most" if size == largest else "        "))
    share = figures["hbm_peak_bytes"] / figures["hbm_limit_bytes"]
    verdict = "[green]fits[/green]" if figures["fits"] else "[red]does not fit[/red]"
    table.add_row(
        "[bold]peak[/bold]",
        f"[bold]{_gib(figures['hbm_peak_bytes'])}[/bold] of {_gib(figures['hbm_limit_bytes'])} "
        f"({share:.0%}), {verdict}",
    )
    console.print()
    console.print(table, highlight=False)


def _time(figures: dict[str, Any], console: Console) -> None:
    parts = figures["step_parts"]
    table = Table(title="one step, a chip", title_justify="left", box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column()
    again = figures["hardware_flops_per_step"] / max(1, figures["model_flops_per_step"])
    scores = figures["attention_flops_per_step"] / max(1, figures["model_flops_per_step"])
    table.add_row(
        "products",
        f"{figures['hardware_flops_per_step'] / 1e12:.1f} TFLOP, {again:.2f} x the model's own, of which attention is "
        f"{scores:.0%}",
    )
    table.add_row("main memory", f"{_gib(figures['hbm_traffic_bytes_per_step'])} read and written")
    if figures["host_traffic_bytes_per_step"]:
        carried, kept = _gib(figures["host_traffic_bytes_per_step"]), _gib(figures["host_bytes"])
        table.add_row("host's memory", f"{carried} sent and fetched, {kept} kept; counted as no time")
    kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in figures["collective_bytes_by_kind"].items())
    axes = ", ".join(f"{axis} {_gib(size)}" for axis, size in figures["collective_bytes_by_axis"].items())
    table.add_row(
        "received", _gib(figures["collective_bytes_per_step"]) + (f": {kinds}\nalong {axes}" if kinds else "")
    )
    table.add_row(
        "seconds",
        f"{figures['step_seconds']:.3f}: computing {parts['busy']:.3f}, network not hidden "
        f"{parts['network_exposed']:.3f}; waits for {parts['bound_by']} most",
    )
    table.add_row(
        "speed", f"{figures['tokens_per_second_per_chip']:,.0f} tokens a second and chip, MFU {figures['mfu']:.1%}"
    )
    spot = "" if figures["usd_spot"] is None else f", spot {figures['usd_spot']:,.2f}"
    table.add_row(
        "whole run" if figures["steps_known"] else "a part",
        f"{figures['steps']:,} steps ({figures['steps_from']}): {figures['hours']:.2f} hours, USD "
        f"{figures['usd']:,.2f}{spot} ({figures['prices_from']})",
    )
    console.print()
    console.print(table, highlight=False)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
