"""First stage: load the module of a source, and describe its architecture."""
