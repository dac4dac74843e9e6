"""What an operator sets: the parameters and tensors of the models, ``config.pbtxt`` and profiles."""
