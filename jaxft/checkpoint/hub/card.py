"""Model cards: the README.md of an export, with the metadata that the Hugging Face Hub reads."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jaxft.checkpoint.hub.base import BaseFacts
from jaxft.files.atomic import write_text
from jaxft.terminal.text import safe_line

README = "README.md"
# Tells our cards from those that somebody has written: only ours are replaced.
MARK = "<!-- Written by jaxft. Remove this line to keep the text when the model is exported again. -->"
UNKNOWN_LICENSE = (
    "The license of the base model was not found beside its weights and is therefore not stated here. It applies to "
    "this model too."
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A figure on held-out rows. rows: on how many; details: more figures, such as a confidence interval."""

    metric: str
    value: float
    rows: int | None = None
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says.

    title: the name of the model. form: `adapter` (PEFT) or `merged` (a whole model). base: what was trained.
    peft_type: of an adapter, in lower case. classifies: whether it has a score head. chats: whether it has a chat
    template. gguf: whether `jaxft convert` writes a GGUF file of it. trained: whether its weights are other than those
    of the base. datasets: names on the hub. tags: those that do not follow from the other fields. evaluated_on: what
    the results were measured on. sections: more text, as pairs of heading and Markdown.
    """

    title: str
    form: Literal["adapter", "merged"]
    base: BaseFacts
    peft_type: str = "lora"
    classifies: bool = False
    chats: bool = False
    gguf: bool = False
    trained: bool = False
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()
    evaluated_on: str = "held-out rows"
    sections: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """The card in Markdown, with its metadata as YAML at the head."""
        head = f"---\n{self._metadata().to_yaml(line_break=chr(10))}\n---\n"
        kind = f"An adapter ({self.peft_type})" if self.form == "adapter" else "A model"
        base = f" of [{self.base.name}](https://huggingface.co/{self.base.name})" if self.base.name else ""
        parts = [MARK, f"# {markdown_text(self.title)}", f"{kind}{base}, written by jaxft."]
        for heading, body in (*self.sections, ("Loading", self._loading()), ("License", self._license())):
            parts += [f"## {heading}", body]
        return head + "\n\n".join(parts) + "\n"

    def _metadata(self) -> ModelCardData:
        adapter = self.form == "adapter"
        own = ["jaxft", *([self.peft_type] if adapter else [])]
        if adapter and self.base.name:
            own.append(f"base_model:adapter:{self.base.name}")
        kind = "text-classification" if self.classifies else "text-generation"
        related = self.base.name is not None and (self.trained or adapter)
        extra: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if related else {}
        return ModelCardData(
            base_model=self.base.name,
            license=self.base.license,
            library_name="peft" if adapter else "transformers",
            pipeline_tag=kind,
            tags=[*own, *self.tags],
            datasets=list(self.datasets) or None,
            model_name=safe_line(self.title) if self.results else None,
            eval_results=[self._eval_result(one, kind) for one in self.results] or None,
            **extra,
        )

    def _eval_result(self, result: Result, task: str) -> EvalResult:
        arguments = {**({} if result.rows is None else {"n": result.rows}), **(result.details or {})}
        return EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name=safe_line(self.evaluated_on),
            metric_type=result.metric,
            metric_value=result.value,
            metric_args=arguments or None,  # the hub keeps one set of arguments for all metrics of a dataset
        )

    def _loading(self) -> str:
        kind = "SequenceClassification" if self.classifies else "CausalLM"
        if self.form == "merged":
            lines = [
                f"from transformers import AutoModelFor{kind}, AutoTokenizer", "",
                f'model = AutoModelFor{kind}.from_pretrained("FOLDER")',
            ]  # fmt: skip
        else:
            base = self.base.name or "BASE_MODEL"
            lines = [
                "from peft import PeftModel", f"from transformers import AutoModelFor{kind}, AutoTokenizer", "",
                f'base = AutoModelFor{kind}.from_pretrained("{base}"{", num_labels=1" if self.classifies else ""})',
                'model = PeftModel.from_pretrained(base, "FOLDER")',
            ]  # fmt: skip
        lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
        if not self.classifies:
            text = 'tokenizer("Once upon a time", return_tensors="pt")'
            if self.chats:
                text = (
                    'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Hello"}], '
                    'add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
                )
            lines += [f"inputs = {text}", "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))"]
        ours = "score" if self.classifies else "generate"
        out = "FOLDER stands for the name of this repository, or for a local copy.\n\n```python\n"
        out += "\n".join(lines) + f"\n```\n\nWith jaxft: `jaxft {ours} --model=FOLDER`."
        if self.gguf:
            form, use = "", "-m model.gguf"
            if self.form == "adapter":
                form, use = " --to=gguf-adapter", "-m BASE_MODEL.gguf --lora model.gguf"
            out += f" For llama.cpp: `jaxft convert FOLDER model.gguf{form}`, and then `llama-cli {use}`."
        return out

    def _license(self) -> str:
        if self.base.license is None:
            return UNKNOWN_LICENSE
        return f"As the base model: {self.base.license}."


def markdown_text(text: str) -> str:
    """A text in Markdown, in which nothing is read as a link, an image, code or HTML."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", safe_line(text))


def markdown_code(text: str) -> str:
    """A text as code within a line or a table of Markdown."""
    shown = safe_line(text, most=2_000).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def write_card(folder: str | os.PathLike[str], card: Card) -> bool:
    """Writes README.md into an export. Returns False, and writes nothing, if there is one that jaxft did not write."""
    path = os.path.join(folder, README)
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            if MARK not in file.read():
                return False
    write_text(path, ModelCard(card.text()).content)
    return True
