"""Data sets, their splits, augmentation and batches.

A data set is a plugin (entry-point group `exitkit.datasets`): a dataclass derived from `DataSet` whose `load` returns
`Data`. What fits into memory is a `TensorData`; `hold_out` draws its parts, stratified.
"""

from exitkit.data.base import Batch, Data, DataSet, TensorData
from exitkit.data.split import Split, hold_out

__all__ = ["Batch", "Data", "DataSet", "Split", "TensorData", "hold_out"]
