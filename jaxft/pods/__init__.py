"""`jaxft pod`: one run on TPUs of Google Cloud, from the creation of the machines to their deletion."""
