"""The process of one job: it examines the rows, trains, and exports. Only this part imports JAX."""
