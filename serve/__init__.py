"""The Ray Serve application: gateway, scorers and history shards."""
