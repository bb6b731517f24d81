"""Generation: one implementation for evaluation, chat, reinforcement learning and serving."""
