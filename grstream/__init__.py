"""grstream: train a generative recommender on a live stream of user actions and serve it while it learns."""

__version__ = "0.1.0"
