"""From a quantized model to a file that an engine runs."""
