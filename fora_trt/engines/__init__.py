"""Fourth stage: for each backend, engines that run one graph on tensors that the caller owns."""
