"""Prints plans and searches as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints a plan that `jaxft.plan` returned."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    chips = f"{plan['chips']} chip{'s' * (plan['chips'] > 1)}"
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    console.print(
        f"{plan['parameters']:,} parameters, {plan['adapter_parameters']:,} in adapters; "
        f"{plan['batch_size']} sequences of {plan['max_length']} a step\n"
        f"{slices}{plan['topology']}, {chips}, {mesh}; {_how(plan)}",
        highlight=False,
        soft_wrap=True,
    )
    _memory(plan, console)
    _time(plan, console)
    if plan.get("changes"):
        console.print("\nchanges that would make it fit (by arithmetic from this plan, not compiled):", highlight=False)
        for change in plan["changes"]:
            needs = f"about {_gib(change['hbm_peak_bytes'])}, {change['step_seconds']:.2f} s a step"
            console.print(f"  {change['what']}: {needs}", highlight=False)
            console.print(f"    {change['paste']}", highlight=False, soft_wrap=True)
    console.print("\nnot known:", highlight=False)
    for line in plan["unknown"]:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def print_search(result: dict[str, Any], console: Console) -> None:
    """Prints the result of `jaxft.plan(..., search=True)`."""
    console.print(f"{result['tried']:,} candidates estimated by arithmetic, {result['fitting']:,} fit", highlight=False)
    for name in ("cheapest", "fastest"):
        plan = result[name]
        console.print(f"\n[bold]{name}[/bold]")
        if plan is None:
            console.print("  no candidate that was compiled fits; --compiles=N compiles more", highlight=False)
            continue
        console.print(f"  --topology={plan['topology']} {plan['overrides']}", highlight=False, soft_wrap=True)
        console.print(
            f"  {_gib(plan['hbm_peak_bytes'])} of {_gib(plan['hbm_limit_bytes'])}; {plan['step_seconds']:.2f} s, "
            f"{plan['tokens_per_second_per_chip']:,.0f} tokens a second and chip, MFU {plan['mfu']:.1%}; "
            f"{plan['steps']:,} steps: {plan['hours']:.2f} hours, USD {plan['usd']:,.2f} ({_how(plan)})",
            highlight=False,
            soft_wrap=True,
        )


def _how(plan: dict[str, Any]) -> str:
    if plan["refused"]:
        return f"refused by the compiler at level {plan['optimization_level']}: figures are estimated by arithmetic"
    if not plan["compiled"]:
        return "not compiled: figures are estimated by arithmetic"
    level = plan["optimization_level"]
    more = "; --level=default confirms that it fits" if level == "O1" else ""
    return f"compiled in {plan['compile_seconds']:.0f} s at level {level}{more}"


def _memory(plan: dict[str, Any], console: Console) -> None:
    table = Table(title="memory of one device", title_justify="left", box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    parts = plan["argument_parts"]
    names = {
        "weights": "weights",
        "adapters": "adapters",
        "optimizer": "optimizer",
        "method": "reference",
        "batch": "batch",
    }
    rows = [(name, parts[key]) for key, name in names.items() if parts[key]]
    rows += [("temporaries", plan["temp_bytes"]), ("code", plan["code_bytes"])]
    largest = max(size for _, size in rows)
    for name, size in rows:
        table.add_row(name, _gib(size) + ("  <- most" if size == largest else "        "))
    share = plan["hbm_peak_bytes"] / plan["hbm_limit_bytes"]
    verdict = "[green]fits[/green]" if plan["fits"] else "[red]does not fit[/red]"
    table.add_row(
        "[bold]peak[/bold]",
        f"[bold]{_gib(plan['hbm_peak_bytes'])}[/bold] of {_gib(plan['hbm_limit_bytes'])} ({share:.0%}), {verdict}",
    )
    console.print()
    console.print(table, highlight=False)


def _time(plan: dict[str, Any], console: Console) -> None:
    parts = plan["step_parts"]
    table = Table(title="one step, a chip", title_justify="left", box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column()
    again = plan["hardware_flops_per_step"] / max(1, plan["model_flops_per_step"])
    scores = plan["attention_flops_per_step"] / max(1, plan["model_flops_per_step"])
    table.add_row(
        "products",
        f"{plan['hardware_flops_per_step'] / 1e12:.1f} TFLOP, {again:.2f} x the model's own, of which attention is "
        f"{scores:.0%}",
    )
    table.add_row("main memory", f"{_gib(plan['hbm_traffic_bytes_per_step'])} read and written")
    if plan["host_traffic_bytes_per_step"]:
        carried, kept = _gib(plan["host_traffic_bytes_per_step"]), _gib(plan["host_bytes"])
        table.add_row("host's memory", f"{carried} sent and fetched, {kept} kept; counted as no time")
    kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in plan["collective_bytes_by_kind"].items())
    axes = ", ".join(f"{axis} {_gib(size)}" for axis, size in plan["collective_bytes_by_axis"].items())
    table.add_row("received", _gib(plan["collective_bytes_per_step"]) + (f": {kinds}\nalong {axes}" if kinds else ""))
    table.add_row(
        "seconds",
        f"{plan['step_seconds']:.3f}: computing {parts['busy']:.3f}, network not hidden "
        f"{parts['network_exposed']:.3f}; waits for {parts['bound_by']} most",
    )
    table.add_row("speed", f"{plan['tokens_per_second_per_chip']:,.0f} tokens a second and chip, MFU {plan['mfu']:.1%}")
    spot = "" if plan["usd_spot"] is None else f", spot {plan['usd_spot']:,.2f}"
    table.add_row(
        "whole run" if plan["steps_known"] else "a part",
        f"{plan['steps']:,} steps ({plan['steps_from']}): {plan['hours']:.2f} hours, USD "
        f"{plan['usd']:,.2f}{spot} ({plan['prices_from']})",
    )
    console.print()
    console.print(table, highlight=False)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
