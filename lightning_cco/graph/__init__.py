"""What a model is made of: its layers, and the tensors between them."""
