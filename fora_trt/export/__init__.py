"""Second stage: a module is split at its cache sites and traced, and the graph cut into a full and a reuse graph."""
