"""Prints plans and searches as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxft.terminal.console import say

GIB = 2**30


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints a plan that `jaxft.plan` returned."""
    mesh = _axes(plan["mesh"])
    chips = f"{plan['chips']} chip{'s' * (plan['chips'] > 1)}"
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    say(
        console,
        f"{plan['parameters']:,} parameters, {plan['adapter_parameters']:,} in adapters; "
        f"{plan['batch_size']} sequences of {plan['max_length']} a step\n"
        f"{slices}{plan['topology']}, {chips}, {mesh}; {_how(plan)}",
    )
    if plan["remat_choice"] is not None:
        say(console, plan["remat_choice"])
    _memory(plan, console)
    if plan["rollout"] is not None:
        _rollout_memory(plan, plan["rollout"], console)
    _time(plan, console)
    if plan["rollout"] is not None:
        _rollout_time(plan, plan["rollout"], console)
    if plan.get("changes"):
        console.print()
        say(console, "changes that would make it fit (by arithmetic from this plan, not compiled):")
        for change in plan["changes"]:
            needs = f"about {_gib(change['hbm_peak_bytes'])}, {change['step_seconds']:.2f} s a step"
            say(console, f"  {change['what']}: {needs}")
            say(console, f"    {change['paste']}")
    console.print()
    say(console, "not known:")
    for line in plan["unknown"]:
        say(console, f"  {line}")


def print_search(result: dict[str, Any], console: Console) -> None:
    """Prints the result of `jaxft.plan(..., search=True)`."""
    say(console, f"{result['tried']:,} candidates estimated by arithmetic, {result['fitting']:,} fit")
    for name in ("cheapest", "fastest"):
        plan = result[name]
        console.print()
        say(console, name, style="bold")
        if plan is None:
            say(console, "  no candidate that was compiled fits; --compiles=N compiles more")
            continue
        say(console, f"  --topology={plan['topology']} {plan['overrides']}")
        say(
            console,
            f"  {_gib(plan['hbm_peak_bytes'])} of {_gib(plan['hbm_limit_bytes'])}; {plan['step_seconds']:.2f} s, "
            f"{plan['tokens_per_second_per_chip']:,.0f} tokens a second and chip, MFU {plan['mfu']:.1%}; "
            f"{plan['steps']:,} steps: {plan['hours']:.2f} hours, USD {plan['usd']:,.2f} ({_how(plan)})",
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
    title = "memory of one device" + (", during an update" if plan["rollout"] else "")
    table = _sizes(title)
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
    # With rollouts, the verdict on the larger of the two peaks is below the second table.
    _add_sizes(
        table, rows, plan["update_peak_bytes"], plan["hbm_limit_bytes"], None if plan["rollout"] else plan["fits"]
    )
    console.print()
    console.print(table, highlight=False)


def _sizes(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _add_sizes(table: Table, rows: list[tuple[str, int]], peak: int, limit: int, fits: bool | None) -> None:
    """Adds the parts of a device's memory and their peak. fits: None leaves the verdict out."""
    largest = max(size for _, size in rows)
    for name, size in rows:
        table.add_row(name, _gib(size) + ("  <- most" if size == largest else "        "))
    sum_text = Text.assemble((_gib(peak), "bold"), f" of {_gib(limit)} ({peak / limit:.0%})")
    if fits is not None:
        sum_text.append(", ").append_text(_verdict(fits))
    table.add_row(Text("peak", style="bold"), sum_text)


def _verdict(fits: bool) -> Text:
    return Text("fits", style="green") if fits else Text("does not fit", style="red")


def _rollout_memory(plan: dict[str, Any], rollout: dict[str, Any], console: Console) -> None:
    table = _sizes("memory of one device, while answers are sampled")
    copy = _axes(rollout["mesh"])
    rows = [("state of training", rollout["state_bytes"]), (f"weights for sampling ({copy})", rollout["copy_bytes"])]
    rows += [
        (f"cache of {rollout['slots']} slots x {rollout['cache_length']} tokens", rollout["cache_bytes"]),
        ("temporaries and code", rollout["temp_bytes"]),
    ]
    _add_sizes(table, [row for row in rows if row[1]], rollout["hbm_peak_bytes"], plan["hbm_limit_bytes"], None)
    console.print()
    console.print(table, highlight=False)
    most = rollout["slots_that_fit"]
    slots = f"up to {most:,} slots would fit" if most else "not even one slot for each part of the rows would fit"
    text = Text.assemble("  the larger peak ", _verdict(plan["fits"]), f"; {slots} (by arithmetic from this plan)")
    console.print(text, soft_wrap=True)


def _rollout_time(plan: dict[str, Any], rollout: dict[str, Any], console: Console) -> None:
    title = f"one rollout: {rollout['answers']:,} answers to {rollout['prompts']:,} prompts"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column()
    seconds, longest = rollout["seconds"], rollout["longest_part"]
    total = sum(seconds.values())
    one = f"{rollout['decode_steps']:,} x {rollout['decode_step_seconds'] * 1000:.2f} ms"
    names = {
        "weights": "moving weights", "prefill": "prompts", "decode": f"decoding, {one}",
        "scoring": "scoring answers", "update": f"updates, {rollout['updates']:g} x {plan['update_seconds']:.2f} s",
    }  # fmt: skip
    for part, name in names.items():
        if seconds.get(part):
            mark = "  <- longest" if part == longest else ""
            table.add_row(name, f"{seconds[part]:.2f} s, {seconds[part] / total:.0%}{mark}")
    table.add_row("sampling", f"at most {rollout['tokens_per_second']:,.0f} tokens a second over all devices")
    table.add_row("an optimizer step", f"{plan['step_seconds']:.2f} s, if {'; '.join(rollout['assumed'])}")
    console.print()
    console.print(table, highlight=False)


def _axes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def _time(plan: dict[str, Any], console: Console) -> None:
    parts = plan["step_parts"]
    title = "one update, a chip" if plan["rollout"] else "one step, a chip"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), show_header=False)
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
        f"{plan['update_seconds']:.3f}: computing {parts['busy']:.3f}, network not hidden "
        f"{parts['network_exposed']:.3f}; waits for {parts['bound_by']} most",
    )
    table.add_row(
        "speed" if plan["rollout"] is None else "speed with rollouts",
        f"{plan['tokens_per_second_per_chip']:,.0f} tokens a second and chip, MFU {plan['mfu']:.1%}",
    )
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
