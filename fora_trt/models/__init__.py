"""First stage: from a source that a user names to a module, and what is known about its architecture."""
