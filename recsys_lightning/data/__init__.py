"""Raw files to batches: sources, interactions, catalog, item texts, sequences, data modules."""
