"""`jaxft compare`: whether fine-tuning is worth it against prompts."""

import argparse
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from jaxft.cli.streams import only_ascii
from jaxft.errors import ConfigError, NotMetError
from jaxft.terminal import text as terminal


def add_options(option: Callable[..., Any]) -> None:
    """The options of `jaxft compare`."""
    option("--to", required=True, metavar="FOLDER", help="of answers, compare.json and compare.html; to go on")
    option("--run", action="append", default=[], metavar="FOLDER", help="a tuned model; once per run")
    option("--ways", default="zero,shots,tuned", metavar="LIST", help="what is compared: zero, shots, tuned, bare")
    option("--model", action="append", default=[], metavar="PATH", help="another model for prompts; once per model")
    option(
        "--endpoint",
        metavar="NAME",
        help="a model of an OpenAI-compatible server; JAXFT_COMPARE_BASE_URL and JAXFT_COMPARE_API_KEY say where",
    )
    option("--shots", default="auto", metavar="LIST", help="numbers of examples, such as 2,8,16; auto: what fits")
    option("--choose", default="fixed,bm25", metavar="LIST", help="how examples are chosen: fixed, bm25, own")
    option("--draws", type=int, default=3, metavar="N", help="sets of fixed examples that are tried")
    option("--prompts", metavar="FILE", help="other system messages: a JSON object of names and texts")
    option("--dev_rows", type=int, default=50, metavar="N", help="training rows on which prompts are chosen, at most")
    option("--methods", default="", metavar="LIST", help="runs to train here: lora, full")
    option("--seeds", type=int, default=1, metavar="N", help="runs of each method, with seeds of their own")
    option("--sizes", default="", metavar="LIST", help="parts of the rows to train on too, such as 1/8,1/4,1/2")
    option("--margin", type=float, default=0.02, metavar="X", help="the smallest difference of scores that counts")
    option("--cluster", metavar="COLUMN", help="column of held-out rows that belong together, such as a document")
    option("--calls", type=int, metavar="N", help="calls a month, for the months until training is earned back")
    option("--usd_per_hour", type=float, metavar="D", help="price of this machine; by default of its chips")
    option("--prices", metavar="FILE", help="USD per chip-hour in place of jaxft's own table")
    option("--topology", metavar="NAME", help="accelerators that are not here, such as v5e:1x1, for seconds and USD")
    option("--endpoint_usd", metavar="IN,OUT", help="USD for a million tokens of an endpoint's prompts and answers")
    option("--label_usd", type=float, metavar="D", help="what the answers of the training rows cost in all")
    option("--probe", metavar="builtin|FILE", help="what the tuned model forgot: requests for other formats")
    option("--minutes", type=float, metavar="M", help="begin nothing more after so long; what is dearest is left out")
    option("--hide_rows", action="store_true", help="a page without texts of the rows, for people who may not see them")
    option(
        "--require",
        metavar="A>B",
        help="end with code 3 unless tuned>prompt (by the margin) or tuned>=prompt (not worse), or the other way round",
    )


def compare(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft compare`: the content of compare.json. Raises NotMetError if --require is not met."""
    from jaxft import api

    result = api.compare(
        arguments.config if not overrides else _config(arguments.config, overrides),
        to=arguments.to,
        ways=_names(arguments.ways),
        runs=arguments.run,
        models=arguments.model,
        endpoint=arguments.endpoint,
        shots=_shots(arguments.shots),
        choose=_names(arguments.choose),
        draws=arguments.draws,
        prompts=arguments.prompts,
        dev_rows=arguments.dev_rows,
        methods=_names(arguments.methods),
        seeds=arguments.seeds,
        sizes=_sizes(arguments.sizes),
        margin=arguments.margin,
        cluster=arguments.cluster,
        calls=arguments.calls,
        usd_per_hour=arguments.usd_per_hour,
        prices=arguments.prices,
        topology=arguments.topology,
        endpoint_usd=arguments.endpoint_usd,
        label_usd=arguments.label_usd,
        probe=arguments.probe,
        minutes=arguments.minutes,
        hide_rows=arguments.hide_rows,
        require=arguments.require,
        print_line=lambda line: terminal.write(line, error=True),
    )
    if not arguments.json:
        terminal.write(result["verdict"]["sentence"])
        for way in result["ways"]:
            ends = "" if way["interval"] is None else f" ({way['interval'][0]:.3f} to {way['interval'][1]:.3f})"
            terminal.write(f"  {way['value']:.3f}{ends}  {way['name']}")
        for method, one in result["seeds"].items():
            ends = f" (from {one['low']:.3f} to {one['high']:.3f})"
            terminal.write(f"  {one['mean']:.3f}{ends}  {method}, average of {one['runs']} trainings")
        terminal.write(f"{arguments.to}/compare.html has the rest")
    require = result["require"]
    if require is None or require["met"]:
        return result
    if arguments.json:
        print(terminal.safe_json(result, only_ascii=only_ascii()))
    raise NotMetError(f"--require={require['text']} is not met: {result['verdict']['sentence']}")


def _config(path: str | None, overrides: Sequence[str]) -> Any:
    from jaxft.config import load

    if path is None:
        raise ConfigError(f"--{overrides[0]} changes a config: give --config=NAME")
    return load(path, overrides)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sizes(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(Fraction(part)) for part in _names(text))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--sizes={text} must be shares of the rows, such as 1/8,1/4,1/2") from None


def _shots(text: str) -> tuple[int, ...] | None:
    if text == "auto":
        return None
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise ConfigError(f"--shots={text} must be auto, or numbers such as 2,8,16") from None
