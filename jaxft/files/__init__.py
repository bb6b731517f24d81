"""Files wherever they lie: paths and addresses, headers, writes that are whole or absent, the run folder."""
