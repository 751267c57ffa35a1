"""Second stage: a module is split at its cache sites and traced into a full and a reuse graph."""
