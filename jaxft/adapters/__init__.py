"""Small trainable additions to frozen layers, attached to a slot of `nn.Linear`."""
