"""`jaxft lm-eval`: standard tasks of lm-evaluation-harness on any model that jaxft loads."""
