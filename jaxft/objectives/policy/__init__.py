"""Learning from rewards: losses of a policy, of its value predictions, and the advantages of sampled answers."""
