"""Teacher, student, and the capture of their inner tensors."""
