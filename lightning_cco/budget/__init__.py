"""Bits and skips chosen by what they cost: the expected rise of the loss against size, bits or operations."""
