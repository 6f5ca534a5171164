"""Search: the `Retriever` protocol and the engines that meet it."""

from searche1_lite.data.trajectory import Passage
from searche1_lite.search.base import Retriever

__all__ = ["Passage", "Retriever"]
