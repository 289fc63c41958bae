"""Data sets, their splits, augmentation and batches.

A data set is a plugin (entry-point group `exitkit.datasets`): a dataclass derived from `base.DataSet` whose `load`
returns `base.Data`. What fits into memory is a `base.TensorData`; `split.hold_out` draws its parts, stratified.
"""

# Nothing is imported here: `exitkit list` looks for the data sets' files through this package without loading torch.
