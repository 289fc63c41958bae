"""The interface of data sets: settings, loaded images, batches and splits.

A data set is a plugin (entry-point group `exitkit.datasets`): a dataclass derived from `DataSet` whose `load` returns
`Data`. `TensorData` stores images that fit into memory; `hold_out` draws stratified parts.
"""

from exitkit.data.base import Batch, Data, DataSet, Part, TensorData
from exitkit.data.images import ImageDataSet
from exitkit.data.objects import from_datasets
from exitkit.data.split import Split, hold_out
from exitkit.errors import UserError
from exitkit.plugins import setting

__all__ = [
    "Batch",
    "Data",
    "DataSet",
    "ImageDataSet",
    "Part",
    "Split",
    "TensorData",
    "UserError",
    "from_datasets",
    "hold_out",
    "setting",
]
