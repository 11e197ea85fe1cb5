"""What is done to a model: the plan, the quantizers, the runtime that applies them."""
