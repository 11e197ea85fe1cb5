"""Learning from the float model: the teacher, what is compared, and how it reaches the backward."""
