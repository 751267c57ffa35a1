"""Last stage: what caching saves and what it costs, and whether the graphs still compute what the module did."""
