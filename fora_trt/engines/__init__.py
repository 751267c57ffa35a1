"""Fourth stage: something that runs one graph on tensors that the caller owns, for each backend."""
