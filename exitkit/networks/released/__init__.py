"""The authors' released weights, and how their files name the tensors."""
