"""What every room of the application stands on: its one error class, and reading and writing files."""
