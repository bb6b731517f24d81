"""Environments: several turns and tools in one answer, in processes of their own; and those that ship with jaxft."""
