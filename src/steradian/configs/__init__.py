"""Configuration files that come with the package: those of the demo."""
