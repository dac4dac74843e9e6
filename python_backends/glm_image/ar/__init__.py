"""The first stage: an autoregressive decoder that writes image tokens."""
