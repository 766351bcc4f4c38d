"""The arithmetic of HSTU: one attention op under one rule of sight. Imports torch and triton alone."""
