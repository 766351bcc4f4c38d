"""What `ray job submit` runs: thin scripts over the grstream library."""
