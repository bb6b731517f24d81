"""`jaxft data --deep`: what is wrong with rows beyond their form, and answers that may be wrong."""
