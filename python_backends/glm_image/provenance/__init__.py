"""What an image file says about its origin: how it was made, labels, and a signature."""
