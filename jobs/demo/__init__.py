"""`make demo`: the whole loop on this machine, watched, and proven on screen."""
