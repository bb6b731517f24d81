"""The environment that `rollout.environment` names."""

from pathlib import Path

from jaxft.errors import ConfigError, did_you_mean
from jaxft.rollouts.reward_functions.named import Named

BUILT_IN = {
    "calculator": ("jaxft.rollouts.environments.calculator", "Calculator"),
    "guess_number": ("jaxft.rollouts.environments.guess_number", "GuessNumber"),
}


def named_environment(text: str) -> Named:
    """The class of `rollout.environment`: `FILE.py:CLASS`, or the name of a built-in one.

    Raises ConfigError for text of another form, a file that is not there and an unknown built-in one.
    """
    source, colon, name = text.strip().rpartition(":")
    if not colon:
        if name not in BUILT_IN:
            raise ConfigError(
                f"rollout.environment={text!r} is not a built-in environment ({', '.join(BUILT_IN)})."
                f"{did_you_mean(name, BUILT_IN)} A class of your own is named FILE.py:CLASS."
            )
        source, name = BUILT_IN[name]
        return Named(name=name, source=source)
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ConfigError(
                f"rollout.environment: there is no file {source!r}. A path is relative to the folder in which the run "
                f"is started, {Path.cwd()}."
            )
        source = str(Path(source).absolute())
    return Named(name=name, source=source)
