"""Other libraries' weights, configurations and models, to and from ours. Only `megatron` imports its library."""
