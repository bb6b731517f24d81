"""Generation: one implementation for evaluation, chat, reinforcement learning and serving."""

from jaxft.generate.settings import Generated, Sampling
from jaxft.generate.text import generate_text
from jaxft.generate.tokens import generate_tokens

__all__ = ["Generated", "Sampling", "generate_text", "generate_tokens"]
