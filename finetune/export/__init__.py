"""Networks out: pickles for other code bases, tensor files, and the proof that they read back."""
