"""Generation: one implementation for evaluation, chat, reinforcement learning and serving."""

from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.settings import Generated, Sampling
from jaxft.generation.text import generate_text
from jaxft.generation.tokens import generate_tokens

__all__ = ["ConversationCache", "Generated", "Sampling", "generate_text", "generate_tokens"]
