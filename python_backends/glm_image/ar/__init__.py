"""The AR engine: an autoregressive decoder that generates image tokens."""
