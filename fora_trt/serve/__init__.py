"""An HTTP service of bundles on Ray Serve."""
