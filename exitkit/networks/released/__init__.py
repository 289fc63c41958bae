"""The authors' released weights, and the names of the tensors in their files."""
