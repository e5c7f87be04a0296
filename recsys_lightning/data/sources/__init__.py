"""Where interactions come from: one file a source, each turning raw files into one `RawData`."""

from recsys_lightning.data.sources.amazon2014 import Amazon2014
from recsys_lightning.data.sources.source import RawData, Source
from recsys_lightning.data.sources.synthetic import Synthetic
from recsys_lightning.data.sources.tabular import Tabular

__all__ = ["Amazon2014", "RawData", "Source", "Synthetic", "Tabular"]
