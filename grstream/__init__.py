"""grstream: train a generative recommender on a live stream of user actions and serve it while it learns."""
