"""Search: the `Retriever` protocol and the engines that meet it."""

from searche1_lite.search.base import Passage, Retriever

__all__ = ["Passage", "Retriever"]
