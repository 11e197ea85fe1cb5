"""What a model is made of: its layers, the tensors between them, and their picture."""
