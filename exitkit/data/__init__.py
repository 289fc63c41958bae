"""What a data set imports: its interface, loaded images, batches and splits.

A data set is a plugin (entry-point group `exitkit.datasets`): a dataclass derived from `DataSet` whose `load` returns
`Data`. Images that fit into memory are a `TensorData`; `hold_out` draws its parts, stratified.
"""

from exitkit.data.base import Batch, Data, DataSet, Part, TensorData
from exitkit.data.split import Split, hold_out
from exitkit.errors import UserError
from exitkit.plugins import setting

__all__ = ["Batch", "Data", "DataSet", "Part", "Split", "TensorData", "UserError", "hold_out", "setting"]
