"""`jaxft compare`: prompts against fine-tuned models on the same held-out rows, with intervals, costs and a verdict."""
