"""Second stage: trace a module that is split at its cache sites, and write a full and a reuse graph."""
